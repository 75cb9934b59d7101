"""Stages that are killed or interrupted: what they leave behind, and how they resume."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import project
import psutil
import pytest

from components.data.shards import sha256
from pipelines import layout

TRAIN = {option: layout.STAGES["train_classifier"][option] for option in ("train", "val")}


@pytest.fixture
def trained(reproduced: Path, tmp_path: Path) -> Path:
    """A project with data, whose standard classifier takes long enough to be killed."""
    folder = project.copy_to(tmp_path / "project")
    os.symlink(reproduced / "data", folder / "data")
    params = project.tiny()
    params["classifiers"]["standard"]["training"]["epochs"] = 60
    project.write_params(folder, params)
    return folder


def test_a_killed_training_resumes_and_ends_with_the_same_weights(trained: Path) -> None:
    code, printed = project.stage(
        trained, "train_classifier", name="standard", out="undisturbed", **TRAIN
    )
    assert code == 0, printed
    arguments = [f"--{k}={v}" for k, v in TRAIN.items()]
    command = [
        sys.executable, "-m", "pipelines", "train_classifier", "--name=standard", *arguments
    ]  # fmt: skip
    process = project.start(trained, *command, "--out=killed")
    wait_for(trained, "epoch-000005")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (trained / "killed").exists()
    kept = trained.glob(".limpid/work/*/states/epoch-*/manifest.json")
    newest = max(int(path.parent.name[-6:]) for path in kept)
    assert 5 <= newest < 59
    # Other parameters are another training, which does not use these checkpoints.
    params = project.tiny()
    params["classifiers"]["standard"]["training"]["epochs"] = 3
    project.write_params(trained, params)
    code, printed = project.run(trained, *command, "--out=other")
    assert code == 0 and "goes on" not in printed, printed
    assert len(json.loads((trained / "other/history.json").read_text())) == 3
    params["classifiers"]["standard"]["training"]["epochs"] = 60
    project.write_params(trained, params)
    code, printed = project.run(trained, *command, "--out=killed")
    assert code == 0 and f"goes on after epoch {newest + 1}" in printed, printed
    same = [sha256(trained / name / "weights.safetensors") for name in ("killed", "undisturbed")]
    assert same[0] == same[1]
    assert len(json.loads((trained / "killed/history.json").read_text())) == 60


def test_an_interrupted_training_exits_130_and_leaves_no_partial_output(trained: Path) -> None:
    arguments = [f"--{k}={v}" for k, v in TRAIN.items()]
    process = project.start(
        trained, sys.executable, "-m", "pipelines", "train_classifier", "--name=standard",
        *arguments, "--out=out",
    )  # fmt: skip
    wait_for(trained, "epoch-000003")
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 130, printed
    assert "interrupted" in printed
    assert "Traceback" not in printed
    assert not (trained / "out").exists()


def wait_for(folder: Path, name: str) -> None:
    deadline = time.monotonic() + 60
    while not list(folder.glob(f".limpid/work/*/states/{name}/manifest.json")):
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.05)


def test_an_interruption_ends_a_stage_during_a_long_task(reproduced: Path, tmp_path: Path) -> None:
    folder = project.copy_to(tmp_path / "long")
    for name in ("data", "models"):
        os.symlink(reproduced / name, folder / name)
    params = project.tiny()
    params["attacks"]["pgd"]["steps"] = 1_000_000
    params["defenses"]["atop"]["ladder"] = {"full": ["pgd"]}
    project.write_params(folder, params)
    process = project.start(
        folder, sys.executable, "-m", "pipelines", "generate_adversarial", "--name=atop",
        "--test=data/test", "--classifier=models/standard", "--purifier=models/atop", "--out=out",
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while not any("craft_shard" in name for name in children_of(process.pid)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 130, printed
    assert "interrupted" in printed and not (folder / "out").exists()


def children_of(pid: int) -> list[str]:
    """Return the names of all processes that a process has started."""
    return [child.name() for child in psutil.Process(pid).children(recursive=True)]
