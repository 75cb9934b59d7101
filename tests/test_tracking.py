"""What MLflow is told of a stage, by a process beside it."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.tracking import Tracker

ROOT = Path(__file__).parent.parent
KILLED = """
import time
from pipelines.tracking import Tracker
tracker = Tracker("killed", "limpid-tiny", {"epochs": 3}, "key")
tracker.log({"loss": 0.5}, 1)
print("told", flush=True)
time.sleep(60)
"""


def runs(folder: Path) -> list[tuple[str, str]]:
    database = folder / "mlflow.db"
    if not database.exists():
        return []
    with sqlite3.connect(database) as connection:
        try:
            return connection.execute("select name, status from runs").fetchall()
        except sqlite3.OperationalError:
            return []


def test_the_run_of_a_stage_that_is_killed_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED],
        cwd=tmp_path, start_new_session=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout and process.stdout.readline() == "told\n"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while runs(tmp_path) != [("killed", "KILLED")]:
        assert time.monotonic() < deadline, runs(tmp_path)
        time.sleep(0.2)


def test_a_process_that_ends_too_early_is_named_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = Tracker("stage", "limpid-tiny", {}, "key")
    tracker.process.kill()
    for step in range(1000):
        tracker.log({"loss": 0.5}, step)
    assert "its process ended with -9" in tracker.finish("FINISHED")
    (spooled,) = Path(".limpid/spool").glob("*.jsonl")
    assert spooled.read_text().count('"event": "metrics"') == 1000
