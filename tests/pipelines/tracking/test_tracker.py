"""The run of a stage is delivered to MLflow once, by a process beside it, now or later."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import project
import psutil
import pytest
from project import until

from components.data.shards import sha256
from pipelines.tracking.tracker import Tracker

ROOT = project.ROOT
KILLED = """
import time
from pipelines.tracking.tracker import Tracker
tracker = Tracker("killed", "limpid-tiny", {"epochs": 3}, "key")
tracker.log({"loss": 0.5}, 1)
while not tracker.queue.empty():
    time.sleep(0.01)
# The last event is on its way.
time.sleep(0.5)
print("sent", flush=True)
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


def killed(folder: Path, **environment: str) -> None:
    """Kill a stage that has sent events, and wait for the end of the process beside it."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED],
        cwd=folder, env={**plain_environment(), **environment}, start_new_session=True,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout and process.stdout.readline() == "sent\n"
    (beside,) = psutil.Process(process.pid).children()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # It may outlive the stage by ten seconds, and a busy machine notices late.
    until(lambda: not project.lives(beside), 60)


def deliver(folder: Path, events: str = "") -> None:
    """Run the process beside a stage once, by itself."""
    command = [sys.executable, "-m", "pipelines.tracking.uploader"]
    subprocess.run(
        command, cwd=folder, env=plain_environment(), input=events, text=True, check=True
    )


def lines(events: list[dict]) -> str:
    return "".join(json.dumps(event) + "\n" for event in events)


def plain_environment() -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    return {**inherited, "PYTHONPATH": str(ROOT)}


def test_the_run_of_a_killed_stage_ends_as_killed(tmp_path: Path) -> None:
    killed(tmp_path)
    deliver(tmp_path)  # In case MLflow took more than ten seconds to be imported.
    assert runs(tmp_path) == [("killed", "KILLED")]


def test_the_run_of_a_stage_killed_without_mlflow_is_delivered_later(tmp_path: Path) -> None:
    killed(tmp_path, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert not (tmp_path / "mlflow.db").exists()
    deliver(tmp_path)
    assert runs(tmp_path) == [("killed", "KILLED")]
    assert not list((tmp_path / ".limpid/spool").glob("*.jsonl"))


def test_redelivered_events_create_no_second_run(tmp_path: Path) -> None:
    about = {"stage": "one", "experiment": "limpid-tiny", "tags": {}, "params": {"epochs": "3"}}
    figures = {"params": {"rate": "1"}, "metrics": {"loss": 0.5}, "step": 1, "time": 2}
    events = [
        {"event": "start", **about, "id": "first", "time": 1},
        {"event": "nested", "name": "trial", **figures},
        {"event": "end", "status": "FINISHED", "time": 3},
    ]
    deliver(tmp_path, lines(events))
    # As if the stage had learnt too late that everything was delivered.
    spool = tmp_path / ".limpid/spool/1-1.jsonl"
    spool.parent.mkdir(parents=True, exist_ok=True)
    spool.write_text(lines(events))
    deliver(tmp_path)
    assert sorted(runs(tmp_path)) == [("one", "FINISHED"), ("trial", "FINISHED")]


def test_events_that_mlflow_rejects_are_put_aside_and_block_nothing(tmp_path: Path) -> None:
    about = {"stage": "one", "experiment": "limpid-tiny", "tags": {}, "params": {}, "id": "1"}
    start, end = {"event": "start", **about, "time": 1}, {"event": "end", "status": "FINISHED"}
    illegal = {"event": "metrics", "metrics": {"a:b?": 1.0}, "step": 0, "time": 1}
    spool = tmp_path / ".limpid/spool"
    spool.mkdir(parents=True)
    (spool / "1-1.jsonl").write_text('{"event": "st')
    (spool / "2-1.jsonl").write_text(lines([{**start, "id": "2"}, illegal, {**end, "time": 2}]))
    (spool / "3-1.jsonl").write_text(lines([{**start, "id": "3"}, {**end, "time": 2}]))
    deliver(tmp_path)
    assert ("one", "FINISHED") in runs(tmp_path)
    assert sorted(path.name for path in spool.iterdir()) == ["1-1.refused", "2-1.refused"]


def test_a_file_that_changed_before_delivery_is_not_logged(
    tmp_path: Path,
) -> None:
    changed, same = tmp_path / "changed.json", tmp_path / "same.json"
    about = {"stage": "one", "experiment": "limpid-tiny", "tags": {}, "params": {}, "id": "1"}
    events = [{"event": "start", **about, "time": 1}]
    for path in (changed, same):
        path.write_text("1")
        events.append({"event": "artifact", "path": str(path), "sha256": sha256(path)})
    events.append({"event": "end", "status": "FINISHED", "time": 2})
    changed.write_text("2")
    deliver(tmp_path, lines(events))
    assert [path.name for path in (tmp_path / "mlruns").rglob("*.json")] == ["same.json"]


def test_an_uploader_that_dies_is_reported_and_no_event_is_lost(
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


def test_spooled_events_of_earlier_versions_are_delivered_or_put_aside(tmp_path: Path) -> None:
    """Files as Limpid 0.1 wrote them, and as it wrote them before runs had an id."""
    spool = tmp_path / ".limpid/spool"
    spool.mkdir(parents=True)
    (spool / "1-1.jsonl").write_text('{"event": "start", "stage": "old", "time": 1}\n')
    (spool / "2-1.jsonl").write_text(
        '{"event": "start", "stage": "tune@student", "experiment": "limpid-tiny", "tags": '
        '{"dvc.stage": "tune@student", "limpid.key": "k"}, "id": "a", "params": {"seed": "0"}, '
        '"time": 1}\n'
        '{"event": "nested", "name": "t1", "params": {"rate": "1"}, "metrics": {"robust": 0.5}, '
        '"step": 2, "time": 2}\n'
        '{"event": "metrics", "step": 0, "metrics": {"final.trials": 1.0}, "time": 3}\n'
        '{"event": "end", "status": "FINISHED", "time": 4}\n'
    )
    deliver(tmp_path)
    assert sorted(runs(tmp_path)) == [("t1", "FINISHED"), ("tune@student", "FINISHED")]
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        logged = connection.execute("select key, value, step from metrics").fetchall()
        tags = connection.execute("select value from tags where key = 'limpid.told'").fetchall()
    assert sorted(logged) == [("final.trials", 1.0, 0), ("robust", 0.5, 2)]
    assert sorted(tags) == [("a",), ("a/t1",)]
    assert [path.name for path in spool.iterdir()] == ["1-1.refused"]
