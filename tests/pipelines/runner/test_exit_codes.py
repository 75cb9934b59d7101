"""Faults that cost no minutes: who may run, where, and on what (the others are in tests/faults)."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import project
import psutil
import pytest
import torch
from faults.conftest import until

from components.data.shards import sha256, write_bytes
from pipelines.cluster import capacity, submission, trainer, worker_pool
from pipelines.config.resources import TrainingWorkers, Workers
from pipelines.errors import ConfigError
from pipelines.runner import job
from pipelines.storage import job_files, jobs, locks

TRAIN = ["--name=standard", "--train=data/train", "--val=data/val", "--out=out"]


def test_a_gpu_that_is_not_there_is_refused_before_anything_starts(
    reproduced: Path, tmp_path: Path
) -> None:
    folder = project.copy_to(tmp_path / "project")
    os.symlink(reproduced / "data", folder / "data")
    params = project.tiny()
    params["resources"]["train"] = {"workers": 1, "cpus": 1, "gpus": 1}
    project.write_params(folder, params)
    command = [sys.executable, "-m", "pipelines", "train_classifier", *TRAIN]
    code, printed = project.run(folder, *command, CUDA_VISIBLE_DEVICES="")
    assert code == 2, printed
    assert "ask for 1 workers with 1 GPU each, and this machine has 0" in printed
    assert "Traceback" not in printed


def test_what_a_cluster_has_lost_is_waited_for_and_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes: list[dict[str, float]] = [{"CPU": 1.0}]
    monkeypatch.setattr(capacity, "nodes", lambda: nodes)
    said: list[str] = []
    watch = capacity.CapacityWatch(
        TrainingWorkers(workers=[2, 4], cpus=1, gpus=0), 2, said.append
    )
    watch.check()
    assert "waiting for a node: 2 x 1 CPU needed, and there are 1 nodes" in said[0]
    nodes.append({"CPU": 1.0})
    watch.check()
    assert len(said) == 1 and watch.lacking_since is None
    del nodes[-1]
    watch.check()
    watch.raise_if_given_up()
    watch.seconds = -1
    # A cluster that grows as it is asked may have it yet.
    monkeypatch.setenv(capacity.AUTOSCALES, "1")
    watch.check()
    watch.raise_if_given_up()
    monkeypatch.delenv(capacity.AUTOSCALES)
    watch.check()
    with pytest.raises(ConnectionError, match="gave up after 0 s: 2 x 1 CPU needed"):
        watch.raise_if_given_up()
    assert len(said) == 3
    monkeypatch.setenv(capacity.WAIT, "5m")
    with pytest.raises(ConfigError, match="LIMPID_WAIT_S is '5m', and should be a number"):
        capacity.CapacityWatch(watch.workers, 1, said.append)


def test_who_was_given_up_removes_nothing_of_who_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(jobs.STORAGE, f"file://{tmp_path}/store")
    monkeypatch.setenv(jobs.SCRATCH, str(tmp_path / "scratch"))
    monkeypatch.setenv(jobs.JOB, "training")
    monkeypatch.setattr(job_files, "_shared", {})
    states = jobs.home() / ".limpid/work/training/states"
    write_bytes(states / "30", b"mine")
    job_files.upload(states)
    there, name = jobs.store(), "kept/work/training/states"
    there.write(f"{name}/60", b"of another")
    (states / "30").unlink()
    write_bytes(states / "31", b"mine, and late")
    job_files.upload(states)
    assert sorted(there.names(name)) == [f"{name}/31", f"{name}/60"]
    # Who goes on from what is there has it for its own.
    job_files.download_folder(states)
    (states / "31").unlink()
    job_files.upload(states)
    assert there.names(name) == [f"{name}/60"]


def test_a_cluster_of_other_versions_is_refused() -> None:
    ours = submission.versions()
    job.require_versions(ours)
    with pytest.raises(ConfigError, match=r"ray 1\.0 there and \d"):
        job.require_versions({**ours, "ray": "1.0"})


def test_an_unknown_stage_among_resources_is_named(tmp_path: Path) -> None:
    folder = project.copy_to(tmp_path / "project")
    params = project.tiny()
    params["resources"]["stages"] = {"evaluat": {"shards": params["resources"]["shards"]}}
    project.write_params(folder, params)
    prepared = {f"out_{split}": f"data/{split}" for split in ("train", "val", "test")}
    code, printed = project.stage(folder, "prepare_data", **prepared)
    assert code == 2 and "did you mean evaluate?" in printed, printed


def test_a_place_of_any_name_and_no_home(reproduced: Path, tmp_path: Path) -> None:
    """A space, letters of other alphabets, no HOME, another time zone: the same bytes."""
    folder = project.copy_to(tmp_path / "dätä ü (1) 数据")
    prepared = [f"--out-{split}=data/{split}" for split in ("train", "val", "test")]
    bare = {"HOME": "", "LC_ALL": "C", "TZ": "Pacific/Chatham"}
    for command in (
        ["prepare_data", *prepared],
        ["train_classifier", *TRAIN],
    ):
        code, printed = project.run(folder, sys.executable, "-m", "pipelines", *command, **bare)
        assert code == 0, printed
    for made, known in (("out", "models/standard"), ("data/train", "data/train")):
        for path in (folder / made).iterdir():
            assert sha256(path) == sha256(reproduced / known / path.name), path.name


# A clock that goes back a day every time it is asked.
BACKWARDS = """
import itertools, time
now, days = time.time, itertools.count()
time.time = lambda: now() - 86400 * next(days)
"""


def test_a_clock_that_runs_backwards_changes_nothing(reproduced: Path, tmp_path: Path) -> None:
    folder = project.copy_to(tmp_path / "project")
    os.symlink(reproduced / "data", folder / "data")
    (folder / "sitecustomize.py").write_text(BACKWARDS)
    code, printed = project.run(
        folder, sys.executable, "-m", "pipelines", "train_classifier", *TRAIN
    )
    assert code == 0, printed
    weights = "weights.safetensors"
    assert sha256(folder / "out" / weights) == sha256(reproduced / "models/standard" / weights)
    seconds = json.loads((folder / "reports/timings.json").read_text())
    assert 0 < seconds["train_classifier@standard"]["seconds"] < 300
    with sqlite3.connect(folder / "mlflow.db") as database:
        ((began, ended),) = database.execute("select start_time, end_time from runs").fetchall()
    assert began > ended, "the clock was not ours"


def test_a_gpu_without_memory_is_said_with_what_to_do(tmp_path: Path) -> None:
    before = os.environ.get("RAY_AUTH_TOKEN")

    def full(device: str) -> trainer.TrainingTask:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")

    train = TrainingWorkers(workers=0, cpus=1, gpus=0)
    for workers in (0, 1):
        share = Workers(workers=workers, cpus=1, gpus=0)
        with pytest.raises(MemoryError, match="lower batch_size of the training, or batch"):
            worker_pool.map_shards(full, [{}], share, lambda *_: None, print)
    with pytest.raises(MemoryError, match="lower batch_size of the training, or batch"):
        trainer.train(full, {}, tmp_path / "out", tmp_path / "work", train, lambda *_: None, print)
    assert not (tmp_path / "out").exists()
    # Nor has the Ray of this process left its token in the environment.
    assert os.environ.get("RAY_AUTH_TOKEN") == before


HOLD = """
import sys, time
from pipelines.storage import locks
with locks.stage_lock("evaluate"):
    print("held", flush=True)
    time.sleep(float(sys.argv[1]))
