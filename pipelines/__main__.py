"""The command `limpid NAME ...`, or `python -m pipelines NAME ...`: every stage, every command."""

import ast
import importlib
import signal
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

VERSIONS = ((3, 11), (3, 14))
HERE = Path(__file__).parent
HELP = ("help", "-h", "--help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is named; 2 where nothing has this name, 4 where the environment does not fit."""
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or ["help"]
    if not VERSIONS[0] <= sys.version_info[:2] < VERSIONS[1]:
        return _refuse(f"Limpid needs Python 3.11 to 3.13, and {sys.executable} is older or newer")
    if name in HELP:
        print(_overview())
        return 0
    if name == "--version":
        print(f"limpid {_version()}")
        return 0
    return _run(name, rest, own_process=argv is None)


def names(package: str) -> list[str]:
    """Return the stages in the order of the line, or the commands by the alphabet."""
    from pipelines.layout import STAGES

    if package == "stages":
        return list(STAGES)
    return sorted(path.stem for path in (HERE / package).glob("[a-z]*.py"))


def _run(name: str, rest: list[str], own_process: bool) -> int:
    found = {one: package for package in ("stages", "commands") for one in names(package)}
    if name not in found:
        from pipelines.errors import near

        hint = near(name, found) or "; `limpid` lists all of them"
        return _refuse(f"there is no stage or command {name}{hint}", 2)
    # What argparse shows as the program.
    sys.argv = [f"limpid {name}", *rest]
    try:
        module = importlib.import_module(f"pipelines.{found[name]}.{name}")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("components", "pipelines"):
            raise
        return _refuse(
            f"{sys.executable} lacks the package {package}; activate the environment Limpid is "
            "installed in, for example by `. .venv/bin/activate`"
        )
    if hasattr(module, "run"):
        from pipelines.runner import stage

        stage.main(module.__name__, rest)
    if own_process:
        # SIGTERM interrupts as Ctrl-C does, and so does Ctrl-C where a shell has switched it off.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
    try:
        return int(module.main(rest))
    except (Exception, KeyboardInterrupt) as error:
        # Not above: it brings torch, and most commands end well.
        from pipelines.runner.exit_codes import outcome

        code, sentence = outcome(error)
        return _refuse(sentence, code)


def _overview() -> str:
    """Return all names with what each does, one line each; imports nothing of them."""
    lines = ["usage: limpid NAME ...", "       limpid NAME --help"]
    for package, title in (
        ("stages", "stages, in the order of dvc.yaml; `dvc repro` runs them"),
        ("commands", "commands"),
    ):
        lines += ["", f"{title}:"]
        for name in names(package):
            source = (HERE / package / f"{name}.py").read_text(encoding="utf-8")
            summary = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
            lines.append(f"  {name:<21}{summary}")
    return "\n".join(lines)


def _version() -> str:
    try:
        return metadata.version("limpid")
    except metadata.PackageNotFoundError:
        return "of this folder (not installed)"


def _refuse(sentence: str, code: int = 4) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
