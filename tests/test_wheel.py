"""The wheel holds all that a project needs, and works in a folder without our sources."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import project
import pytest
from made_once import made_once
from ruamel.yaml import YAML

from pipelines import layout

PACKAGES = ("limpid", "components", "pipelines")
BUILT_FROM = (*PACKAGES, "profiles", "dvc.yaml", "pyproject.toml", "setup.py", "README.md")
SOURCES = ("*.py", "*.j2")


def _install(folder: Path) -> None:
    source = folder / "source"
    source.mkdir()
    for name in BUILT_FROM:
        if (project.ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(project.ROOT / name, source / name, ignore=ignored)
        else:
            shutil.copyfile(project.ROOT / name, source / name)
    command = (
        "-m pip install --quiet --disable-pip-version-check --no-index --no-deps "
        "--no-build-isolation --target"
    )
    subprocess.run([sys.executable, *command.split(), "site", "./source"], cwd=folder, check=True)


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which pip has installed the wheel; no test may change it."""
    return made_once(tmp_path_factory, "wheel", _install) / "site"


@pytest.fixture
def site(installed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(installed, tmp_path / "site"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder, for a project."""
    (tmp_path / "project").mkdir()
    return tmp_path / "project"


def run(folder: Path, *command: str, path: tuple[Path, ...]) -> tuple[int, str]:
    """Run a command that finds the installed `limpid`, and no sources of it."""
    return project.run(
        folder, *command, PYTHONPATH=os.pathsep.join(map(str, path)),
        PATH=os.pathsep.join([str(path[-1] / "bin"), str(Path(sys.executable).parent), os.defpath]),
    )  # fmt: skip


def test_the_wheel_holds_the_packages_the_profiles_and_dvc_yaml(installed: Path) -> None:
    for name in PACKAGES:
        ours = {
            path.relative_to(project.ROOT)
            for pattern in SOURCES
            for path in (project.ROOT / name).rglob(pattern)
        }
        assert ours and not {path for path in ours if not (installed / path).is_file()}
    templates = installed / "pipelines/templates"
    for path in (project.ROOT / "dvc.yaml", *(project.ROOT / "profiles").glob("*.yaml")):
        copied = templates / path.relative_to(project.ROOT)
        assert copied.read_bytes() == path.read_bytes()
    assert {path.name for path in installed.iterdir()} == {
        *PACKAGES, "bin", f"limpid-{_version()}.dist-info"
    }  # fmt: skip


def _version() -> str:
    read = tomllib.loads((project.ROOT / "pyproject.toml").read_text())
    return str(read["project"]["version"])


def test_a_project_is_made_and_run_where_there_are_no_sources(site: Path, folder: Path) -> None:
    code, printed = run(folder, "limpid", "configure", "digits", path=(site,))
    assert code == 0 and "params.yaml is now profile digits" in printed, printed
    yaml = YAML(typ="safe", pure=True)
    stages = yaml.load((folder / "dvc.yaml").read_text())["stages"]
    assert list(stages) == list(layout.STAGES)
    for name, stage in stages.items():
        stage = stage.get("do", stage)
        assert stage["cmd"].startswith(f"exec limpid {name}")
        assert stage["params"][-1] == {"code.yaml": [name]}
        assert not [dep for dep in stage["deps"] if dep.startswith(("components", "pipelines"))]
    for command in ("init --quiet --no-scm", "repro prepare_data"):
        code, printed = run(folder, "dvc", *command.split(), path=(site,))
        assert code == 0, printed
    assert (folder / "data/test/manifest.json").is_file()

    # Another version is installed.
    with (site / "components/sources/digits.py").open("a") as file:
        file.write("# Changed.\n")
    code, printed = run(folder, "limpid", "prepare_data", path=(site,))
    assert code == 2 and printed.startswith(
        "error: code.yaml names other code of prepare_data than"
    )
    before = yaml.load((folder / "code.yaml").read_text())
    code, printed = run(folder, "limpid", "configure", "--plugins", path=(site,))
    assert code == 0, printed
    after = yaml.load((folder / "code.yaml").read_text())
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"prepare_data", "selftest", "evaluate"}
    code, printed = run(folder, "dvc", "status", "prepare_data", path=(site,))
    assert "modified:           prepare_data" in printed, printed


def test_a_dvc_yaml_of_another_hand_is_kept(installed: Path, folder: Path) -> None:
    (folder / "dvc.yaml").write_text("stages: {}\n")
    code, printed = run(folder, "limpid", "configure", "digits", path=(installed,))
    assert code == 2 and "error: this folder has a dvc.yaml of its own: run this in" in printed
    assert [path.name for path in folder.iterdir()] == ["dvc.yaml"]
    assert (folder / "dvc.yaml").read_text() == "stages: {}\n"


@pytest.mark.parametrize("name", ["components", "pipelines"])
def test_another_package_of_the_name_of_ours_is_one_sentence(
    name: str, installed: Path, folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    (other / name).mkdir(parents=True)
    (other / name / "__init__.py").touch()
    code, printed = run(folder, "limpid", "doctor", path=(other, installed))
    sentence = f"the package {name} is that of {other}, and Limpid is that of {installed}: "
    assert code == 4 and printed.startswith(f"error: {sentence}") and printed.count("\n") == 1
    code, printed = run(
        folder, "python", "-c", "import limpid; limpid.evaluate", path=(other, installed)
    )
    assert code == 1 and printed.splitlines()[-1].startswith(
        f"limpid.shadowed.Shadowed: {sentence}"
    )
