"""dvc.yaml agrees with the code: command, deps, outs, params and code deps of every stage."""

import ast
import importlib
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import project
import pytest
from ruamel.yaml import YAML

from pipelines import layout
from pipelines.config.schema import Params
from pipelines.config.search_space import get
from pipelines.runner.provenance import code_digests, code_of, stage_key

ROOT = project.ROOT
STAGES = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"]
# These have a command line of their own, and no key.
OWN_MAIN = ("verdict", "selftest")
WITH_KEY = [name for name in STAGES if name not in OWN_MAIN]
TRAINING = [
    name for name in STAGES if name.startswith(("train", "distill", "finetune", "craft", "tune"))
]


def definition(name: str) -> dict:
    return STAGES[name].get("do", STAGES[name])


def options(name: str) -> dict[str, str]:
    """Return the options of a stage: the table of paths, and the words of its command."""
    words = definition(name)["cmd"].split()
    assert words[:3] == ["exec", "pipelines/limpid", name]
    instance = "${item}" if "${item}" in words else "${key}"
    table = {key: path.replace("{name}", instance) for key, path in layout.STAGES[name].items()}
    given = zip(words[3::2], words[4::2], strict=True)
    return table | {key.removeprefix("--").replace("-", "_"): value for key, value in given}


def outs(name: str) -> set[str]:
    stage = definition(name)
    return {
        out if isinstance(out, str) else next(iter(out))
        for key in ("outs", "metrics")
        for out in stage.get(key, [])
    }


def is_code(dep: str) -> bool:
    return dep.startswith(("components", "pipelines"))


@pytest.mark.parametrize("name", WITH_KEY)
def test_the_paths_in_a_command_are_its_deps_and_outs(name: str) -> None:
    paths = {key: value for key, value in options(name).items() if key != "name"}
    written = {value for key, value in paths.items() if key.startswith("out")}
    assert written == outs(name)
    data_deps = {dep for dep in definition(name).get("deps", []) if not is_code(dep)}
    assert set(paths.values()) - written == data_deps


