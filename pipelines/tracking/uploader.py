"""Tells MLflow what a stage has to say: a process of its own, which `tracking` starts and feeds.

MLflow takes two seconds of a processor to be imported and to open its store; here they pass beside
the stage and not in its way. Events come as lines of JSON on the standard input. Where something
was not delivered, the exit code is 1 and the last line printed says why; the events of a stage that
was killed, and can keep them no more, are kept here (`spool`).
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

# Else the UI takes our models for agents, and shows no metrics of them.
KIND = {"mlflow.experimentKind": "custom_model_development"}
# The tag that says which telling made a run.
TOLD = "limpid.told"
# What MLflow says of events that it will not take tomorrow either.
NEVER = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
# How long this process may outlive a stage that was killed.
ALONE_S = 10


def main() -> None:
    """Deliver what was left by other stages, then what comes in, to its end."""
    parent = os.getppid()
    incoming: queue.Queue[Event | None] = queue.Queue()
    problems: list[str] = []
    thread = threading.Thread(target=_deliver, args=(incoming, problems), daemon=True)
    thread.start()
    told: list[Event] = []
    for event in _lines():
        told.append(event)
        incoming.put(event)
    killed = bool(told) and told[-1]["event"] != "end"
    if killed:
        told.append({"event": "end", "status": "KILLED", "time": spool.now()})
        incoming.put(told[-1])
    incoming.put(None)

    def alone() -> bool:
        return killed or os.getppid() != parent

    while thread.is_alive() and not alone():
        thread.join(0.2)
    thread.join(ALONE_S)
    if told and alone() and (problems or thread.is_alive()):
        spool.keep([event for event in told if event["event"] != "register"])
    for problem in problems:
        with contextlib.suppress(BrokenPipeError):
            print(problem, flush=True)
    # At once: the thread may still be on its way.
    os._exit(1 if problems else 0)


def _lines() -> Iterator[Event]:
    """Yield the events of a stage, up to its end, or to the word at which it was killed."""
    with contextlib.suppress(ValueError):
        for line in sys.stdin:
            yield json.loads(line)


def _deliver(incoming: "queue.Queue[Event | None]", problems: list[str]) -> None:
    try:
        client = registry.connect()
        for path in spool.taken():
            _deliver_late(client, path)
        runs = _Runs(client)
        for event in iter(incoming.get, None):
            runs.apply(event)
    except Exception as error:  # Whatever the store, or the way to it, may fail with.
        problems.append(f"{type(error).__name__}: {error}".splitlines()[0][:200])


def _deliver_late(client: Any, path: Path) -> None:
    """Deliver a run that was kept, or put aside what no later stage could deliver either."""
    from mlflow.exceptions import MlflowException

    runs = _Runs(client, again=True)
    try:
        events = spool.events_in(path)
    except ValueError:
        spool.refuse(path)
        return
    try:
        for event in events:
            runs.apply(event)
    except MlflowException as error:
        if error.error_code not in NEVER:
            raise
        spool.refuse(path)


class _Runs:
    """The runs of one stage in the store: its own, and those nested in it by name.

    What is told `again` goes on with the runs that the first time made before it failed.
    """

    def __init__(self, client: Any, again: bool = False) -> None:
        self.client = client
        self.again = again
        self.experiment = self.run = self.id = ""
        self.tags: Mapping[str, str] = {}
        self.nested: dict[str, str] = {}

    def apply(self, event: Event) -> None:
        """Write one event."""
        match event["event"]:
            case "start":
                self._start(event)
            case "metrics":
                self._metrics(self.run, event)
            case "nested":
                self._metrics(self.inner(event["name"], event["params"]), event)
            case "artifact":
                path = Path(event["path"])
                # What is told late may have changed, and is no file of this run then.
                if path.is_file() and sha256(path) == event["sha256"]:
                    self.client.log_artifact(self.run, str(path))
            case "register":
                one = TypeAdapter(Registration).validate_python(event["registration"])
                run = self.inner(one.name, event["params"])
                registry.register(self.client, run, one, self.tags)
            case "end":
                for run in (*self.nested.values(), self.run):
                    self.client.set_terminated(run, event["status"], event["time"])

    def inner(self, name: str, params: Mapping[str, str]) -> str:
        """Return the nested run of this name, started where it is new."""
        if name not in self.nested:
            tags = {**self.tags, "mlflow.parentRunId": self.run}
            self.nested[name] = self._made(f"{self.id}/{name}", tags=tags, run_name=name)
            self._params(self.nested[name], params)
        return self.nested[name]

    def _start(self, event: Event) -> None:
        known = self.client.get_experiment_by_name(event["experiment"])
        self.experiment = (
            known.experiment_id
            if known
            else self.client.create_experiment(event["experiment"], tags=KIND)
        )
        self.tags, self.id = event["tags"], event["id"]
        about = {"start_time": event["time"], "tags": self.tags, "run_name": event["stage"]}
        self.run = self._made(self.id, **about)
        self._params(self.run, event["params"])

    def _made(self, identity: str, tags: Mapping[str, str], **about: Any) -> str:
        """Return a new run's name in the store, or that of the one made for this before."""
        if self.again:
            known = self.client.search_runs([self.experiment], f"tags.`{TOLD}` = '{identity}'")
            if known:
                return str(known[0].info.run_id)
        created = self.client.create_run(self.experiment, tags={**tags, TOLD: identity}, **about)
        return str(created.info.run_id)

    def _params(self, run: str, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        some = [Param(name, value) for name, value in params.items()][:100]
        self.client.log_batch(run, params=some)

    def _metrics(self, run: str, event: Event) -> None:
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
