"""The common shape of a stage.

A stage file has a function `run(params, context, *, <dep>: Path, ..., out: Path) -> metrics` and
ends in `main(__spec__.name)`. Its signature is its command line: every
keyword-only parameter is an option (`out_train` is `--out-train`), and `name: str` is the foreach
instance. `main` reads the parameters, names the run by a key, tracks it, and moves outputs into
place only when they are whole. Where a cluster is named, the stage runs there as a job, and all
but that stays as it is (`remote`).
"""

import argparse
import ast
import hashlib
import importlib
import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import torch

from components import shards
from components.shards import MANIFEST, DataError
from pipelines import launch, place, remote, timings
from pipelines import params as parameters
from pipelines.context import Context
from pipelines.exits import interruptible, leave, outcome
from pipelines.launch import is_out
from pipelines.params import ConfigError, Resources, View
from pipelines.place import ROOT, Spec
from pipelines.progress import Watch, refuse
from pipelines.relay import Listener
from pipelines.tracking import Tracker

__all__ = ["Context", "code_digests", "code_of", "main", "stage_key"]

SCHEMA = 1
SOURCES = Path(__file__).parent.parent
PLUMBING = {
    "pipelines", *(f"pipelines.{name}" for name in (
        "candidates", "cluster", "context", "exits", "launch", "params", "place", "progress",
        "registry", "relay", "remote", "stage", "store", "timings", "tracking",
    )),
}  # fmt: skip


def main(module_name: str, argv: Sequence[str] | None = None, *, here: bool = False) -> NoReturn:
    """Run a stage from the command line, and end the process with its exit code.

    A stage that is about this machine runs `here`, whatever cluster is named.
    """
    leave(_run(module_name, argv, here))


def _run(module_name: str, argv: Sequence[str] | None, here: bool) -> int:
    # Imported by name, so that Ray's workers can import what the stage hands them.
    module = importlib.import_module(module_name)
    given = _parse(module.run, module.__doc__ or "", argv)
    interruptible()
    try:
        folders = {k for k, hint in get_type_hints(module.run).items() if hint is not str}
        options = {k: place.below(v) if v and k in folders else v for k, v in given.items()}
        if remote.by_hand():
            uris = {k for k, v in given.items() if v and "://" in v}
            return _in_job(module, options, uris)
        _execute(module, options, not here and remote.named())
    except BaseException as error:
        code, message = outcome(error)
        return refuse(message, code)
    return 0


def _execute(module: Any, options: dict[str, Any], away: bool) -> None:
    everything = parameters.load()
    name = options.get("name")
    stage = _name(module)
    view = _view(module, everything, name)
    outs = {key: path for key, path in options.items() if is_out(key)}
    deps = {k: v for k, v in options.items() if isinstance(v, Path) and k not in outs}
    key = stage_key(module, view, {option: _content(path) for option, path in deps.items()})
    label = f"{stage}@{name}" if name else stage
    title = label.replace("@", " ")
    run = label.replace("@", "-") + f"-{key[:12]}"
    work = ROOT / "work" / run
    resources = everything.resources.of(label)
    parts = {k: path.with_name(f".{path.name}.part") for k, path in outs.items()}
    with place.alone(label):
        watch = Watch(title)
        experiment = f"limpid-{everything.data.kind}"
        tracker = Tracker(label, experiment, view.model_dump(mode="json"), key)
        context = Context(watch, tracker, resources, work, timings.note)
        status, registrations = "FAILED", []
        try:
            for part in parts.values():
                _remove(part)
                part.parent.mkdir(parents=True, exist_ok=True)
            if away:
                spec = _spec(module, view, {**options, **parts}, deps, resources, work)
                listener = Listener(watch, tracker, watch.say)
                result = remote.run(run, spec, listener)
                remote.bring(run, result, parts)
                metrics = result.metrics
            else:
                metrics = module.run(view, context, **{**options, **parts})
            for k, path in outs.items():
                _remove(path)
                os.replace(parts[k], path)
                if path.is_file():
                    tracker.artifact(path)
            _flatten_into(tracker, metrics)
            shutil.rmtree(work, ignore_errors=True)
            if hasattr(module, "registered"):
                registrations = module.registered(view, everything.data.kind, **options)
            status = "FINISHED"
        finally:
            seconds = watch.close()
            for part in parts.values():
                _remove(part)
            problem = tracker.finish(status, registrations)
            if problem:
                watch.say(problem)
        timings.note(label, seconds)
    shown = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items() if isinstance(v, int | float))
    watch.say(f"{title}: done in {seconds:.1f} s  {shown}")


def _name(module: Any) -> str:
    name: str = module.__name__.rsplit(".", 1)[-1]
    return name


def _view(module: Any, everything: parameters.Params, name: str | None) -> View:
    view_type: type[View] = get_type_hints(module.run)["params"]
    try:
        return view_type.of(everything, name)
    except KeyError:
        where = f"{parameters.PARAMS} has no entry {name} for {_name(module)}"
        raise ConfigError(where) from None


