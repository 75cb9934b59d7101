"""Runs one stage inside a Ray job: `python -m pipelines.launch ATTEMPT`.

What to do lies in the store under the name of the job (`place.Spec`), inputs and outputs travel by
the store, and `result.json` is written last: where it is, the stage has succeeded. What failed is
said in `failure-ATTEMPT.json`, with the exit code this would have had beside its user.
"""

import importlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from components.config import Config
from pipelines import place
from pipelines.context import Context
from pipelines.exits import interruptible, leave, outcome
from pipelines.mistakes import ConfigError
from pipelines.place import Spec
from pipelines.relay import Emitter, Event
from pipelines.resources import Resources
from pipelines.store import Listing, Store, remove


class Result(Config):
    """What a job leaves: the metrics of its stage, its outputs by option, and all it said."""

    metrics: dict[str, Any]
    outs: dict[str, Listing]
    events: list[Event]


class Failure(Config):
    """Why a job ended without a result."""

    code: int
    message: str
    events: list[Event]


def versions() -> dict[str, str]:
    """Return the versions that must be the same on both sides of the seam."""
    import ray
    import torch

    return {
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "ray": ray.__version__,
        # How it was built differs by machine.
        "torch": torch.__version__.partition("+")[0],
    }


def perform(attempt: str) -> int:
    """Do what the store says this job is to do; return the exit code."""
    emitter = Emitter()
    store, folder = place.store(), f"jobs/{place.job()}"
    try:
        spec = place.spec()
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
    place.forget(Path(spec.work).absolute())
    shutil.rmtree(place.home(), ignore_errors=True)
    return 0


def result_of(store: Store, job: str) -> Result | None:
    """Return what a job left, or None where it has not succeeded."""
    content = store.read(f"jobs/{job}/result.json")
    return None if content is None else Result.model_validate_json(content)


def _perform(spec: Spec, emitter: Emitter) -> Result:
    _compare(spec.versions)
    place.localise()
    # All paths of the stage are relative to where its user stands; here it stands here.
    os.chdir(place.home())
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
        outs={name: place.store().push(path) for name, path in outs.items()},
        events=emitter.events,
    )


def is_out(option: str) -> bool:
    """Say whether an option of a stage names what it makes."""
    return option == "out" or option.startswith("out_")


def _compare(theirs: Mapping[str, str]) -> None:
    ours = versions()
    odd = [f"{n} {theirs[n]} there and {ours[n]} here" for n in ours if theirs.get(n) != ours[n]]
    if odd:
        raise ConfigError(f"this cluster does not fit who sends it work: {', '.join(odd)}")


def main() -> NoReturn:
    """Do this job, and end the process with its exit code."""
    interruptible()
    leave(perform(sys.argv[1]))


if __name__ == "__main__":
    main()
