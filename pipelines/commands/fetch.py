"""Download the outputs of a job submitted by hand, or send its inputs.

`limpid fetch STAGE` downloads the outputs and logs the run in MLflow. `limpid fetch --send STAGE`
uploads the inputs that are here, and prints the command that submits the stage. A stage that
`dvc repro` sends to a cluster needs neither.
"""

import argparse
import importlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.cluster import submission
from pipelines.cluster.job_events import Listener, MetricLogger, Progress
from pipelines.cluster.session import CARRIED
from pipelines.errors import ConfigError, Failed
from pipelines.runner import command_line
from pipelines.storage import jobs, locks
from pipelines.storage.jobs import JobFolder
from pipelines.tracking.tracker import Tracker

if TYPE_CHECKING:
    from pipelines.runner.call import StageCall


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch or send; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("stage", help="its name in DVC: evaluate, train_classifier@standard")
    parser.add_argument("--send", action="store_true", help="send its inputs to the store")
    given = parser.parse_args(argv)
    if jobs.STORAGE not in os.environ:
        raise ConfigError(f"{jobs.STORAGE} names no store")
    call = _call(given.stage)
    if given.send:
        _send(call)
    else:
        _fetch(call)
    return 0


def _call(label: str) -> "StageCall":
    """Return the call of a stage by its name in DVC, as its command in dvc.yaml resolves."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    # Imports torch.
    from pipelines.config import schema
    from pipelines.runner.call import StageCall

    try:
        found = list(Repo(".").stage.collect(label))
    except DvcException as error:
        raise ConfigError(f"dvc.yaml has no stage {label}: {error}") from None
    if len(found) != 1:
        names = ", ".join(one.addressing for one in found)
        raise ConfigError(f"name one stage, and not {label}: {names or 'there is none'}")
    # exec pipelines/limpid NAME --option value ...
    _, _, name, *words = shlex.split(found[0].cmd)
    if command_line.options_of(name) is None:
        raise ConfigError(f"{name} runs on this machine alone")
    module = importlib.import_module(f"pipelines.stages.{name}")
    return StageCall.of(module, command_line.parse(name, words), schema.load())


def _send(call: "StageCall") -> None:
    """Upload the inputs that are here, and print the command that submits the stage."""
    store = jobs.store()
    for path in call.deps.values():
        if path.exists():
            jobs.publish(path, store.push(path), "sent")
        else:
            print(f"{path} is not here: the job takes what {store.uri} has under this name")
    words = ["python", "-m", "pipelines", call.stage]
    for option, value in call.options.items():
        words += [
            f"--{option.replace('_', '-')}",
            str(value) if option == "name" else f"{store.uri}/{value.as_posix()}",
        ]
    carried = {name: os.environ[name] for name in CARRIED if name in os.environ}
    environment = shlex.quote(json.dumps({"env_vars": carried}))
    submit = f"ray job submit --working-dir . --runtime-env-json {environment}"
    print(f"{submit} -- {shlex.join(words)}")


def _fetch(call: "StageCall") -> None:
    """Download the outputs of the job that has published them, and log its run."""
    from pipelines.runner import stage

    name = jobs.published(next(iter(call.outs.values()))).job
    result = JobFolder(jobs.store(), name).result()
    if result is None:
        raise Failed(4, f"{jobs.store().uri} has no result of the job {name}")

    def produce(
        outs: Mapping[str, Path], progress: Progress, metrics: MetricLogger
    ) -> Mapping[str, Any]:
        Listener(progress, metrics, progress.say).all(result.events)
        submission.download(name, result, outs)
        return result.metrics

    with locks.stage_lock(call.label):
        # Its parameters may no longer be those of params.yaml.
        stage.complete(call, Tracker(call.label, call.experiment, {}, name), produce)
    for path in call.outs.values():
        print(f"{path} from the job {name}")
    print(f"dvc commit -f {call.label} makes DVC accept these outputs")
