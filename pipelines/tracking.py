"""Runs in MLflow: one per stage, with nested ones, logged from a thread of its own.

Only the driver talks to the store. Nothing here can fail a training or hold it up for long: events
wait in a queue, the thread delivers them, and what it cannot deliver within `PATIENCE_S` after the
stage is done goes to a spool file that the next stage tries again.
"""

import json
import os
import queue
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from components.shards import write_bytes
from pipelines import registry
from pipelines.place import ROOT
from pipelines.registry import Registration

PATIENCE_S = 10.0
Event = dict[str, Any]
# Else the UI takes our models for agents, and shows no metrics of them.
KIND = {"mlflow.experimentKind": "custom_model_development"}


class Tracker:
    """The MLflow run of one stage."""

    def __init__(self, stage: str, experiment: str, params: Mapping[str, Any], key: str) -> None:
        self.start: Event = {
            "event": "start",
            "stage": stage,
            "experiment": experiment,
            "time": int(time.time() * 1000),
            "tags": {**_provenance(), "dvc.stage": stage, "limpid.key": key},
            "params": dict(flat(params)),
        }
        self.events: list[Event] = [self.start]
        self.queue: queue.Queue[Event | None] = queue.Queue()
        self.ended = threading.Event()
        self.queue.put(self.start)
        self.registrations: list[Registration] = []
        self.problem = ""
        self.thread = threading.Thread(target=self._deliver, daemon=True)
        self.thread.start()

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log figures at a step (an epoch)."""
        self._put({"event": "metrics", "step": step, "metrics": dict(metrics), "time": _now()})

    def results(self, metrics: Mapping[str, Any]) -> None:
        """Log the numbers among what a stage ends with, beside the figures on its way."""
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)}
        if numbers:
            self.log({f"final.{name}": value for name, value in numbers.items()})

    def artifact(self, path: Path) -> None:
        """Log a file."""
        self._put({"event": "artifact", "path": str(path.absolute())})

    def nested(
        self, name: str, params: Mapping[str, Any], metrics: Mapping[str, float], step: int
    ) -> None:
        """Log figures of a part of this stage, as a trial of a search, in a run of its own."""
        inner = {"event": "nested", "name": name, "params": dict(flat(params))}
        self._put({**inner, "metrics": dict(metrics), "step": step, "time": _now()})

    def finish(self, status: str, registrations: Sequence[Registration] = ()) -> str:
        """End the run, register defenses, and return a sentence if something was not delivered."""
        self.registrations = list(registrations)
        self._put({"event": "end", "status": status, "time": _now()})
        self.queue.put(None)
        patience = PATIENCE_S + 10 * len(registrations)
        in_time = self.ended.wait(patience)
        if in_time and not self.problem:
            return ""
        _spool(self.events)
        reason = self.problem or f"no answer within {patience:.0f} s"
        kept = f"the run is kept in {ROOT / 'spool'}"
        return f"MLflow at {registry.tracking_uri()} was not reached ({reason}); {kept}"

    def _put(self, event: Event) -> None:
        self.events.append(event)
        self.queue.put(event)

    def _deliver(self) -> None:
        try:
            client = registry.connect()
            _deliver_spooled(client)
            runs = _Runs(client)
            while (event := self.queue.get()) is not None:
                if event["event"] == "end":
                    for one in self.registrations:
                        inner = runs.inner(one.name, dict(flat(one.params)))
                        registry.register(client, inner, one, runs.tags)
                runs.apply(event)
        except Exception as error:  # A store that is away must not fail a stage.
            self.problem = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        finally:
            self.ended.set()


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
    for path in sorted((ROOT / "spool").glob("*.jsonl")):
        runs = _Runs(client)
        for line in path.read_text().splitlines():
            runs.apply(json.loads(line))
        path.unlink()


def _spool(events: Sequence[Event]) -> None:
    path = ROOT / "spool" / f"{events[0]['time']}-{os.getpid()}.jsonl"
    write_bytes(path, "".join(json.dumps(event) + "\n" for event in events).encode())


def _provenance() -> dict[str, str]:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    return {
        "git.commit": git("rev-parse", "HEAD"),
        "git.dirty": str(bool(git("status", "--porcelain", "-uno"))),
    }


def flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested settings as (a.b, text), cut where MLflow would refuse them."""
    for name, part in value.items():
        if isinstance(part, Mapping):
            yield from flat(part, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(part)[:500]


def _now() -> int:
    return int(time.time() * 1000)
