"""Tells MLflow what a stage has to say: a process of its own, which `tracking` starts and feeds.

MLflow takes two seconds of a processor to be imported and to open its store; here they pass beside
the stage and not in its way. Events come as lines of JSON on the standard input. Where something
was not delivered, the exit code is 1 and the last line printed says why.
"""

import json
import queue
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from pipelines import registry
from pipelines.place import ROOT, lock
from pipelines.registry import Registration

Event = dict[str, Any]
# Else the UI takes our models for agents, and shows no metrics of them.
KIND = {"mlflow.experimentKind": "custom_model_development"}
# How long this process may outlive a stage that was killed.
ALONE_S = 10


def main() -> None:
    """Deliver what was left by other stages, then what comes in, to its end."""
    incoming: queue.Queue[Event | None] = queue.Queue()
    threading.Thread(target=_read, args=(incoming,), daemon=True).start()
    try:
        client = registry.connect()
        _deliver_spooled(client)
        runs = _Runs(client)
        for event in iter(incoming.get, None):
            runs.apply(event)
    except Exception as error:  # Whatever the store, or the way to it, may fail with.
        print(f"{type(error).__name__}: {error}".splitlines()[0][:200])
        sys.exit(1)


def _read(incoming: "queue.Queue[Event | None]") -> None:
    """Queue events up to the end; that of a stage that was killed is that it was killed."""
    last = ""
    for line in sys.stdin:
        try:
            event: Event = json.loads(line)
        except ValueError:  # Killed in the middle of a word.
            break
        last = event["event"]
        incoming.put(event)
    if last and last != "end":
        signal.alarm(ALONE_S)
        incoming.put({"event": "end", "status": "KILLED", "time": int(time.time() * 1000)})
    incoming.put(None)


class _Runs:
    """The runs of one stage in the store: its own, and those nested in it by name."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.experiment = self.run = ""
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
                self.client.log_artifact(self.run, event["path"])
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
            created = self.client.create_run(self.experiment, tags=tags, run_name=name)
            self.nested[name] = str(created.info.run_id)
            self._params(self.nested[name], params)
        return self.nested[name]

    def _start(self, event: Event) -> None:
        known = self.client.get_experiment_by_name(event["experiment"])
        self.experiment = (
            known.experiment_id
            if known
            else self.client.create_experiment(event["experiment"], tags=KIND)
        )
        self.tags = event["tags"]
        created = self.client.create_run(
            self.experiment, start_time=event["time"], tags=self.tags, run_name=event["stage"]
        )
        self.run = str(created.info.run_id)
        self._params(self.run, event["params"])

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


def _deliver_spooled(client: Any) -> None:
    with lock("spool"):
        for path in sorted((ROOT / "spool").glob("*.jsonl")):
            runs = _Runs(client)
            for line in path.read_text().splitlines():
                runs.apply(json.loads(line))
            path.unlink()


if __name__ == "__main__":
    main()
