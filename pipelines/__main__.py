"""`python -m pipelines NAME ...`: every stage and command of a project.

`limpid NAME ...` runs them too, and the commands of `limpid` beside (`limpid/__main__.py`).
"""

import importlib
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from pipelines import layout
from pipelines.errors import near
from pipelines.runner import command_line, watcher
from pipelines.runner.command_line import STAGES

# torch takes seconds to import: only the stage or command that runs may import it, and only after
# its command line was understood.
HERE = Path(__file__).parent
HELP = ("help", "-h", "--help")
# Packages with one module for each name, and what the overview calls them.
GROUPS = {
    STAGES: "stages, in the order of dvc.yaml; `dvc repro` runs them",
    "pipelines.commands": "commands",
}


def main(
    argv: Sequence[str] | None = None,
    groups: Mapping[str, str] = GROUPS,
    program: str = "pipelines",
) -> int:
    """Run one stage or command; return its exit code, 2 for an unknown name.

    4 says that its packages cannot be imported. A stage ends the process. `groups` are the packages
    of all that can be run, with their titles, and `program` is what `python -m` runs.
    """
    name, *words = (sys.argv[1:] if argv is None else argv) or ["help"]
    if name in HELP:
        print(_overview(groups))
        return 0
    if name == "--version":
        print(f"limpid {_version()}")
        return 0
    if argv is None:
        # SIGTERM interrupts as Ctrl-C does, and so does Ctrl-C where a shell has switched it off.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
    local = Path("pipelines/__main__.py")
    if local.is_file() and not local.samefile(__file__):
        # Its data and results are those of its own code.
        return _refuse(
            f"this folder has a Limpid of its own, and `limpid` is that of {HERE.parent}; run "
            f"`python -m {program} {name}` here"
        )
    if argv is None:
        watcher.watch([name, *words])
    try:
        return _run(name, words, groups)
    finally:
        watcher.leaves()


def names(group: str) -> list[str]:
    """Return the stages in the order of dvc.yaml, or other modules in that of the alphabet."""
    if group == STAGES:
        return list(layout.STAGES)
    return sorted(path.stem for path in command_line.folder(group).glob("[a-z]*.py"))


def _run(name: str, words: Sequence[str], groups: Mapping[str, str]) -> int:
    homes = {known: group for group in groups for known in names(group)}
    if name not in homes:
        hint = near(name, homes) or "; `limpid help` lists all"
        return _refuse(f"there is no stage or command {name}{hint}", 2)
    # argparse takes the name of the program from here.
    sys.argv = [f"limpid {name}", *words]
    try:
        run = _imported(homes[name], name, words)
    except KeyboardInterrupt:
        return _refuse("interrupted", 130)
    except ImportError as error:
        if _own(error):
            raise
        return _refuse_import(error)
    except ValueError as error:
        # A plugin that cannot be used.
        from pipelines.runner.exit_codes import report

        return report(error)
    try:
        return run()
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, ImportError) and not _own(error):
            return _refuse_import(error)
        from pipelines.runner.exit_codes import report

        return report(error)


def _imported(group: str, name: str, words: Sequence[str]) -> Callable[[], int]:
    """Import a stage or command; return what runs it with the words of its command line."""
    module_name = f"{group}.{name}"
    if group == STAGES and command_line.options_of(name) is not None:
        given = command_line.parse(name, words)
        importlib.import_module(module_name)
        from pipelines.runner import stage

        return partial(stage.main, module_name, given)
    command: Callable[[Sequence[str]], int] = importlib.import_module(module_name).main
    return partial(command, words)


def _overview(groups: Mapping[str, str]) -> str:
    """Return one line for each stage and command, read from its source: nothing is imported."""
    lines = ["usage: limpid NAME ...", "       limpid NAME --help"]
    for group, title in groups.items():
        lines += ["", f"{title}:"]
        for name in names(group):
            lines.append(f"  {name:<21}{command_line.summary(group, name)}")
    return "\n".join(lines)


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("limpid")
    except metadata.PackageNotFoundError:
        return "of this folder (not installed)"


def _own(error: ImportError) -> bool:
    """Say whether it is code of this project that cannot be imported."""
    return (error.name or "").partition(".")[0] in ("limpid", "components", "pipelines")


def _refuse_import(error: ImportError) -> int:
    package = (error.name or "").partition(".")[0]
    missing = isinstance(error, ModuleNotFoundError)
    problem = f"lacks the package {package}" if missing else f"fails to import: {error}"
    return _refuse(
        f"{sys.executable} {problem}; activate the environment Limpid is installed in, for "
        "example by `. .venv/bin/activate`"
    )


def _refuse(sentence: str, code: int = 4) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
