"""Processes that are killed or interrupted, run out of memory, or run twice."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import project
import psutil
import pytest
import torch
import torch.distributed as dist
from project import descendants, resumed, until
from ruamel.yaml import YAML

from components.data.shards import sha256
from faults.conftest import STANDARD, states
from pipelines.cluster import trainer
from pipelines.config.resources import TrainingWorkers

pytestmark = pytest.mark.faults


def change(folder: Path, **sections: object) -> None:
    """Replace sections of params.yaml."""
    params = YAML(typ="safe", pure=True).load((folder / "params.yaml").read_text())
    project.write_params(folder, {**params, **sections})


def test_a_training_worker_that_is_killed_is_replaced(folder: Path, undisturbed: Path) -> None:
    params = project.tiny()
    params["resources"]["train"]["workers"] = 1
    change(folder, resources=params["resources"])
    process = project.start(folder, *STANDARD, "--out=out")
    until(lambda: len(states(folder)) >= 2 and descendants(process.pid, "RayTrainWorker"), 120)
    (worker,) = descendants(process.pid, "RayTrainWorker")
    worker.kill()
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and resumed(printed) >= 2, printed
    assert sha256(folder / "out/weights.safetensors") == sha256(undisturbed)


def test_a_crafting_worker_that_is_killed_is_replaced(folder: Path, reproduced: Path) -> None:
    os.symlink(reproduced / "models", folder / "models")
    command = ["python", "-m", "pipelines", "craft_training_set", "--train=data/train"]
    params = project.tiny()
    params["pool"]["attack"] = {**params["pool"]["attack"], "steps": 400}
    change(folder, pool=params["pool"])
    process = project.start(folder, *command, "--classifier=models/standard", "--out=first")
    until(lambda: descendants(process.pid, "craft_shard"), 120)
    descendants(process.pid, "craft_shard")[0].kill()
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    made = {path.name: sha256(path) for path in (folder / "first").iterdir()}
    for path in (folder / ".limpid/sets").glob("*/*"):
        path.unlink()
    code, printed = project.run(folder, *command, "--classifier=models/standard", "--out=second")
    assert code == 0, printed
    assert made == {path.name: sha256(path) for path in (folder / "second").iterdir()}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_death_of_dvc_ends_its_stage_and_the_next_dvc_resumes(
    folder: Path, undisturbed: Path, number: int
) -> None:
    command = ["dvc", "repro", "-s", "train_classifier@standard"]
    process = project.start(folder, *command)
    until(lambda: len(states(folder)) >= 2, 120)
    stages = descendants(process.pid, "train_classifier")
    assert stages
    os.kill(process.pid, number)
    process.wait()
    # At once, while the first stage is still ending.
    code, printed = project.run(folder, *command)
    assert code == 0 and resumed(printed) >= 2, printed
    ended, _ = process.communicate(timeout=60)
    assert "goes on from where it was" in ended and "done in" not in ended, ended
    assert not any(project.lives(stage) for stage in stages)
    assert sha256(folder / "models/standard/weights.safetensors") == sha256(undisturbed)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_interruption_keeps_the_finished_epochs_and_leaves_no_process(
    folder: Path, undisturbed: Path, workers: int
) -> None:
    process, children = training(folder, workers)
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=20)
    assert process.returncode == 130 and "goes on from where it was" in printed, printed
    until(lambda: not any(project.lives(child) for child in children), 15)
    code, printed = project.run(folder, *STANDARD, "--out=out")
    assert code == 0 and resumed(printed) >= 2, printed
    assert sha256(folder / "out/weights.safetensors") == sha256(undisturbed)


@pytest.mark.parametrize("started", ["runtime_env/agent", "default_worker", "craft_shard"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_of_ray_outlives_its_stage(
    folder: Path, reproduced: Path, started: str, number: int
) -> None:
    os.symlink(reproduced / "models", folder / "models")
    command = ["python", "-m", "pipelines", "craft_training_set", "--train=data/train"]
    process = project.start(folder, *command, "--classifier=models/standard", "--out=out")
    until(lambda: descendants(process.pid, started), 120)
    children = descendants(process.pid, "")
    os.kill(process.pid, number)
    process.wait(60)
    until(lambda: not any(project.lives(child) for child in children), 15)
    printed, _ = process.communicate()
    # For a moment of its start, Ray leaves SIGTERM to the system.
    handled = {130} if started == "craft_shard" else {130, -number}
    assert process.returncode in ({-number} if number == signal.SIGKILL else handled), printed


def test_a_second_interruption_ends_the_stage_at_once(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        # After the first interruption the stage would wait four seconds for this server.
        server = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{mute.getsockname()[1]}"}
        server["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "300"
        process, children = training(folder, 0, **server)
        os.kill(process.pid, signal.SIGINT)
        time.sleep(1)
        os.kill(process.pid, signal.SIGINT)
        process.communicate(timeout=20)
        assert process.returncode == -signal.SIGINT
        assert not (folder / "out").exists()
        until(lambda: not any(project.lives(child) for child in children), 15)
    (spooled,) = (folder / ".limpid/spool").glob("*.jsonl")
    assert '"event": "end"' in spooled.read_text()


def training(
    folder: Path, workers: int, **environment: str
) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """Start a training; return it and its descendants once it has finished two epochs."""
    params = project.tiny()
    params["resources"]["train"]["workers"] = workers
    change(folder, resources=params["resources"])
    process = project.start(folder, *STANDARD, "--out=out", **environment)
    until(lambda: len(states(folder)) >= 2, 120)
    assert bool(descendants(process.pid, "RayTrainWorker")) == bool(workers)
    return process, descendants(process.pid, "")


def test_a_stage_that_runs_already_is_not_run_again(folder: Path) -> None:
    params = project.tiny()
    training = params["classifiers"]["standard"]["training"]
    params["classifiers"]["standard"]["training"] = {**training, "epochs": 100_000}
    change(folder, classifiers=params["classifiers"])
    first = project.start(folder, "dvc", "repro", "-s", "train_classifier@standard")
    until(lambda: len(states(folder)) >= 2, 120)
    code, printed = project.run(folder, "dvc", "repro", "-s", "train_classifier@standard")
    assert code != 0 and "is busy" in printed, printed
    code, printed = project.run(folder, *STANDARD, "--out=other")
    assert code == 4 and "is being run already, by process" in printed, printed
    reached = states(folder)[-1]
    until(lambda: states(folder)[-1] > reached, 20)
    os.killpg(first.pid, signal.SIGINT)
    first.communicate(timeout=60)


def test_a_crafting_worker_without_memory_is_named_and_not_retried_for_ever(
    folder: Path, reproduced: Path
) -> None:
    os.symlink(reproduced / "models", folder / "models")
    used = psutil.virtual_memory().percent / 100
    code, printed = project.run(
        folder, "python", "-m", "pipelines", "craft_training_set", "--train=data/train",
        "--classifier=models/standard", "--out=pool",
        RAY_memory_usage_threshold=f"{max(used - 0.02, 0.01):.2f}",
        RAY_memory_monitor_refresh_ms="50",
    )  # fmt: skip
    assert code == 4, printed
    assert "a worker ran out of memory; lower batch_size" in printed
    assert not (folder / "pool").exists()


def test_a_training_worker_without_memory_does_not_leave_the_others_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two workers raises the error of a full GPU while the other waits for it."""

    def full(device: str) -> trainer.TrainingTask:
        if dist.get_rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")
        dist.barrier()
        raise AssertionError("the barrier did not wait for the other worker")

    def ignore(epoch: int, metrics: object) -> None:
        pass

    monkeypatch.setattr(trainer, "MAX_FAILURES", 0)
    workers = TrainingWorkers(workers=2, cpus=1, gpus=0)
    with pytest.raises(MemoryError, match="lower batch_size of the training, or batch"):
        trainer.train(full, {}, tmp_path / "out", tmp_path / "work", workers, ignore, print)
