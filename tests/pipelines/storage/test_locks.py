"""One process at a time runs a stage of a project."""

import os
import subprocess
import sys
import time
from pathlib import Path

import project
import pytest

from pipelines.storage import locks

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


def test_a_stage_that_runs_cannot_be_run_again_until_its_process_dies(
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
