"""The command `limpid`: its overview, its defaults, and how it ends where something is wrong."""

import ast
import importlib
import inspect
import json
import os
import re
import resource
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import project
import pytest
from fake_evaluation import FakeEvaluation

from components.data.shards import DataError
from components.training import Diverged
from limpid.__main__ import groups, main
from pipelines import __main__ as pipelines
from pipelines import layout
from pipelines.__main__ import names
from pipelines.commands import scores
from pipelines.errors import ConfigError, Failed
from pipelines.runner.command_line import STAGES, folder, options_of, parse
from pipelines.tasks import metrics

ROOT = project.ROOT
GROUPS = groups()
EVERY = [(group, name) for group in GROUPS for name in names(group)]
WITH_OPTIONS = [n for n in names(STAGES) if n not in ("selftest", "verdict")]
HEAVY = ("torch", "ray", "mlflow", "dvc", "numpy", "pyarrow", "pydantic", "rich")
IMPORTED = """
import sys
from limpid.__main__ import main
assert main([]) == 0
print(*{name.partition(".")[0] for name in sys.modules}, file=sys.stderr)
"""
# What no help, `limpid scores` or `limpid doctor` may import: each takes a large part of a second,
# and torch takes several.
SLOW = ("torch", "ray", "mlflow", "dvc", "pandas", "sklearn", "torchattacks", "optuna")
LIGHT = """
import json, sys
from limpid.__main__ import main
imported = {}
commands, slow = map(json.loads, sys.argv[1:])
for words in commands:
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    found = [name for name in slow if name in sys.modules]
    imported[" ".join(words)] = [code, found]
print(json.dumps(imported), file=sys.stderr)
"""