"""


def hold(seconds: float) -> subprocess.Popen[str]:
    """Start a process that runs a stage for some seconds, in this folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(seconds)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(project.ROOT)},
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_stage_that_runs_is_not_run_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(locks, "ENDING_S", 0.5)
    other = hold(60)
    with (
        pytest.raises(
            BlockingIOError, match=f"evaluate is being run already, by process {other.pid}"
        ),
        locks.stage_lock("evaluate"),
    ):
        pass
    with locks.stage_lock("prepare_data"):
        pass
    other.kill()
    other.wait()
    with locks.stage_lock("evaluate"):
        pass


def test_a_stage_that_is_ending_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    other = hold(1)
    began = time.monotonic()
    with locks.stage_lock("evaluate"):
        assert time.monotonic() - began > 0.5
    other.wait()


KILLED = """
import os, signal
import psutil
from pipelines.cluster import session
from pipelines.config.resources import Workers

with session.hold(Workers(workers=1, cpus=1, gpus=0)):
    print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_nothing_of_an_embedded_ray_outlives_who_was_killed(tmp_path: Path) -> None:
    code, printed = project.run(project.copy_to(tmp_path / "project"), sys.executable, "-c", KILLED)
    assert code == -signal.SIGKILL, printed
    started = [int(one) for one in printed.split()]
    assert len(started) > 5
    until(lambda: not any(p.pid in started and project.lives(p) for p in psutil.process_iter()), 15)


STUCK = """
import ctypes
from pipelines.runner import exit_codes

exit_codes.STUCK_S = 0.5
exit_codes.interruptible()
mutex = ctypes.create_string_buffer(64)
lock = ctypes.CDLL(None).pthread_mutex_lock
lock(mutex)
print("stuck", flush=True)
lock(mutex)
"""


def test_an_interruption_ends_what_is_stuck_in_compiled_code() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stdout.readline() == "stuck\n"
        time.sleep(0.5)
        process.terminate()
        try:
            assert process.wait(20) == 130
        finally:
            process.kill()
