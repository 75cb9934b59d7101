"""Runs one stage inside a Ray job: `python -m pipelines.runner.job ATTEMPT`.

What to do lies in the store under the name of the job (`jobs.Spec`), inputs and outputs travel by
the store, and `result.json` is written last: where it is, the stage has succeeded. What failed is
said in `failure-ATTEMPT.json`, with the exit code this would have had beside its user.
"""

import importlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from pipelines.cluster import submission
from pipelines.cluster.job_events import Emitter
from pipelines.config.resources import Resources
from pipelines.errors import ConfigError
from pipelines.runner.context import Context
from pipelines.runner.exit_codes import interruptible, leave, outcome
from pipelines.storage import job_files, jobs
from pipelines.storage.jobs import Failure, Result, Spec
from pipelines.storage.object_store import remove


def perform(attempt: str) -> int:
    """Do what the store says this job is to do; return the exit code."""
    emitter = Emitter()
    store, folder = jobs.store(), f"jobs/{jobs.job()}"
    try:
        spec = jobs.spec()
        result = _perform(spec, emitter)
    except BaseException as error:
        code, message = outcome(error)
        print(f"error: {message}", flush=True)
        failure = Failure(code=code, message=message, events=emitter.events)
        store.write(f"{folder}/failure-{attempt}.json", failure.model_dump_json().encode())
        return code
    store.write(f"{folder}/result.json", result.model_dump_json().encode())
    for name in store.names(folder):
        if name != f"{folder}/result.json":
            store.drop(name)
    job_files.remove(Path(spec.work).absolute())
    shutil.rmtree(jobs.home(), ignore_errors=True)
    return 0


def _perform(spec: Spec, emitter: Emitter) -> Result:
    _compare(spec.versions)
    job_files.localise()
    # All paths of the stage are relative to where its user stands; here it stands here.
    os.chdir(jobs.home())
    module = importlib.import_module(spec.module)
    view = get_type_hints(module.run)["params"].model_validate_json(json.dumps(spec.view))
    resources = Resources.model_validate_json(json.dumps(spec.resources))
    options: dict[str, Any] = {
        name: value if name == "name" else Path(value) for name, value in spec.options.items()
    }
    outs = {name: path for name, path in options.items() if is_out(name)}
    for path in outs.values():
        remove(path)
        path.parent.mkdir(parents=True, exist_ok=True)
    context = Context(emitter, emitter, resources, Path(spec.work), emitter.took)
    metrics = module.run(view, context, **options)
    return Result(
        metrics=dict(metrics),
        outs={name: jobs.store().push(path) for name, path in outs.items()},
        events=emitter.events,
    )


def is_out(option: str) -> bool:
    """Say whether an option of a stage names what it makes."""
    return option == "out" or option.startswith("out_")


def _compare(theirs: Mapping[str, str]) -> None:
    ours = submission.versions()
    odd = [f"{n} {theirs[n]} there and {ours[n]} here" for n in ours if theirs.get(n) != ours[n]]
    if odd:
        raise ConfigError(f"this cluster does not fit who sends it work: {', '.join(odd)}")


def main() -> NoReturn:
    """Do this job, and end the process with its exit code."""
    interruptible()
    leave(perform(sys.argv[1]))


if __name__ == "__main__":
    main()
