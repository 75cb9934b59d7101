"""The command line of a stage, read from its source: nothing heavy is imported for it.

A stage module has a function `run(params, context, *, dep: Path, ..., out: Path) -> metrics`. Its
signature is its command line: every keyword-only parameter is an option (`out_train` is
`--out-train`), `name: str` is the instance of a stage that dvc.yaml repeats, and the paths default
to `pipelines/layout.py`.
"""

import argparse
import ast
from collections.abc import Sequence
from pathlib import Path

from pipelines import layout

STAGES = "pipelines.stages"


def folder(package: str) -> Path:
    """Return the folder of a package of this project, which is not imported."""
    return layout.SOURCES.joinpath(*package.split("."))


def summary(package: str, name: str) -> str:
    """Return the first line of the docstring of a stage or command."""
    return (ast.get_docstring(_source(package, name), clean=False) or "").partition("\n")[0]


def options_of(stage: str) -> list[str] | None:
    """Return the options of a stage in their order; None for one that has no `run`."""
    for node in _source(STAGES, stage).body:
        if isinstance(node, ast.FunctionDef) and node.name == "run":
            return [argument.arg for argument in node.args.kwonlyargs]
    return None


def parse(stage: str, words: Sequence[str]) -> dict[str, str]:
    """Return the options of a stage from the words of its command line, defaults filled in.

    The instance may come first, without `--name`. Wrong words end the process with 2. Raises
    KeyError for a stage that has no `run`.
    """
    names, paths = options_of(stage), layout.STAGES[stage]
    if names is None:
        raise KeyError(f"{stage} has a command line of its own")
    if "name" in names and words and not words[0].startswith("-"):
        words = ["--name", *words]
    parser = argparse.ArgumentParser(prog=f"limpid {stage}", description=summary(STAGES, stage))
    for name in names:
        path = paths.get(name)
        # Without a name, the view lists the names there are.
        required = path is None and name != "name"
        about = f"by default {path}" if path else None
        parser.add_argument(f"--{name.replace('_', '-')}", required=required, help=about)
    given = {k: v for k, v in vars(parser.parse_args(words)).items() if v is not None}
    defaults = {k: path.format(name=given.get("name", "")) for k, path in paths.items()}
    options = {**defaults, **given}
    return {name: options[name] for name in names if name in options}


def _source(package: str, name: str) -> ast.Module:
    return ast.parse((folder(package) / f"{name}.py").read_text(encoding="utf-8"))
