"""Logs the run of a stage in MLflow: a process of its own, which `tracker` starts and feeds.

Importing MLflow and opening its store take two seconds of a processor; here they pass beside the
stage. Events arrive as lines of JSON on the standard input. If something was not delivered, the
exit code is 1 and the last line printed says why. A stage that was killed cannot keep its events:
this process keeps them instead (`spool`).
"""

import contextlib
import json
import os
import queue
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from components.data.shards import sha256
from pipelines.tracking import registry, spool
from pipelines.tracking.registry import Registration
from pipelines.tracking.spool import Event

# Otherwise the UI takes our models for agents, and shows no metrics of them.
KIND = {"mlflow.experimentKind": "custom_model_development"}
# The tag by which a second delivery finds the runs of the first.
DELIVERY_TAG = "limpid.told"
# Error codes of events that MLflow will never accept.
PERMANENT = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
# How long this process may outlive a stage that was killed.
ORPHAN_S = 10


def main() -> None:
    """Deliver the runs that other stages left, then the events of this one."""
    parent = os.getppid()
    incoming: queue.Queue[Event | None] = queue.Queue()
    problems: list[str] = []
    thread = threading.Thread(target=_deliver, args=(incoming, problems), daemon=True)
    thread.start()
    received: list[Event] = []
    for event in _lines():
        received.append(event)
        incoming.put(event)
    killed = bool(received) and received[-1]["event"] != "end"
    if killed:
        received.append({"event": "end", "status": "KILLED", "time": spool.now()})
        incoming.put(received[-1])
    incoming.put(None)

    def orphaned() -> bool:
        return killed or os.getppid() != parent

    while thread.is_alive() and not orphaned():
        thread.join(0.2)
    thread.join(ORPHAN_S)
    if received and orphaned() and (problems or thread.is_alive()):
        spool.write([event for event in received if event["event"] != "register"])
    for problem in problems:
        with contextlib.suppress(BrokenPipeError):
            print(problem, flush=True)
    # Without cleaning up: the thread may still wait for MLflow.
    os._exit(1 if problems else 0)


def _lines() -> Iterator[Event]:
    """Yield the events of a stage, up to its end or to the line in which it was killed."""
    with contextlib.suppress(ValueError):
        for line in sys.stdin:
            yield json.loads(line)


def _deliver(incoming: "queue.Queue[Event | None]", problems: list[str]) -> None:
    try:
        client = registry.connect()
        for path in spool.drain():
            _redeliver(client, path)
        runs = _Runs(client)
        for event in iter(incoming.get, None):
            runs.apply(event)
    except Exception as error:  # Any error of the store, or of the way to it.
        problems.append(f"{type(error).__name__}: {error}".splitlines()[0][:200])


def _redeliver(client: Any, path: Path) -> None:
    """Deliver a run from the spool, or put aside one that no later stage could deliver either."""
    from mlflow.exceptions import MlflowException

    runs = _Runs(client, redelivery=True)
    try:
        events = spool.read(path)
    except ValueError:
        spool.reject(path)
        return
    try:
        for event in events:
            runs.apply(event)
    except MlflowException as error:
        if error.error_code not in PERMANENT:
            raise
        spool.reject(path)


class _Runs:
    """The runs of one stage in the store: its own, and those nested in it by name.

    A `redelivery` continues the runs that the first delivery created before it failed.
    """

    def __init__(self, client: Any, redelivery: bool = False) -> None:
        self.client = client
        self.redelivery = redelivery
        self.experiment = self.run = self.id = ""
        self.started = 0
        self.tags: Mapping[str, str] = {}
        self.nested: dict[str, str] = {}

    def apply(self, event: Event) -> None:
        """Write one event to the store."""
        match event["event"]:
            case "start":
                self._start(event)
            case "metrics":
                self._log_metrics(self.run, event)
            case "nested":
                self._log_metrics(self._inner(event["name"], event["params"]), event)
            case "artifact":
                path = Path(event["path"])
                # A file that has changed since is no longer the file of this run.
                if path.is_file() and sha256(path) == event["sha256"]:
                    self.client.log_artifact(self.run, str(path))
            case "register":
                one = TypeAdapter(Registration).validate_python(event["registration"])
                run = self._inner(one.name, event["params"])
                registry.register(self.client, run, one, self.tags, self.started)
            case "end":
                for run in (*self.nested.values(), self.run):
                    self.client.set_terminated(run, event["status"], event["time"])

    def _inner(self, name: str, params: Mapping[str, str]) -> str:
        """Return the id of the nested run of this name, created at its first event."""
        if name not in self.nested:
            tags = {**self.tags, "mlflow.parentRunId": self.run}
            self.nested[name] = self._run_of(f"{self.id}/{name}", tags=tags, run_name=name)
            self._log_params(self.nested[name], params)
        return self.nested[name]

    def _start(self, event: Event) -> None:
        known = self.client.get_experiment_by_name(event["experiment"])
        self.experiment = (
            known.experiment_id
            if known
            else self.client.create_experiment(event["experiment"], tags=KIND)
        )
        self.tags, self.id, self.started = event["tags"], event["id"], event["time"]
        about = {"start_time": event["time"], "tags": self.tags, "run_name": event["stage"]}
        self.run = self._run_of(self.id, **about)
        self._log_params(self.run, event["params"])

    def _run_of(self, identity: str, tags: Mapping[str, str], **about: Any) -> str:
        """Return the id of a new run, or of the one that an earlier delivery created."""
        if self.redelivery:
            found = f"tags.`{DELIVERY_TAG}` = '{identity}'"
            known = self.client.search_runs([self.experiment], found)
            if known:
                return str(known[0].info.run_id)
        tags = {**tags, DELIVERY_TAG: identity}
        created = self.client.create_run(self.experiment, tags=tags, **about)
        return str(created.info.run_id)

    def _log_params(self, run: str, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        some = [Param(name, value) for name, value in params.items()][:100]
        self.client.log_batch(run, params=some)

    def _log_metrics(self, run: str, event: Event) -> None:
        from mlflow.entities import Metric

        self.client.log_batch(
            run,
            metrics=[
                Metric(name, value, event["time"], event["step"])
                for name, value in event["metrics"].items()
            ],
        )


if __name__ == "__main__":
    main()
