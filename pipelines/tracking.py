"""The only place that knows MLflow: one run per stage, logged from a thread of its own.

Only the driver talks to the store. Nothing here can fail a training or hold it up for long: events
wait in a queue, the thread delivers them, and what it cannot deliver within `PATIENCE_S` after the
stage is done goes to a spool file that the next stage tries again.
"""

import contextlib
import fcntl
import json
import logging
import os
import queue
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.shards import write_bytes

ROOT = Path(".limpid")
PATIENCE_S = 10.0
Event = dict[str, Any]


@dataclass(frozen=True)
class Registration:
    """A defense to register: its folders, figures and the words that describe it.

    `inference` are the settings by which the network of the purifier folder is used.
    """

    name: str
    version_of: str
    fingerprint: str
    folders: Mapping[str, Path]
    inference: Mapping[str, Any] | None
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    description: str


def tracking_uri() -> str:
    """Return the store in use: MLFLOW_TRACKING_URI, else SQLite beside the repository."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').absolute()}"


class Tracker:
    """The MLflow run of one stage."""

    def __init__(self, stage: str, experiment: str, params: Mapping[str, Any], key: str) -> None:
        self.start: Event = {
            "event": "start",
            "stage": stage,
            "experiment": experiment,
            "time": int(time.time() * 1000),
            "tags": {**_provenance(), "dvc.stage": stage, "limpid.key": key},
            "params": dict(_flat(params)),
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

    def artifact(self, path: Path) -> None:
        """Log a file."""
        self._put({"event": "artifact", "path": str(path.absolute())})

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
        return f"MLflow at {tracking_uri()} was not reached ({reason}); {kept}"

    def _put(self, event: Event) -> None:
        self.events.append(event)
        self.queue.put(event)

    def _deliver(self) -> None:
        try:
            client = _client()
            _deliver_spooled(client)
            run = ""
            while (event := self.queue.get()) is not None:
                run = _apply(client, run, event)
            for registration in self.registrations:
                _register(client, run, registration)
        except Exception as error:  # A store that is away must not fail a stage.
            self.problem = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        finally:
            self.ended.set()


def _client() -> Any:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    mlflow.set_tracking_uri(tracking_uri())
    client = mlflow.MlflowClient()
    # Several processes that open a fresh SQLite store at once trip over each other's migrations.
    with lock("mlflow"):
        client.search_experiments(max_results=1)
    return client


def _apply(client: Any, run: str, event: Event) -> str:
    from mlflow.entities import Metric, Param

    match event["event"]:
        case "start":
            experiment = client.get_experiment_by_name(event["experiment"])
            identity = (
                experiment.experiment_id
                if experiment
                else client.create_experiment(event["experiment"])
            )
            created = client.create_run(
                identity, start_time=event["time"], tags=event["tags"], run_name=event["stage"]
            )
            run = str(created.info.run_id)
            params = [Param(name, value) for name, value in event["params"].items()]
            client.log_batch(run, params=params[:100])
        case "metrics":
            client.log_batch(
                run,
                metrics=[
                    Metric(name, value, event["time"], event["step"])
                    for name, value in event["metrics"].items()
                ],
            )
        case "artifact":
            client.log_artifact(run, event["path"])
        case "end":
            client.set_terminated(run, event["status"], event["time"])
    return run


def _register(client: Any, run: str, registration: Registration) -> None:
    """Register a defense once per fingerprint; later calls only renew figures and tags."""
    import mlflow

    name = registration.version_of
    versions = []
    with contextlib.suppress(mlflow.exceptions.MlflowException):
        versions = client.search_model_versions(f"name = '{name}'")
    known = [v for v in versions if v.tags.get("limpid.fingerprint") == registration.fingerprint]
    if known:
        version = known[0].version
    else:
        with mlflow.start_run(run_id=run):
            logged = mlflow.pyfunc.log_model(
                name=registration.name,
                python_model=str(Path(__file__).with_name("served.py")),
                artifacts={key: str(path) for key, path in registration.folders.items()},
                model_config={"inference": registration.inference},
                code_paths=["components"],
                pip_requirements=["torch", "safetensors", "pydantic", "numpy", "pyarrow"],
            )
        with contextlib.suppress(mlflow.exceptions.MlflowException):
            client.create_registered_model(name)
        version = client.create_model_version(
            name, logged.model_uri, run, model_id=logged.model_id
        ).version
        mlflow.log_metrics(dict(registration.metrics), model_id=logged.model_id, run_id=run)
    tags = {"limpid.fingerprint": registration.fingerprint, **registration.tags}
    tags |= {f"limpid.{key}": f"{value:.4f}" for key, value in registration.metrics.items()}
    for key, value in tags.items():
        client.set_model_version_tag(name, version, key, value)
    client.update_model_version(name, version, registration.description)
    if registration.tags.get("limpid.candidate") == "yes":
        client.set_registered_model_alias(name, "candidate", version)


def _deliver_spooled(client: Any) -> None:
    for path in sorted((ROOT / "spool").glob("*.jsonl")):
        run = ""
        for line in path.read_text().splitlines():
            run = _apply(client, run, json.loads(line))
        path.unlink()


def _spool(events: Sequence[Event]) -> None:
    path = ROOT / "spool" / f"{events[0]['time']}-{os.getpid()}.jsonl"
    write_bytes(path, "".join(json.dumps(event) + "\n" for event in events).encode())


@contextlib.contextmanager
def lock(name: str) -> Iterator[None]:
    """Hold a lock of this name among the processes that work in this folder."""
    ROOT.mkdir(exist_ok=True)
    with (ROOT / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _provenance() -> dict[str, str]:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    return {
        "git.commit": git("rev-parse", "HEAD"),
        "git.dirty": str(bool(git("status", "--porcelain", "-uno"))),
    }


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, part in value.items():
        if isinstance(part, Mapping):
            yield from _flat(part, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(part)[:500]


def _now() -> int:
    return int(time.time() * 1000)
