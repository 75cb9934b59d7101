"""Runs in MLflow: one per stage, with nested runs, logged by a process beside it (`uploader`).

Nothing here can fail a stage or delay it for long: events wait in a queue, a thread sends them to
that process, and what it has not delivered within `FINISHED_WAIT_S` after the stage is done, or
`FAILED_WAIT_S` where the stage failed, is kept for the next stage to deliver (`spool`).
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from components.data.shards import sha256
from pipelines.layout import SOURCES, SPOOL
from pipelines.tracking import spool
from pipelines.tracking.registry import Registration, tracking_uri
from pipelines.tracking.spool import Event, now

FINISHED_WAIT_S = 10.0
# A stage that failed or was interrupted should end soon.
FAILED_WAIT_S = 4.0
REGISTRATION_WAIT_S = 10.0


class Tracker:
    """The MLflow run of one stage."""

    def __init__(self, stage: str, experiment: str, params: Mapping[str, Any], key: str) -> None:
        self.events: list[Event] = []
        self.queue: queue.Queue[Event | None] = queue.Queue()
        self.problem = "its process has not received everything"
        # In a session of its own, which no interruption of the stage reaches: the stage then still
        # sends the end of its run.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.tracking.uploader"], env=_environment(),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self.thread = threading.Thread(target=self._send, daemon=True)
        self.thread.start()
        tags = {**_provenance(), "dvc.stage": stage, "limpid.key": key}
        about = {"stage": stage, "experiment": experiment, "tags": tags, "id": uuid.uuid4().hex}
        self._put({"event": "start", **about, "params": dict(flat(params)), "time": now()})

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log figures at a step (an epoch)."""
        self._put({"event": "metrics", "step": step, "metrics": dict(metrics), "time": now()})

    def results(self, metrics: Mapping[str, Any]) -> None:
        """Log the numbers a stage returns, under names that differ from those of its epochs."""
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)}
        if numbers:
            self.log({f"final.{name}": value for name, value in numbers.items()})

    def artifact(self, path: Path) -> None:
        """Log a file."""
        self._put({"event": "artifact", "path": str(path.absolute()), "sha256": sha256(path)})

    def nested(
        self, name: str, params: Mapping[str, Any], metrics: Mapping[str, float], step: int
    ) -> None:
        """Log figures of a part of this stage, such as a trial of a search, in a nested run."""
        inner = {"event": "nested", "name": name, "params": dict(flat(params))}
        self._put({**inner, "metrics": dict(metrics), "step": step, "time": now()})

    def finish(self, status: str, registrations: Sequence[Registration] = ()) -> str:
        """End the run, register defenses; return a sentence if something was not delivered."""
        for one in registrations:
            # Not among the events that may be kept: until a later stage delivers them, the models
            # may have changed.
            sent = TypeAdapter(Registration).dump_python(one, mode="json")
            params = dict(flat(one.params))
            self.queue.put({"event": "register", "registration": sent, "params": params})
        self._put({"event": "end", "status": status, "time": now()})
        self.queue.put(None)
        seconds = FINISHED_WAIT_S if status == "FINISHED" else FAILED_WAIT_S
        seconds += REGISTRATION_WAIT_S * len(registrations)
        try:
            self.thread.join(seconds)
        except BaseException:
            self._keep()
            raise
        reason = self.problem
        if self.thread.is_alive():
            reason = f"no answer within {seconds:.0f} s"
        if not reason:
            return ""
        self._keep()
        return f"MLflow at {tracking_uri()} was not reached ({reason}); the run is kept in {SPOOL}"

    def _keep(self) -> None:
        self.process.kill()
        spool.write(self.events)

    def _put(self, event: Event) -> None:
        self.events.append(event)
        self.queue.put(event)

    def _send(self) -> None:
        """Send events as they come, then read what went wrong."""
        pipe, back = self.process.stdin, self.process.stdout
        assert pipe and back
        with contextlib.suppress(BrokenPipeError), pipe:
            while (event := self.queue.get()) is not None:
                print(json.dumps(event), file=pipe, flush=True)
        printed = back.read().splitlines()
        code = self.process.wait()
        self.problem = (printed or [f"its process ended with {code}"])[-1] if code else ""


def _environment() -> dict[str, str]:
    """Return an environment in which Python finds this code before any that is installed."""
    paths = [str(SOURCES), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _provenance() -> dict[str, str]:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    return {
        "git.commit": git("rev-parse", "HEAD"),
        "git.dirty": str(bool(git("status", "--porcelain", "-uno"))),
    }


def flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested settings as (a.b, text); MLflow refuses texts of more than 500 characters."""
    for name, part in value.items():
        if isinstance(part, Mapping):
            yield from flat(part, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(part)[:500]
