"""What a result depends on: parameters, inputs and code, and the key made of them."""

import ast
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from components.data import shards
from components.data.shards import MANIFEST, DataError
from pipelines.config.views import View

SCHEMA = 1
SOURCES = Path(__file__).parent.parent.parent
PLUMBING = tuple(
    f"pipelines.{name}"
    for name in ("cluster", "config", "errors", "layout", "runner", "storage", "tracking")
)


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

    Of `components` these are whole packages: a tagged union may reach any file of its package
    through parameters, which no import shows. The plumbing is left out on purpose: changing it must
    not retrain anything.
    """
    seen: set[Path] = set()
    waiting = [Path(module.__file__)]
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen.add(path)
            waiting += [*_imported(path), *_package(path)]
    return sorted(path.relative_to(SOURCES) for path in seen)


def _imported(path: Path) -> Iterator[Path]:
    """Yield the project files that a file imports, but for the plumbing."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.startswith(("components.", "pipelines.")) and not name.startswith(PLUMBING):
                base = SOURCES.joinpath(*name.split("."))
                # A package of pipelines has nothing but a docstring in its `__init__`.
                inits = [base / "__init__.py"] if name.startswith("components.") else []
                yield from filter(Path.is_file, [base.with_suffix(".py"), *inits])


def _package(path: Path) -> list[Path]:
    """Return all files of the package of `components` that a file is in, sub-packages too."""
    inner = path.relative_to(SOURCES).parts
    if inner[0] != "components" or len(inner) < 3:
        return []
    return sorted(SOURCES.joinpath(*inner[:2]).rglob("*.py"))


def input_digest(folder: Path) -> str:
    """Fingerprint an input: by its manifest where it has one, else by its files."""
    if not folder.exists():
        raise DataError(f"{folder} is missing: the stage that makes it has not run")
    if (folder / MANIFEST).is_file():
        return shards.fingerprint(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listing = [f"{path.relative_to(folder)} {shards.sha256(path)}" for path in files]
    return hashlib.sha256("\n".join(listing).encode()).hexdigest()
