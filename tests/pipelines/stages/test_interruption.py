"""Stages that are killed or interrupted: what they leave behind, and how they resume."""

import json
import signal
import sys
import time
from pathlib import Path

import project
import psutil

from components.data.shards import sha256
from pipelines import layout

TRAIN = {option: layout.STAGES["train_classifier"][option] for option in ("train", "val")}


COMMAND = [
    sys.executable, "-m", "pipelines", "train_classifier", "--name=standard",
    *(f"--{option}={path}" for option, path in TRAIN.items()),
]  # fmt: skip
# Kills the stage and its uploader in the middle of the seventh checkpoint.
KILLING = """
import os, signal, sys

def kill(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith("epoch-000006/manifest.json"):
        os.killpg(0, signal.SIGKILL)

sys.addaudithook(kill)
"""


def with_epochs(epochs: int) -> dict:
    """Return parameters with so many epochs for the standard classifier."""
    params = project.tiny()
    params["classifiers"]["standard"]["training"]["epochs"] = epochs
    return params


def test_a_killed_training_resumes_and_ends_with_the_same_weights(
    reproduced: Path, tmp_path: Path
) -> None:
    folder, known = tmp_path / "project", reproduced / "models/standard"
    project.copy_with(reproduced, folder, "data")
    (folder / "sitecustomize.py").write_text(KILLING)
    code, printed = project.run(folder, *COMMAND, "--out=killed")
    assert code == -signal.SIGKILL, printed
    assert not (folder / "killed").exists()
    kept = folder.glob(".limpid/work/*/states/epoch-*/manifest.json")
    assert max(path.parent.name for path in kept) == "epoch-000005"
    (folder / "sitecustomize.py").unlink()
    # Other parameters are another training, which does not use these checkpoints.
    project.write_params(folder, with_epochs(3))
    code, printed = project.run(folder, *COMMAND, "--out=other")
    assert code == 0 and "goes on" not in printed, printed
    assert len(json.loads((folder / "other/history.json").read_text())) == 3
    project.write_params(folder, project.tiny())
    code, printed = project.run(folder, *COMMAND, "--out=killed")
    assert code == 0 and "goes on after epoch 6" in printed, printed
    for name in ("weights.safetensors", "history.json"):
        assert sha256(folder / "killed" / name) == sha256(known / name)
    assert len(json.loads((folder / "killed/history.json").read_text())) == 8


def test_an_interrupted_training_exits_130_and_leaves_no_partial_output(
    reproduced: Path, tmp_path: Path
) -> None:
    folder = project.copy_with(reproduced, tmp_path / "project", "data")
    project.write_params(folder, with_epochs(600))
    process = project.start(folder, *COMMAND, "--out=out")
    project.until(lambda: any(folder.glob(".limpid/work/*/states/epoch-000003/manifest.json")))
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 130, printed
    assert "interrupted" in printed
    assert "Traceback" not in printed
    assert not (folder / "out").exists()


def test_an_interruption_ends_a_stage_during_a_long_task(reproduced: Path, tmp_path: Path) -> None:
    folder = project.copy_with(reproduced, tmp_path / "long", "data", "models")
    params = project.tiny()
    params["attacks"]["pgd"]["steps"] = 1_000_000
    params["defenses"]["atop"]["ladder"] = {"full": ["pgd"]}
    project.write_params(folder, params)
    project.resolve(folder)
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
