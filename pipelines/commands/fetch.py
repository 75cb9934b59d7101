"""`limpid fetch STAGE` brings home what a job that was submitted by hand has made.

`--send` goes the other way: it brings the inputs of a stage to the store, and says how to submit
it. A stage that `dvc repro` sends to a cluster needs neither.
"""

import argparse
import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.cluster.job_events import Listener
from pipelines.cluster.session import CARRIED
from pipelines.config import schema
from pipelines.errors import ConfigError, Failed
from pipelines.runner.console import Watch, refuse
from pipelines.runner.exit_codes import outcome
from pipelines.storage import jobs
from pipelines.tracking.tracker import Tracker


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch or send; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", help="as DVC calls it: evaluate, train_classifier@standard")
    parser.add_argument("--send", action="store_true", help="bring its inputs to the store")
    given = parser.parse_args(argv)
    try:
        if jobs.STORAGE not in os.environ:
            raise ConfigError(f"{jobs.STORAGE} does not name the store")
        stage = _stage(given.stage)
        if given.send:
            _send(stage)
        else:
            _fetch(given.stage, stage)
    except Exception as error:
        code, message = outcome(error)
        return refuse(message, code)
    return 0


def _stage(name: str) -> Any:
    """Return what DVC knows of a stage."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        (stage,) = Repo(".").stage.collect(name)
    except (DvcException, ValueError) as error:
        raise ConfigError(f"dvc.yaml has no stage {name}: {error}") from None
    return stage


def _send(stage: Any) -> None:
    arguments = shlex.split(stage.cmd.removeprefix("exec "))
    root = os.environ[jobs.STORAGE].rstrip("/")
    outs = {str(out) for out in stage.outs}
    shown = []
    for argument in arguments:
        path = Path(argument)
        if argument in outs:
            shown.append(f"{root}/{argument}")
        elif path.exists() and not argument.startswith("-"):
            jobs.publish(path, jobs.store().push(path), "sent")
            shown.append(f"{root}/{argument}")
        else:
            shown.append(argument)
    carried = {name: os.environ[name] for name in CARRIED if name in os.environ}
    environment = shlex.quote(json.dumps({"env_vars": carried}))
    submit = f"ray job submit --working-dir . --runtime-env-json {environment}"
    print(f"{submit} -- {shlex.join(shown)}")


def _fetch(label: str, stage: Any) -> None:
    paths = [Path(str(out)) for out in stage.outs]
    found = {path: jobs.published(path) for path in paths}
    if not found:
        raise ConfigError(f"{label} makes nothing that could be fetched")
    for path, one in found.items():
        jobs.store().pull(one.listing, path)
        print(f"{path} from the job {one.job}")
    _retell(label, next(iter(found.values())).job)
    print(f"dvc commit -f {label} tells DVC that this is what the stage makes")


def _retell(label: str, job: str) -> None:
    """Say what the job said, to MLflow as well."""
    result = jobs.result_of(jobs.store(), job)
    if result is None:
        raise Failed(4, f"the store holds no result of {job}")
    watch = Watch(label)
    tracker = Tracker(label, f"limpid-{schema.load().data.kind}", {}, job)
    Listener(watch, tracker, watch.say).all(result.events)
    tracker.results(result.metrics)
    problem = tracker.finish("FINISHED")
    if problem:
        watch.say(problem)
