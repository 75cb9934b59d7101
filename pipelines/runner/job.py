"""Runs one stage inside a Ray job: `python -m pipelines.runner.job ATTEMPT`.

The spec lies in the store under the name of the job; inputs and outputs travel by the store. The
result is written last: a job with a result has succeeded. A failure is stored with the exit code
that the stage would have had on the machine of its user.
"""

import importlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from pydantic import ValidationError

from pipelines.cluster import session, submission
from pipelines.cluster.job_events import Emitter
from pipelines.config.resources import Resources
from pipelines.config.schema import explain
from pipelines.config.views import View
from pipelines.errors import ConfigError
from pipelines.runner.call import StageCall, is_out
from pipelines.runner.context import Context
from pipelines.runner.exit_codes import interruptible, leave, outcome
from pipelines.runner.provenance import listing_digest
from pipelines.storage import job_files, jobs
from pipelines.storage.jobs import Failure, JobFolder, Result, Spec
from pipelines.storage.object_store import remove


def main() -> NoReturn:
    """Run this job, and end the process with its exit code."""
    interruptible()
    leave(_attempt(JobFolder(jobs.store(), jobs.job() or ""), sys.argv[1]))


def run_by_hand(call: StageCall) -> int:
    """Run a stage that a person submitted as a job; publish its outputs for `limpid fetch`.

    An input comes from the store where it is given as a URI or did not come with the code. Returns
    the exit code.
    """
    if jobs.STORAGE not in os.environ:
        raise ConfigError(f"a stage in a job needs {jobs.STORAGE} for its inputs and outputs")
    store = jobs.store()
    deps = {
        option: jobs.published(path).listing
        if option in call.in_store or not path.exists()
        else store.push(path)
        for option, path in call.deps.items()
    }
    key = call.key({option: listing_digest(listing) for option, listing in deps.items()})
    folder = JobFolder(store, call.job_name(key))
    if folder.result() is None:
        folder.write_spec(call.spec(key, deps, call.outs))
        os.environ[jobs.JOB] = folder.name
        code = _attempt(folder, "by-hand")
        if code:
            return code
    result = folder.result()
    assert result is not None
    for option, path in call.outs.items():
        jobs.publish(path, result.outs[option], folder.name)
    print(f"{call.label}: done; limpid fetch {call.label} downloads its outputs")
    return 0


def _attempt(folder: JobFolder, attempt: str) -> int:
    """Do what the spec says, and store the result or the failure; return the exit code."""
    emitter = Emitter()
    try:
        spec = folder.spec()
        result = _run(spec, emitter)
    except BaseException as error:
        code, message = outcome(error)
        print(f"error: {message}", flush=True)
        failure = Failure(code=code, message=message, events=emitter.events)
        folder.write_failure(attempt, failure)
        return code
    folder.write_result(result)
    job_files.remove(Path(spec.work).absolute())
    shutil.rmtree(jobs.home(), ignore_errors=True)
    return 0


def _run(spec: Spec, emitter: Emitter) -> Result:
    require_versions(spec.versions)
    job_files.download_inputs()
    # The paths of a stage are relative to the folder of the project; in a job that is its home,
    # which is not there yet where the stage has no inputs.
    jobs.home().mkdir(parents=True, exist_ok=True)
    os.chdir(jobs.home())
    module = importlib.import_module(f"pipelines.stages.{spec.stage}")
    view = view_of(module, spec.view)
    resources = Resources.model_validate_json(json.dumps(spec.resources)).on(session.gpus)
    options: dict[str, Any] = {
        name: value if name == "name" else Path(value) for name, value in spec.options.items()
    }
    outs = {name: path for name, path in options.items() if is_out(name)}
    for path in outs.values():
        remove(path)
        path.parent.mkdir(parents=True, exist_ok=True)
    context = Context(emitter, emitter, resources, Path(spec.work), emitter.record_time)
    metrics = module.run(view, context, **options)
    return Result(
        metrics=dict(metrics),
        outs={name: jobs.store().push(path) for name, path in outs.items()},
        events=emitter.events,
    )


def view_of(module: Any, values: Mapping[str, Any]) -> View:
    """Return the parameters that a stage module sees, as they travel; ConfigError where they fail.

    They were valid where they come from: what fails here is a plugin that this node lacks, or has
    in another version.
    """
    view_type: type[View] = get_type_hints(module.run)["params"]
    try:
        return view_type.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise ConfigError(f"this node cannot run what it was sent: {explain(error)}") from None


def require_versions(theirs: Mapping[str, str]) -> None:
    """Raise ConfigError where this node has other versions than the machine that sent the job."""
    ours = submission.versions()
    odd = [f"{n} {theirs[n]} there and {ours[n]} here" for n in ours if theirs.get(n) != ours[n]]
    if odd:
        raise ConfigError(
            f"this cluster does not fit the machine that sent it work: {', '.join(odd)}"
        )


if __name__ == "__main__":
    main()
