"""dvc.yaml is held to the code: commands, deps, outs, params and code deps of every stage."""

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

from pipelines.config.schema import Params
from pipelines.config.search_space import get
from pipelines.runner.provenance import code_digests, code_of, stage_key

ROOT = project.ROOT
STAGES = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"]
RAY_STAGES = [name for name in STAGES if name not in ("verdict", "selftest")]
TRAINING = [
    name for name in STAGES if name.startswith(("train", "distill", "finetune", "craft", "tune"))
]


def definition(name: str) -> dict:
    return STAGES[name].get("do", STAGES[name])


def options(name: str) -> dict[str, str]:
    words = definition(name)["cmd"].split()
    assert words[:4] == ["exec", "python", "-m", f"pipelines.{name}"]
    return {
        k.removeprefix("--").replace("-", "_"): v
        for k, v in zip(words[4::2], words[5::2], strict=True)
    }


def outs(name: str) -> set[str]:
    stage = definition(name)
    return {
        out if isinstance(out, str) else next(iter(out))
        for key in ("outs", "metrics")
        for out in stage.get(key, [])
    }


def is_code(dep: str) -> bool:
    return dep.startswith(("components", "pipelines"))


@pytest.mark.parametrize("name", RAY_STAGES)
def test_the_paths_in_a_command_are_its_deps_and_outs(name: str) -> None:
    paths = {key: value for key, value in options(name).items() if key != "name"}
    written = {value for key, value in paths.items() if key.startswith("out")}
    assert written == outs(name)
    data_deps = {dep for dep in definition(name).get("deps", []) if not is_code(dep)}
    assert set(paths.values()) - written == data_deps


@pytest.mark.parametrize("name", RAY_STAGES)
def test_a_command_fits_the_signature_it_calls(name: str) -> None:
    run = importlib.import_module(f"pipelines.stages.{name}").run
    keywords = {
        parameter.name
        for parameter in inspect.signature(run).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    assert set(options(name)) == keywords


@pytest.mark.parametrize("name", RAY_STAGES)
def test_what_a_stage_sees_is_what_its_job_sees(name: str) -> None:
    """As JSON it is named by the key of the stage, and gets to the cluster."""
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


@pytest.mark.parametrize("name", RAY_STAGES)
def test_a_stage_tracks_the_params_it_sees(name: str) -> None:
    run = importlib.import_module(f"pipelines.stages.{name}").run
    view = get_type_hints(run)["params"]
    instance = "${item}" if "${item}" in definition(name)["cmd"] else "${key}"
    seen = {key.replace("{name}", instance) for key in view.tracks.values()}
    assert set(definition(name)["params"]) == seen
    assert set(view.model_fields) == set(view.tracks)


@pytest.mark.parametrize("name", RAY_STAGES)
def test_a_stage_depends_on_exactly_the_code_its_result_does(name: str) -> None:
    listed: set[str] = set()
    for dep in filter(is_code, definition(name)["deps"]):
        path = ROOT / dep
        files = path.rglob("*.py") if path.is_dir() else [path]
        listed |= {str(file.relative_to(ROOT)) for file in files}
    module = importlib.import_module(f"pipelines.stages.{name}")
    needed = {str(path) for path in code_of(module)}
    assert needed - listed == set(), "not tracked"
    assert {path for path in listed - needed if path.endswith(".py")} == set(), "not needed"


@pytest.mark.parametrize("name", RAY_STAGES)
def test_a_stage_says_whether_it_maps(name: str) -> None:
    """Else a job sends for no workers ahead, or for some that nobody needs."""
    module = importlib.import_module(f"pipelines.stages.{name}")
    crafts = Path("pipelines/crafting.py") in code_of(module)
    # Those of a search are its trials.
    assert getattr(module, "MAPS", False) == (crafts and name != "tune")


def test_a_job_sends_for_workers_before_it_imports_torch() -> None:
    code = "import sys, pipelines.ahead; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_key_names_all_that_a_result_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("pipelines.stages.train_classifier")
    view_type = get_type_hints(module.run)["params"]

    def key(inputs: str = "a", **changes: object) -> str:
        view = view_type.of(Params.model_validate({**project.base(), **changes}), "standard")
        return stage_key(module, view, {"train": inputs})

    keys = {key(), key("b"), key(seed=7)}
    # No result depends on who computes it.
    other = {**project.base()["resources"], "shards": {"workers": 7, "cpus": 1, "gpus": 0}}
    assert len(keys) == 3 and key(resources=other) == key()
    monkeypatch.setattr("torch.__version__", "1.0")
    keys.add(key())
    monkeypatch.undo()
    digests = code_digests(module)
    changed = {**digests, next(iter(digests)): "0"}
    monkeypatch.setattr("pipelines.runner.stage.code_digests", lambda _: changed)
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


@pytest.mark.parametrize(
    ("file", "planted"),
    [
        ("components/data.py", "import mlflow"),
        ("components/data.py", "from components import training"),
        ("components/draws.py", "from components import defense"),
        ("pipelines/params.py", "from pipelines import stage"),
        ("pipelines/evaluate.py", "from pipelines import train_purifier"),
        ("pipelines/report.py", "import ray"),
        ("pipelines/trial.py", "import ray"),
        ("pipelines/candidates.py", "import mlflow"),
    ],
)
def test_a_planted_import_turns_the_contracts_red(tmp_path: Path, file: str, planted: str) -> None:
    for name in ("components", "pipelines"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    if file == "components/data.py" and planted == "import mlflow":
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
    path = tmp_path / file
    path.write_text(path.read_text() + f"\n\ndef planted():\n    {planted}\n")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout
    assert "BROKEN" in done.stdout