@pytest.mark.parametrize("name", WITH_KEY)
def test_a_command_fits_the_signature_it_calls(name: str) -> None:
    run = importlib.import_module(f"pipelines.stages.{name}").run
    keywords = {
        parameter.name
        for parameter in inspect.signature(run).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    assert set(options(name)) == keywords


@pytest.mark.parametrize("name", WITH_KEY)
def test_a_job_sees_the_parameters_of_its_stage(name: str) -> None:
    """They travel as JSON."""
    view = get_type_hints(importlib.import_module(f"pipelines.stages.{name}").run)["params"]
    document = project.tiny()
    section = STAGES[name].get("foreach", "").strip("${}")
    section = {"tuning.run": "tuning.studies"}.get(section, section)
    params = Params.model_validate(document)
    for instance in get(document, section) if section else [None]:
        here = view.of(params, instance)
        there = view.model_validate_json(json.dumps(here.model_dump(mode="json", by_alias=True)))
        for field in view.model_fields:
            assert getattr(there, field) == getattr(here, field), f"{instance}: {field}"


@pytest.mark.parametrize("name", WITH_KEY)
def test_a_stage_tracks_the_params_it_sees(name: str) -> None:
    run = importlib.import_module(f"pipelines.stages.{name}").run
    view = get_type_hints(run)["params"]
    instance = "${item}" if "${item}" in definition(name)["cmd"] else "${key}"
    seen = {key.replace("{name}", instance) for key in view.tracks.values()}
    assert set(definition(name)["params"]) == seen
    assert set(view.model_fields) == set(view.tracks)


def files_under(dep: str) -> set[str]:
    path = ROOT / dep
    files = path.rglob("*.py") if path.is_dir() else [path]
    return {str(file.relative_to(ROOT)) for file in files}


@pytest.mark.parametrize("name", STAGES)
def test_code_deps_cover_the_import_closure_and_nothing_else(name: str) -> None:
    listed = {dep: files_under(dep) for dep in filter(is_code, definition(name)["deps"])}
    needed = {str(path) for path in code_of(importlib.import_module(f"pipelines.stages.{name}"))}
    assert needed - set().union(*listed.values()) == set(), "not tracked"
    assert [dep for dep, files in listed.items() if not files & needed] == [], "not needed"


@pytest.mark.parametrize("name", TRAINING)
def test_a_training_does_not_depend_on_checks_and_reports(name: str) -> None:
    if name == "tune":  # It ranks what it trains.
        return
    deps = list(filter(is_code, definition(name)["deps"]))
    counts = ("components/probes", "components/checks", "components/evaluation")
    assert not [dep for dep in deps if dep.startswith((*counts, "pipelines/reporting"))]


def test_packages_of_pipelines_have_only_a_docstring_in_their_init() -> None:
    """The import closure leaves them out."""
    for path in (ROOT / "pipelines").glob("*/__init__.py"):
        assert len(ast.parse(path.read_text()).body) <= 1, path


def test_the_table_of_paths_lists_the_stages_in_their_order() -> None:
    assert list(layout.STAGES) == list(STAGES)


def test_a_key_changes_with_all_that_a_result_depends_on_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = importlib.import_module("pipelines.stages.train_classifier")
    view_type = get_type_hints(module.run)["params"]

    def key(inputs: str = "a", **changes: object) -> str:
        view = view_type.of(Params.model_validate({**project.base(), **changes}), "standard")
        return stage_key(module, view, {"train": inputs})

    keys = {key(), key("b"), key(seed=7)}
    # No result depends on the resources.
    other = {**project.base()["resources"], "shards": {"workers": 7, "cpus": 1, "gpus": 0}}
    assert len(keys) == 3 and key(resources=other) == key()
    monkeypatch.setattr("torch.__version__", "1.0")
    keys.add(key())
    monkeypatch.undo()
    digests = code_digests(module)
    changed = {**digests, next(iter(digests)): "0"}
    monkeypatch.setattr("pipelines.runner.provenance.code_digests", lambda _: changed)
    keys.add(key())
    assert len(keys) == 5


@pytest.mark.parametrize("name", TRAINING)
def test_training_never_sees_the_test_split(name: str) -> None:
    stage = definition(name)
    assert not any("data/test" in dep for dep in stage["deps"])
    assert "data/test" not in stage["cmd"]


def test_data_travels_one_way() -> None:
    order = list(STAGES)
    made: dict[str, int] = {}
    for index, name in enumerate(order):
        for dep in definition(name).get("deps", []):
            for out, maker in made.items():
                if dep == out or out.startswith(f"{dep}/"):
                    assert maker <= index
        for out in outs(name):
            made[out.split("/${")[0]] = index


def test_dvc_knows_the_teachers_of_every_student(tmp_path: Path) -> None:
    """One teacher is the first and the last in dvc.yaml, which is one arrow of DVC's graph."""
    folder = project.copy_to(tmp_path / "project")
    params = project.tiny()
    params["students"]["of_one"] = {**params["students"]["student_grey"], "teachers": ["masked"]}
    project.write_params(folder, params)
    code, printed = project.run(folder, "dvc", "dag", "--dot")
    assert code == 0, printed
    arrows = [line.strip().rstrip(";") for line in printed.splitlines() if "->" in line]
    for student, section in params["students"].items():
        end = f'-> "distill_purifier@{student}"'
        made_by = [arrow for arrow in arrows if arrow.endswith(end) and "train_purifier" in arrow]
        wanted = [f'"train_purifier@{teacher}" {end}' for teacher in section["teachers"]]
        assert sorted(made_by) == sorted(wanted)


PLANTED = [
    ("components/data/image_set.py", "import mlflow", "components knows no Ray"),
    ("components/attacks/apgd.py", "import ray", "components knows no Ray"),
    (
        "components/data/image_set.py",
        "from components.training import loop",
        "floors of components",
    ),
    ("components/data/draws.py", "from components.models import defense", "floors of components"),
    ("pipelines/config/schema.py", "from pipelines.runner import stage", "floors of pipelines"),
    (
        "pipelines/tasks/crafting.py",
        "from pipelines.reporting import report",
        "floors of pipelines",
    ),
    ("pipelines/stages/evaluate.py", "from pipelines.stages import tune", "stages never import"),
    ("pipelines/reporting/report.py", "import ray", "Ray is known"),
    ("pipelines/tasks/trial.py", "import ray", "Ray is known"),
    ("pipelines/runner/context.py", "import ray", "Ray is known"),
    ("pipelines/stages/evaluate.py", "import ray", "Ray is known"),
    ("pipelines/reporting/registration.py", "import mlflow", "MLflow is known"),
    ("pipelines/commands/promote.py", "import mlflow", "MLflow is known"),
]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("house")
    for name in ("components", "pipelines"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copyfile(ROOT / "pyproject.toml", folder / "pyproject.toml")
    return folder


def lint(folder: Path) -> tuple[int, str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


def test_the_contracts_hold(house: Path) -> None:
    code, printed = lint(house)
    assert code == 0, printed


@pytest.mark.parametrize(("file", "planted", "contract"), PLANTED)
def test_a_planted_import_turns_its_contract_red(
    house: Path, file: str, planted: str, contract: str
) -> None:
    path = house / file
    before = path.read_text()
    path.write_text(before + f"\n\ndef planted():\n    {planted}\n")
    try:
        code, printed = lint(house)
    finally:
        path.write_text(before)
    assert code == 1, printed
    assert any(contract in line and "BROKEN" in line for line in printed.splitlines())