def limpid(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script that dvc.yaml runs."""
    return subprocess.run(
        ["/bin/sh", "pipelines/limpid", *words], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip


def python_on_path(folder: Path, command: str) -> str:
    """Put a program called `python` into a folder; return a PATH with nothing else."""
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    program.chmod(0o755)
    return str(folder)


def test_the_overview_has_one_line_for_each_stage_and_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["help"]) == 0
    overview = capsys.readouterr().out
    _, *texts = re.split(
        "|".join(f"\n{re.escape(title)}:\n" for title in GROUPS.values()), overview
    )
    for group, text in zip(GROUPS, texts, strict=True):
        lines = re.findall(r"^  (\w+) +(.+)$", text, re.MULTILINE)
        assert [name for name, _ in lines] == names(group)
        for name, summary in lines:
            source = (folder(group) / f"{name}.py").read_text()
            assert (ast.get_docstring(ast.parse(source)) or "").startswith(summary)
    assert main([]) == 0 and capsys.readouterr().out == overview


@pytest.mark.parametrize(("group", "name"), EVERY)
def test_the_first_line_of_every_docstring_is_a_short_summary(group: str, name: str) -> None:
    source = (folder(group) / f"{name}.py").read_text()
    summary = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    assert 0 < len(summary) <= 75 and summary.endswith("."), summary


def test_the_overview_is_quick_and_imports_nothing_heavy() -> None:
    def seconds() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = seconds()
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert seconds() - before < 0.2
    assert not set(done.stderr.split()) & set(HEAVY)


def imported_by(*commands: Sequence[str], folder: Path = ROOT) -> dict[str, tuple[int, list[str]]]:
    """Run some commands one after the other, in one new process; return their codes and imports."""
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, json.dumps(commands), json.dumps(SLOW)],
        cwd=folder, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    found: dict[str, tuple[int, list[str]]] = json.loads(done.stderr.splitlines()[-1])
    return found


def test_no_help_imports_what_is_slow() -> None:
    """A stage that has not the words it needs is refused as fast."""
    found = imported_by(*([name, "--help"] for _, name in EVERY), ["generate_baseline", "koo"])
    assert len(found) == len(EVERY) + 1
    assert found.pop("generate_baseline koo") == [2, []]
    assert found == {f"{name} --help": [0, []] for _, name in EVERY}


def test_scores_doctor_and_what_they_refuse_import_nothing_slow(tmp_path: Path) -> None:
    metrics.write(tmp_path / "reports/metrics.json", FakeEvaluation(tmp_path / "made").metrics)
    found = imported_by(["scores"], ["scores", "--metrics", "none"], ["doctor"], folder=tmp_path)
    assert found == {"scores": [0, []], "scores --metrics none": [2, []], "doctor": [0, []]}


@pytest.mark.parametrize("name", names(STAGES))
def test_the_options_that_are_read_are_those_of_the_signature(name: str) -> None:
    module = importlib.import_module(f"pipelines.stages.{name}")
    run = getattr(module, "run", None)
    keywords = inspect.signature(run).parameters.values() if run else []
    expected = [one.name for one in keywords if one.kind is inspect.Parameter.KEYWORD_ONLY]
    assert options_of(name) == (expected if run else None)


def test_the_version_is_that_of_the_project(capsys: pytest.CaptureFixture[str]) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert main(["--version"]) == 0
    assert capsys.readouterr().out in (
        f"limpid {version}\n", "limpid of this folder (not installed)\n"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "hint"),
    [("evalute", "did you mean evaluate?"), ("xyz", "`limpid help` lists all")],
)
def test_an_unknown_name_ends_with_2_and_the_nearest_name(
    name: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: there is no stage or command {name}") and hint in said
    assert said.count("\n") == 1


def test_the_code_of_another_checkout_is_not_run_in_a_folder_with_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines/__main__.py").touch()
    monkeypatch.chdir(tmp_path)
    for run, program in ((main, "limpid"), (pipelines.main, "pipelines")):
        assert run(["doctor"]) == 4
        printed = capsys.readouterr().err
        assert f"is that of {ROOT}; run `python -m {program} doctor` here" in printed


def test_the_pipelines_alone_know_nothing_of_what_stands_above_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert pipelines.main(["help"]) == 0
    assert "attack" not in capsys.readouterr().out
    assert pipelines.main(["attack"]) == 2


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_the_options_of_a_stage_default_to_the_table_of_paths(name: str) -> None:
    table = {option: path.format(name="koo") for option, path in layout.STAGES[name].items()}
    extra = {
        "import_model": ["--code=a.py", "--weights=a.safetensors"],
        "distill_purifier": ["--first-teacher=models/a", "--last-teacher=models/b"],
        "finetune_atop": ["--base=models/a"],
        "generate_baseline": ["--classifier=models/a"],
        "generate_controls": ["--classifier=models/a"],
        "generate_adversarial": ["--classifier=models/a", "--purifier=models/b"],
    }.get(name, [])
    instance = ["koo"] if "{name}" in "".join(layout.STAGES[name].values()) else []
    options = parse(name, [*instance, *extra])
    assert {option: options[option] for option in table} == table
    assert options.get("name") == (instance[0] if instance else None)
    # A path that is given stays as it is, whatever it is called.
    (option, *_) = table
    given = parse(name, [*instance, *extra, f"--{option.replace('_', '-')}=a/{{name}}"])
    assert given == {**options, option: "a/{name}"}


def test_a_stage_without_the_model_it_is_about_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["generate_baseline", "koo"])
    said = capsys.readouterr().err
    assert "limpid generate_baseline: error" in said and "--classifier" in said


def test_help_for_a_stage_shows_where_its_paths_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["train_classifier", "--help"])
    printed = capsys.readouterr().out
    assert printed.startswith("usage: limpid train_classifier")
    assert "by default models/{name}" in printed


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (ConfigError("no such key"), 2, "no such key"),
        (ValueError("no such key"), 2, "no such key"),
        (DataError("a file is damaged"), 3, "a file is damaged"),
        (FileNotFoundError(2, "No such file", "a"), 4, "FileNotFoundError: [Errno 2] No such file"),
        (MemoryError("too large"), 4, "MemoryError: too large"),
        (Failed(5, "a check failed"), 5, "a check failed"),
        (Diverged("the loss is nan"), 5, "the loss is nan"),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on from where it was"),
        (RuntimeError("odd\nand long"), 4, "RuntimeError: odd (all of it in .limpid/last_error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_command_ends_with_one_sentence_and_the_code_of_its_error(
    error: BaseException,
    code: int,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(words: Sequence[str]) -> int:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scores, "main", failing)
    assert main(["scores"]) == code
    said = capsys.readouterr().err
    assert said.startswith(f"error: {sentence}") and said.count("\n") == 1
    # Only what was not foreseen leaves its traceback.
    kept = tmp_path / ".limpid/last_error.txt"
    assert kept.exists() == isinstance(error, RuntimeError)
    assert not kept.exists() or "in failing" in kept.read_text()


def test_an_unforeseen_error_is_reported_where_no_file_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(words: Sequence[str]) -> int:
        raise RuntimeError("odd")

    monkeypatch.chdir(tmp_path)
    (tmp_path / ".limpid").write_text("a file in place of the folder")
    monkeypatch.setattr(scores, "main", failing)
    assert main(["scores"]) == 4
    assert "error: RuntimeError: odd (its traceback is lost: " in capsys.readouterr().err


def test_a_plugin_that_cannot_be_used_ends_a_stage_and_a_command_in_one_sentence(
    tmp_path: Path,
) -> None:
    about = tmp_path / "broken.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[limpid.attacks]\nworst = absent:Worst\n")
    for words in (["configure", "digits"], ["train_purifier", "koo"]):
        code, printed = project.run(
            tmp_path, sys.executable, "-m", "pipelines", *words,
            PYTHONPATH=os.pathsep.join([str(ROOT), str(tmp_path)]),
        )  # fmt: skip
        assert code == 4
        assert printed == (
            "error: the plugin broken (limpid.attacks: worst) cannot be imported, "
            "ModuleNotFoundError: No module named 'absent'; repair it, or uninstall it\n"
        )
    assert not (tmp_path / "params.yaml").exists()


def test_an_interruption_while_packages_are_imported_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", interrupted)
    assert main(["scores"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


# A Python that is not the one Limpid is installed for


def test_no_python_on_the_path_is_one_sentence(tmp_path: Path) -> None:
    for path in ("", str(tmp_path)):
        done = limpid("doctor", PATH=path)
        assert done.returncode == 4 and done.stdout == ""
        assert done.stderr.startswith("error: no python on PATH; activate the environment")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["train_classifier", "verdict", "doctor"])
def test_a_python_without_our_packages_is_one_sentence(name: str, tmp_path: Path) -> None:
    path = python_on_path(tmp_path, f"{sys.executable} -S")
    done = limpid(name, PATH=path)
    assert done.returncode == 4 and done.stdout == ""
    assert " lacks the package " in done.stderr and "activate the environment" in done.stderr
    assert done.stderr.count("\n") == 1
    # The overview needs none of them.
    assert limpid("help", PATH=path).returncode == 0


@pytest.mark.parametrize("version", [(2, 7, 18), (3, 10, 13), (3, 14, 0)])
def test_a_python_of_another_version_is_one_sentence(
    version: tuple[int, int, int], tmp_path: Path
) -> None:
    (tmp_path / "pretend.py").write_text(f"import sys\nsys.version_info = {version}\n")
    pretend = f"{sys.executable} -c 'import runpy, pretend; runpy.run_module(\"pipelines\")'"
    path = python_on_path(tmp_path, pretend)
    done = limpid("doctor", PATH=path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 4 and done.stdout == ""
    assert done.stderr.startswith("error: Limpid needs Python 3.11 to 3.13, and ")
    assert done.stderr.count("\n") == 1


def test_the_versions_in_that_sentence_are_those_of_the_project() -> None:
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert about["requires-python"] == ">=3.11,<3.14"
    # What an old Python reads before it is refused has nothing newer than it.
    ast.parse((ROOT / "pipelines/__init__.py").read_text(), feature_version=(3, 4))


def test_dvc_repro_outside_of_the_environment_says_what_to_activate(tmp_path: Path) -> None:
    folder = project.copy_to(tmp_path / "project")
    dvc = str(Path(sys.executable).with_name("dvc"))
    bare = tmp_path / "bin"
    bare.mkdir()
    code, printed = project.run(folder, dvc, "repro", "prepare_data", PATH=str(bare))
    assert code == 255, printed
    assert "error: no python on PATH; activate the environment" in printed
    path = python_on_path(bare, f"{sys.executable} -S")
    code, printed = project.run(folder, dvc, "repro", "prepare_data", PATH=path)
    assert code == 255, printed
    assert " lacks the package " in printed and "Traceback" not in printed