def _spec(
    module: Any, view: View, options: Mapping[str, Any], deps: Mapping[str, Path],
    resources: Resources, work: Path,
) -> Spec:  # fmt: skip
    """Describe a stage for a cluster; its inputs are in the store afterwards."""
    for option, path in options.items():
        if isinstance(path, Path) and (path.is_absolute() or ".." in path.parts):
            raise ConfigError(
                f"--{option} is {path}; a stage in a job takes paths below the project"
            )
    there = place.store()
    return Spec(
        module=module.__name__,
        options={k: str(value) for k, value in options.items() if value is not None},
        deps={str(path): there.push(path) for path in deps.values()},
        view=view.model_dump(mode="json", by_alias=True),
        resources=resources.model_dump(mode="json"),
        work=str(work),
        versions=launch.versions(),
    )


def _in_job(module: Any, options: Mapping[str, Any], uris: set[str]) -> int:
    """Run a stage that was submitted by hand; `uris` are the options that were given as such.

    They have names in the store; another input has come with the code. Outputs are for
    `python -m pipelines.fetch`.
    """
    if place.STORAGE not in os.environ:
        raise ConfigError(f"a stage in a job needs {place.STORAGE}, for what it reads and makes")
    everything = parameters.load()
    name = options.get("name")
    view = _view(module, everything, name)
    label = f"{_name(module)}@{name}" if name else _name(module)
    outs = {k: path for k, path in options.items() if is_out(k)}
    deps = {k: v for k, v in options.items() if isinstance(v, Path) and k not in outs}
    there = place.store()
    listings = {
        k: there.push(path) if path.exists() else place.published(path).listing
        for k, path in deps.items()
    }
    digests = {
        k: hashlib.sha256(listing.model_dump_json().encode()).hexdigest()
        for k, listing in listings.items()
    }
    run = label.replace("@", "-") + f"-{stage_key(module, view, digests)[:12]}"
    spec = Spec(
        module=module.__name__,
        options={k: str(value) for k, value in options.items() if value is not None},
        deps={str(deps[k]): listing for k, listing in listings.items()},
        view=view.model_dump(mode="json", by_alias=True),
        resources=everything.resources.of(label).model_dump(mode="json"),
        work=str(ROOT / "work" / run),
        versions=launch.versions(),
    )
    os.environ[place.JOB] = run
    there.write(f"jobs/{run}/spec.json", spec.model_dump_json().encode())
    code = launch.perform("by-hand")
    if code == 0:
        result = launch.result_of(there, run)
        assert result is not None
        for k, path in outs.items():
            place.publish(path, result.outs[k], run)
        print(f"{label}: done; python -m pipelines.fetch {label} brings it home")
    return code


def stage_key(module: Any, view: View, inputs: Mapping[str, str]) -> str:
    """Return the sha256 of all a result depends on: what is run, on what, by which code.

    `inputs` are fingerprints by option.
    """
    facts = {
        "stage": module.__name__,
        "params": view.model_dump(mode="json"),
        "inputs": dict(inputs),
        "code": code_digests(module),
        "torch": torch.__version__,
        "schema": SCHEMA,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def code_digests(module: Any) -> dict[str, str]:
    """Return the sha256 of every file of `code_of`."""
    return {str(path): shards.sha256(SOURCES / path) for path in code_of(module)}


def code_of(module: Any) -> list[Path]:
    """Return the files a result depends on: the stage's own and all it imports of this project.

    The plumbing is left out on purpose: moving it must not retrain anything.
    """
    seen: dict[Path, None] = {}
    waiting = [Path(module.__file__)]
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen[path] = None
            waiting += _imported(path, SOURCES)
    return [path.relative_to(SOURCES) for path in sorted(seen)]


def _imported(path: Path, root: Path) -> Iterator[Path]:
    """Yield the project files that a file imports, packages with their `__init__`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] not in ("components", "pipelines") or name in PLUMBING:
                continue
            for depth in range(1, len(parts) + 1):
                base = root.joinpath(*parts[:depth])
                for candidate in (base / "__init__.py", base.with_suffix(".py")):
                    if candidate.is_file() and ".".join(parts[:depth]) not in PLUMBING:
                        yield candidate


def _content(folder: Path) -> str:
    """Fingerprint an input: by its manifest where it has one, else by its files."""
    if not folder.exists():
        raise DataError(f"{folder} is missing: the stage that makes it has not run")
    if (folder / MANIFEST).is_file():
        return shards.fingerprint(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listing = [f"{path.relative_to(folder)} {shards.sha256(path)}" for path in files]
    return hashlib.sha256("\n".join(listing).encode()).hexdigest()


def _parse(run: Callable[..., Any], description: str, argv: Sequence[str] | None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    for name, parameter in inspect.signature(run).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            parser.add_argument(
                f"--{name.replace('_', '-')}",
                required=parameter.default is inspect.Parameter.empty,
                default=None if parameter.default is inspect.Parameter.empty else parameter.default,
            )
    return vars(parser.parse_args(argv))


def _flatten_into(tracker: Tracker, metrics: Mapping[str, Any]) -> None:
    numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)}
    if numbers:
        tracker.log({f"final.{name}": value for name, value in numbers.items()})


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
