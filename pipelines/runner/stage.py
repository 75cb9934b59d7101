"""The common shape of a stage.

A stage file has a function `run(params, context, *, <dep>: Path, ..., out: Path) -> metrics` and
its paths in `pipelines/layout.py`. Its signature is its command line: every keyword-only parameter is an
option (`out_train` is `--out-train`), and `name: str` is the foreach instance.
A name `LOCAL` in the file says that it is about
this machine and runs here whatever cluster is named. `main` reads the parameters,
names the run by a key, tracks it, and moves outputs into place only when they are whole. Where a
cluster is named, the stage runs there as a job, and all but that stays as it is (`remote`).
"""

import argparse
import hashlib
import importlib
import inspect
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from pipelines import layout
from pipelines.cluster import submission
from pipelines.cluster.job_events import Listener
from pipelines.config import schema as parameters
from pipelines.config.resources import Resources
from pipelines.config.views import View
from pipelines.errors import ConfigError
from pipelines.layout import ROOT
from pipelines.runner import job
from pipelines.runner.console import ConsoleProgress, refuse
from pipelines.runner.context import Context
from pipelines.runner.exit_codes import interruptible, leave, outcome
from pipelines.runner.job import is_out
from pipelines.runner.provenance import input_digest, stage_key
from pipelines.storage import jobs, locks, timings
from pipelines.storage.jobs import Spec
from pipelines.storage.object_store import Listing, remove
from pipelines.tracking.tracker import Tracker


def main(module_name: str, argv: Sequence[str] | None = None) -> NoReturn:
    """Run a stage from the command line, and end the process with its exit code."""
    leave(_run(module_name, argv))


@dataclass(frozen=True)
class Call:
    """One stage as it is called: its module, options and parameters."""

    module: Any
    options: Mapping[str, Any]
    params: parameters.Params

    @property
    def stage(self) -> str:
        """The name of the stage in dvc.yaml."""
        return str(self.module.__name__.rsplit(".", 1)[-1])

    @property
    def label(self) -> str:
        """The stage and, of a foreach stage, the instance, as DVC says it."""
        name = self.options.get("name")
        return f"{self.stage}@{name}" if name else self.stage

    @property
    def resources(self) -> Resources:
        """What it may use."""
        return self.params.resources.of(self.label)

    @property
    def outs(self) -> dict[str, Path]:
        """What it makes, by option."""
        return {option: path for option, path in self.options.items() if is_out(option)}

    @property
    def deps(self) -> dict[str, Path]:
        """What it reads, by option."""
        paths = {k: value for k, value in self.options.items() if isinstance(value, Path)}
        return {option: path for option, path in paths.items() if not is_out(option)}

    @cached_property
    def view(self) -> View:
        """The parameters that it sees; ConfigError for an instance that is none."""
        view_type: type[View] = get_type_hints(self.module.run)["params"]
        return view_type.of(self.params, self.options.get("name"))

    def named(self, key: str) -> str:
        """Return the name of what is in progress under a key."""
        return f"{self.label.replace('@', '-')}-{key[:12]}"

    def spec(self, name: str, deps: Mapping[str, Listing], outs: Mapping[str, Path]) -> Spec:
        """Describe it for a job, with listings of its inputs by option."""
        options = {k: v for k, v in {**self.options, **outs}.items() if v is not None}
        for option, path in options.items():
            if isinstance(path, Path) and (path.is_absolute() or ".." in path.parts):
                raise ConfigError(
                    f"--{option} is {path}; a stage in a job takes paths below the project"
                )
        return Spec(
            module=self.module.__name__,
            options={option: str(value) for option, value in options.items()},
            deps={str(self.deps[option]): listing for option, listing in deps.items()},
            view=self.view.model_dump(mode="json", by_alias=True),
            resources=self.resources.model_dump(mode="json"),
            work=str(ROOT / "work" / name),
            versions=submission.versions(),
        )


def _run(module_name: str, argv: Sequence[str] | None) -> int:
    # Imported by name, so that Ray's workers can import what the stage hands them.
    module = importlib.import_module(module_name)
    given = _parse(module, argv)
    interruptible()
    try:
        folders = {k for k, hint in get_type_hints(module.run).items() if hint is not str}
        options = {k: jobs.below(v) if v and k in folders else v for k, v in given.items()}
        call = Call(module, options, parameters.load())
        if submission.by_hand():
            return _in_job(call, {k for k, v in given.items() if v and "://" in v})
        away = not getattr(module, "LOCAL", False) and submission.named()
        key = stage_key(module, call.view, {k: input_digest(path) for k, path in call.deps.items()})
        with locks.alone(call.label):
            _execute(call, key, away)
    except BaseException as error:
        code, message = outcome(error)
        return refuse(message, code)
    return 0


