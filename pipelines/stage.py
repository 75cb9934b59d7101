"""The common shape of a stage.

A stage file has a function `run(params, context, *, <dep>: Path, ..., out: Path) -> metrics` and
ends in `main(__spec__.name)`. Its signature is its command line: every
keyword-only parameter is an option (`out_train` is `--out-train`), and `name: str` is the foreach
instance. `main` reads the parameters, names the run by a key, tracks it, and moves outputs into
place only when they are whole.

Exit codes: 0, 2 parameters, 3 data, 4 infrastructure, 5 sanity, 130 interrupted.
"""

import argparse
import ast
import hashlib
import importlib
import inspect
import json
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import torch

from components import shards
from components.shards import MANIFEST, DataError
from components.training import Diverged
from pipelines import params as parameters
from pipelines import timings
from pipelines.params import ConfigError, Resources, View
from pipelines.place import ROOT
from pipelines.progress import Watch, refuse
from pipelines.registry import Registration
from pipelines.tracking import Tracker

SCHEMA = 1
STOPPED = threading.Event()
INTERRUPTED = "interrupted; the same command goes on from where it was"
PLUMBING = {
    "pipelines", *(f"pipelines.{name}" for name in (
        "candidates", "cluster", "params", "place", "progress", "registry", "stage", "timings",
        "tracking",
    )),
}  # fmt: skip


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM."""


@dataclass
class Context:
    """What a stage may use beside its parameters and folders."""

    watch: Watch
    resources: Resources
    work: Path
    tracker: Tracker
    dataset: str
    registrations: Sequence[Registration] = ()

    def epoch(self, total: int) -> Callable[[int, Mapping[str, float]], None]:
        """Return what to call at the end of every epoch of `total`: shows and logs it."""

        def seen(index: int, metrics: Mapping[str, float]) -> None:
            self.watch.advance(index + 1, total, "epochs", metrics)
            self.tracker.log(metrics, index)

        return seen

    def shard(self, done: int, total: int) -> None:
        """Show that `done` of `total` pieces of work are done."""
        self.watch.advance(done, total, "pieces")


def main(module_name: str, argv: Sequence[str] | None = None) -> NoReturn:
    """Run a stage from the command line, and end the process with its exit code.

    At once: everything is written and Ray is down by then, and taking torch, Ray and MLflow apart
    would cost every stage a second.
    """
    code = _run(module_name, argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(module_name: str, argv: Sequence[str] | None) -> int:
    # Imported by name, so that Ray's workers can import what the stage hands them.
    module = importlib.import_module(module_name)
    options = _parse(module.run, module.__doc__ or "", argv)
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    try:
        _execute(module, options)
    except Interrupted:
        return refuse(INTERRUPTED, 130)
    except ConfigError as error:
        return refuse(str(error), 2)
    except DataError as error:
        return refuse(str(error), 3)
    except Diverged as error:
        return refuse(str(error), 5)
    except ValueError as error:
        return refuse(str(error), 2)
    except (OSError, MemoryError) as error:
        return refuse(f"{type(error).__name__}: {error}", 4)
    except Exception as error:
        if STOPPED.is_set():  # Ray's compiled code turns our exception into one of its own.
            return refuse(INTERRUPTED, 130)
        ROOT.mkdir(exist_ok=True)
        (ROOT / "last_error.txt").write_text(traceback.format_exc())
        first = (str(error).strip().splitlines() or [""])[0][:300]
        return refuse(
            f"{type(error).__name__}: {first} (all of it in {ROOT / 'last_error.txt'})", 4
        )
    return 0


def _execute(module: Any, options: dict[str, Any]) -> None:
    everything = parameters.load()
    hints = get_type_hints(module.run)
    view_type: type[View] = hints["params"]
    name = options.get("name")
    stage = module.__name__.rsplit(".", 1)[-1]
    title = f"{stage} {name}" if name else stage
    try:
        view = view_type.of(everything, name)
    except KeyError:
        raise ConfigError(f"{parameters.PARAMS} has no entry {name} for {stage}") from None
    outs = {key: path for key, path in options.items() if key == "out" or key.startswith("out_")}
    key = stage_key(module, view, [path for k, path in options.items() if k not in outs])
    work = ROOT / "work" / f"{stage}-{name + '-' if name else ''}{key[:12]}"
    watch = Watch(title)
    label = title.replace(" ", "@")
    experiment = f"limpid-{everything.data.kind}"
    tracker = Tracker(label, experiment, view.model_dump(mode="json"), key)
    context = Context(watch, everything.resources, work, tracker, everything.data.kind)
    parts = {k: path.with_name(f".{path.name}.part") for k, path in outs.items()}
    status = "FAILED"
    try:
        for part in parts.values():
            _remove(part)
            part.parent.mkdir(parents=True, exist_ok=True)
        metrics = module.run(view, context, **{**options, **parts})
        for k, path in outs.items():
            _remove(path)
            os.replace(parts[k], path)
            if path.is_file():
                tracker.artifact(path)
        _flatten_into(tracker, metrics)
        shutil.rmtree(work, ignore_errors=True)
        status = "FINISHED"
    finally:
        seconds = watch.close()
        for part in parts.values():
            _remove(part)
        problem = tracker.finish(status, context.registrations if status == "FINISHED" else ())
        if problem:
            watch.say(problem)
    timings.note(label, seconds)
    shown = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items() if isinstance(v, int | float))
    watch.say(f"{title}: done in {seconds:.1f} s  {shown}")


def stage_key(module: Any, view: View, inputs: Sequence[Any]) -> str:
    """Return the sha256 of all a result depends on: what is run, on what, by which code."""
    folders = sorted(str(path) for path in inputs if isinstance(path, Path))
    digest = hashlib.sha256()
    facts = {
        "stage": module.__name__,
        "params": view.model_dump(mode="json"),
        "inputs": {folder: _content(Path(folder)) for folder in folders},
        "code": {str(path): shards.sha256(path) for path in code_of(module)},
        "torch": torch.__version__,
        "schema": SCHEMA,
    }
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()


def code_of(module: Any) -> list[Path]:
    """Return the files a result depends on: the stage's own and all it imports of this project.

    The plumbing is left out on purpose: moving it must not retrain anything.
    """
    root = Path(__file__).parent.parent
    seen: dict[Path, None] = {}
    waiting = [Path(module.__file__)]
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen[path] = None
            waiting += _imported(path, root)
    return [path.relative_to(root) for path in sorted(seen)]


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
    hints = get_type_hints(run)
    for name, parameter in inspect.signature(run).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            parser.add_argument(
                f"--{name.replace('_', '-')}",
                type=str if hints[name] is str else Path,
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


def _interrupt(signum: int, frame: object) -> NoReturn:
    # A second signal ends at once.
    STOPPED.set()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise Interrupted
