"""Runs one stage with the options of its command line, here or on a cluster.

The result of a stage has a key, a digest of all it depends on. The key names the work in progress,
so the same command goes on where another was interrupted, and the job on a cluster. Outputs move
into place when all of them are whole, and the run is logged in MLflow. A module with `LOCAL = True`
runs on this machine, whatever cluster is named.
"""

import importlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from pipelines.cluster import session, submission
from pipelines.cluster.job_events import Listener, MetricLogger, Progress
from pipelines.config import schema
from pipelines.runner import installed, job
from pipelines.runner.call import StageCall
from pipelines.runner.console import ConsoleProgress
from pipelines.runner.context import Context
from pipelines.runner.exit_codes import interruptible, leave, report
from pipelines.runner.provenance import input_digest
from pipelines.storage import jobs, locks, timings
from pipelines.storage.jobs import Spec
from pipelines.storage.object_store import remove
from pipelines.tracking.registry import Registration
from pipelines.tracking.tracker import Tracker

# Writes the outputs to these paths, by option, and returns the metrics.
Produce = Callable[[Mapping[str, Path], Progress, MetricLogger], Mapping[str, Any]]


def main(module_name: str, given: Mapping[str, str]) -> NoReturn:
    """Run a stage with the options of its command line; end the process with its exit code."""
    # Imported by name, so that Ray's workers can import the functions that the stage sends them.
    module = importlib.import_module(module_name)
    interruptible()
    try:
        code = _run(StageCall.of(module, given, schema.load()))
    except BaseException as error:
        code = report(error)
    leave(code)


def _run(call: StageCall) -> int:
    installed.require(call.stage)
    if submission.submitted_by_hand():
        return job.run_by_hand(call)
    on_cluster = not getattr(call.module, "LOCAL", False) and submission.cluster_is_named()
    # Before the inputs are read: an unknown instance is to be reported first.
    params = call.view.model_dump(mode="json")
    key = call.key({option: input_digest(path) for option, path in call.deps.items()})
    with locks.stage_lock(call.label):
        tracker = Tracker(call.label, call.experiment, params, key)
        produce = partial(_run_on_cluster if on_cluster else _run_here, call, key)
        complete(call, tracker, produce, call.registrations)
        shutil.rmtree(call.work(key), ignore_errors=True)
    return 0


def _run_here(
    call: StageCall,
    key: str,
    outs: Mapping[str, Path],
    progress: Progress,
    metrics: MetricLogger,
) -> Mapping[str, Any]:
    resources = call.resources.on(session.gpus)
    context = Context(progress, metrics, resources, call.work(key), timings.record)
    results: Mapping[str, Any] = call.module.run(call.view, context, **{**call.options, **outs})
    return results


def _run_on_cluster(
    call: StageCall,
    key: str,
    outs: Mapping[str, Path],
    progress: Progress,
    metrics: MetricLogger,
) -> Mapping[str, Any]:
    def prepare() -> Spec:
        store = jobs.store()
        deps = {option: store.push(path) for option, path in call.deps.items()}
        return call.spec(key, deps, outs)

    name, listener = call.job_name(key), Listener(progress, metrics, progress.say)
    result = submission.run(name, call.resources, prepare, listener)
    submission.download(name, result, outs)
    return result.metrics


def complete(
    call: StageCall,
    tracker: Tracker,
    produce: Produce,
    registrations: Callable[[], Sequence[Registration]] = tuple,
) -> None:
    """Produce the outputs of a stage beside their paths, then move all of them into place.

    The run is logged whether it succeeds or not; `registrations` are asked for when it has.
    """
    title = call.label.replace("@", " ")
    progress = ConsoleProgress(title)
    parts = {option: path.with_name(f".{path.name}.part") for option, path in call.outs.items()}
    status, registered = "FAILED", list[Registration]()
    try:
        for part in parts.values():
            remove(part)
            part.parent.mkdir(parents=True, exist_ok=True)
        metrics = produce(parts, progress, tracker)
        for option, path in call.outs.items():
            remove(path)
            os.replace(parts[option], path)
            if path.is_file():
                tracker.artifact(path)
        tracker.results(metrics)
        registered = list(registrations())
        status = "FINISHED"
    finally:
        seconds = progress.close()
        for part in parts.values():
            remove(part)
        problem = tracker.finish(status, registered)
        if problem:
            progress.say(problem)
    timings.record(call.label, seconds)
    shown = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items() if isinstance(v, int | float))
    progress.say(f"{title}: done in {seconds:.1f} s  {shown}")