def _execute(call: Call, key: str, away: bool) -> None:
    """Run a stage here or on a cluster; its outputs appear when all of them are whole."""
    title, dataset = call.label.replace("@", " "), call.params.data.kind
    watch = ConsoleProgress(title)
    tracker = Tracker(call.label, f"limpid-{dataset}", call.view.model_dump(mode="json"), key)
    work = ROOT / "work" / call.named(key)
    parts = {k: path.with_name(f".{path.name}.part") for k, path in call.outs.items()}
    status, registrations = "FAILED", []
    try:
        for part in parts.values():
            remove(part)
            part.parent.mkdir(parents=True, exist_ok=True)
        if away:
            metrics = _away(call, call.named(key), parts, Listener(watch, tracker, watch.say))
        else:
            context = Context(watch, tracker, call.resources, work, timings.note)
            metrics = call.module.run(call.view, context, **{**call.options, **parts})
        for k, path in call.outs.items():
            remove(path)
            os.replace(parts[k], path)
            if path.is_file():
                tracker.artifact(path)
        tracker.results(metrics)
        shutil.rmtree(work, ignore_errors=True)
        if hasattr(call.module, "registered"):
            registrations = call.module.registered(call.view, dataset, **call.options)
        status = "FINISHED"
    finally:
        seconds = watch.close()
        for part in parts.values():
            remove(part)
        problem = tracker.finish(status, registrations)
        if problem:
            watch.say(problem)
    timings.note(call.label, seconds)
    shown = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items() if isinstance(v, int | float))
    watch.say(f"{title}: done in {seconds:.1f} s  {shown}")


def _away(
    call: Call, name: str, parts: Mapping[str, Path], listener: Listener
) -> Mapping[str, Any]:
    """Have the cluster run it, and put what it makes at `parts`; return its metrics."""

    def sent() -> Spec:
        there = jobs.store()
        listings = {option: there.push(path) for option, path in call.deps.items()}
        return call.spec(name, listings, parts)

    result = submission.run(name, call.resources, sent, listener)
    submission.bring(name, result, parts)
    return result.metrics


def _in_job(call: Call, uris: set[str]) -> int:
    """Run a stage that was submitted by hand; `uris` are the options that were given as such.

    They have names in the store; another input has come with the code. Outputs are for
    `limpid fetch`.
    """
    if jobs.STORAGE not in os.environ:
        raise ConfigError(f"a stage in a job needs {jobs.STORAGE}, for what it reads and makes")
    there = jobs.store()
    listings = {
        option: jobs.published(path).listing if option in uris else there.push(path)
        for option, path in call.deps.items()
    }
    digests = {
        option: hashlib.sha256(listing.model_dump_json().encode()).hexdigest()
        for option, listing in listings.items()
    }
    name = call.named(stage_key(call.module, call.view, digests))
    spec = call.spec(name, listings, {})
    os.environ[jobs.JOB] = name
    there.write(f"jobs/{name}/spec.json", spec.model_dump_json().encode())
    code = job.perform("by-hand")
    result = jobs.result_of(there, name)
    if code == 0 and result is not None:
        for option, path in call.outs.items():
            jobs.publish(path, result.outs[option], name)
        print(f"{call.label}: done; limpid fetch {call.label} brings it home")
    return code


def _parse(module: Any, argv: Sequence[str] | None) -> dict[str, Any]:
    """Read the command line: an option is what it says, else where the table of paths has it.

    The instance may be said first, without `--name`.
    """
    usual = layout.STAGES[module.__name__.rpartition(".")[2]]
    words = list(sys.argv[1:] if argv is None else argv)
    options = [
        name
        for name, parameter in inspect.signature(module.run).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    if "name" in options and words and not words[0].startswith("-"):
        words.insert(0, "--name")
    parser = argparse.ArgumentParser(description=(module.__doc__ or "").splitlines()[0])
    for name in options:
        default = usual.get(name)
        # Without a name, the view lists those there are.
        needed = {"help": f"by default {default}"} if default else {"required": name != "name"}
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, **needed)
    given = vars(parser.parse_args(words))
    return {k: v and v.format(name=given.get("name")) for k, v in given.items()}
