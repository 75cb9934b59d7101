"""A search as a user runs it: killed, resumed, and its values adopted."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import project
import pytest
from ruamel.yaml import YAML

from pipelines.config.search_space import get
from pipelines.tasks.trial import ROBUST

STUDENT = "students.student_adaptive"


@pytest.fixture
def project_without_test(reproduced: Path, tmp_path: Path) -> Path:
    """A trained project whose test split is gone, with one short study."""
    names = ("data/train", "data/val", "models", "pool")
    folder = project.copy_with(reproduced, tmp_path / "search", *names)
    changed = project.tiny()
    changed["resources"]["trials"]["workers"] = 1
    training = changed["students"]["student_adaptive"]["training"]
    changed["students"]["student_adaptive"]["training"] = {**training, "epochs": 2}
    project.write_params(folder, changed)
    return folder


def read_params(folder: Path) -> dict:
    read: dict = YAML(typ="safe", pure=True).load((folder / "params.yaml").read_text())
    return read


def results(folder: Path) -> dict[str, list[dict]]:
    found = {}
    for path in folder.glob(".limpid/work/tune-student-*/ray/study/*/result.json"):
        lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True)]
        found[path.parent.name] = lines
    return found


def ended(folder: Path) -> set[str]:
    return {name for name, lines in results(folder).items() if any("right" in r for r in lines)}


@pytest.mark.parametrize(
    ("count", "train_workers"),
    [(2, 0), pytest.param(3, 1, marks=pytest.mark.slow)],
    ids=["alone", "side by side"],
)
def test_a_killed_search_continues_and_its_best_values_are_adopted(
    project_without_test: Path, count: int, train_workers: int
) -> None:
    folder = project_without_test
    changed = read_params(folder)
    changed["tuning"]["studies"]["student"]["trials"] = count
    project.write_params(folder, changed)
    command = [sys.executable, "-m", "pipelines", "tune", "student"]
    first = project.start(folder, *command)
    until = time.monotonic() + 300
    while not ended(folder):
        assert first.poll() is None and time.monotonic() < until, first.communicate()[0]
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    done = ended(folder)
    # Two trials side by side, each a Ray Train run of its own: two CPUs must be enough for that.
    changed["resources"]["trials"]["workers"] = 2
    changed["resources"]["train"]["workers"] = train_workers
    project.write_params(folder, changed)
    code, printed = project.run(folder, *command)
    assert code == 0, printed
    out = folder / "reports/tuning/student"
    trials = json.loads((out / "trials.json").read_text())
    assert len(trials) == count
    names = {t["name"] for t in trials}
    assert all(any(name in path for name in names) for path in done), "a search of its own"
    assert "tied for best" in printed and "robust (upper bound), 95 %" in printed
    assert {path.name for path in out.iterdir()} == {"best.yaml", "trials.json"}
    now = {f"{STUDENT}.objective.beta": 0.5, f"{STUDENT}.objective.gamma": 0.5}
    assert any(now.items() <= t["values"].items() for t in trials), (
        "the present values were not tried"
    )
    assert trials[0]["figures"][ROBUST] == max(t["figures"][ROBUST] for t in trials if t["right"])
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("limpid-digits").experiment_id
    runs = client.search_runs([experiment])
    nested = {run.info.run_name: run for run in runs if "mlflow.parentRunId" in run.data.tags}
    assert names <= set(nested)
    for trial in trials:
        run = nested[trial["name"]].data
        assert run.params == {key: str(value) for key, value in trial["values"].items()}
        assert run.metrics[ROBUST] == pytest.approx(trial["figures"][ROBUST])
    code, printed = project.run(
        folder,
        sys.executable,
        "-m",
        "pipelines",
        "configure",
        "--from",
        str(out / "best.yaml"),
    )
    assert code == 0, printed
    adopted = read_params(folder)
    for key, value in trials[0]["values"].items():
        assert get(adopted, key) == value


@pytest.mark.parametrize("words", [[], ["nobody"]])
def test_tune_without_or_with_an_unknown_study_lists_the_studies(
    tmp_path: Path, words: list[str]
) -> None:
    folder = project.copy_to(tmp_path / "none")
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "tune", *words],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "tuning.studies" in done.stderr
    assert done.stderr.endswith("there are atop, student\n")
