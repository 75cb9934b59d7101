"""A tracking server or database that is broken, slow, dies, or is created by many at once."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import project
import pytest
from cluster.local_cluster import BIN, free_port
from project import until

from components.data.shards import sha256
from faults.conftest import STANDARD, states

pytestmark = pytest.mark.faults
OPEN = """
from pipelines.tracking import registry
registry.connect().search_experiments()
print("open")
"""


def test_four_processes_can_create_the_database_at_once(tmp_path: Path) -> None:
    folder = project.copy_to(tmp_path / "project")
    started = [project.start(folder, sys.executable, "-c", OPEN) for _ in range(4)]
    for process in started:
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and printed.endswith("open\n"), printed


class Broken(BaseHTTPRequestHandler):
    """A server that answers every request with an error, after some seconds."""

    seconds = 0.0

    def _answer(self) -> None:
        time.sleep(self.seconds)
        self.send_response(500)
        self.end_headers()

    do_GET = do_POST = _answer

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture(params=[0.0, 30.0], ids=["answers 500", "takes 30 s"])
def broken(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of such a server."""
    handler = type("Handler", (Broken,), {"seconds": request.param})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_broken_server_delays_a_stage_little_and_loses_no_metric(
    folder: Path, undisturbed: Path, broken: str
) -> None:
    began = time.monotonic()
    code, printed = project.run(folder, *STANDARD, "--out=out", MLFLOW_TRACKING_URI=broken)
    assert code == 0, printed
    # By default MLflow retries every request for four minutes.
    assert time.monotonic() - began < 120
    assert "was not reached" in printed and "Traceback" not in printed
    assert sha256(folder / "out/weights.safetensors") == sha256(undisturbed)
    (spooled,) = (folder / ".limpid/spool").glob("*.jsonl")
    assert spooled.read_text().count('"event": "metrics"') == 61


def test_a_server_that_dies_during_a_training_loses_no_metric(folder: Path, tmp_path: Path) -> None:
    port, home = free_port(), tmp_path / "server"
    home.mkdir()
    command = [
        str(BIN / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{home}/mlflow.db",
        "--artifacts-destination", str(home / "artifacts"),
    ]  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    server = project.start(folder, *command, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
    until(lambda: answers(address), 60)
    process = project.start(folder, *STANDARD, "--out=out", MLFLOW_TRACKING_URI=address)
    until(lambda: len(states(folder)) >= 2, 120)
    end(server)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "was not reached" in printed, printed
    assert list((folder / ".limpid/spool").glob("*.jsonl"))
    server = project.start(folder, *command, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
    try:
        until(lambda: answers(address), 60)
        again = [*STANDARD[:-2], "--train=data/val", "--val=data/test", "--out=other"]
        params = project.tiny()
        project.write_params(folder, params)
        code, printed = project.run(folder, *again, MLFLOW_TRACKING_URI=address)
        assert code == 0, printed
        assert not list((folder / ".limpid/spool").glob("*.jsonl")), printed
        with sqlite3.connect(home / "mlflow.db") as database:
            runs = database.execute(
                "select runs.name, count(distinct step) from runs join metrics using (run_uuid) "
                "where key = 'loss' group by run_uuid"
            ).fetchall()
        # The metrics sent before the server died, and again after, are in one run.
        assert sorted(epochs for _, epochs in runs)[-1] == 60 and len(runs) == 2, runs
    finally:
        end(server)


def end(server: subprocess.Popen[str]) -> None:
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/health", timeout=2)
    except OSError:
        return False
    return True


@pytest.mark.parametrize("harm", ["locked", "corrupt"])
def test_a_database_that_cannot_be_used_is_named(folder: Path, harm: str) -> None:
    database = folder / "mlflow.db"
    holder = None
    if harm == "corrupt":
        database.write_bytes(b"no database at all" * 100)
    else:
        code, printed = project.run(folder, sys.executable, "-c", OPEN)
        assert code == 0, printed
        holder = sqlite3.connect(database, isolation_level=None)
        holder.execute("BEGIN EXCLUSIVE")
    code, printed = project.run(folder, *STANDARD, "--out=out")
    if holder:
        holder.close()
    assert code == 0, printed
    assert "mlflow.db was not reached" in printed and "Traceback" not in printed
    assert list((folder / ".limpid/spool").glob("*.jsonl"))
