"""The key of a result: a digest of the parameters, inputs and code that it depends on."""

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
from pipelines.layout import SOURCES
from pipelines.storage.object_store import Listing

SCHEMA = 1
# No result depends on these packages: a change of them must not retrain anything. What a plugin
# computes depends on its own code, which the parameters name.
PLUMBING = (
    "components.plugins",
    *(
        f"pipelines.{name}"
        for name in ("cluster", "config", "errors", "layout", "runner", "storage", "tracking")
    ),
)


def stage_key(module: Any, view: View, inputs: Mapping[str, str]) -> str:
    """Return the sha256 of all that the result of a stage depends on.

    `inputs` are the digests of the inputs by option.
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
    through parameters, which no import shows. `PLUMBING` is left out.
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
    """Yield the project files that a file imports, without the plumbing."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.startswith(("components.", "pipelines.")) and not name.startswith(PLUMBING):
                base = SOURCES.joinpath(*name.split("."))
                # A package of pipelines has only a docstring in its `__init__`.
                inits = [base / "__init__.py"] if name.startswith("components.") else []
                yield from filter(Path.is_file, [base.with_suffix(".py"), *inits])


def _package(path: Path) -> list[Path]:
    """Return all files of the package of `components` that holds a file, with its sub-packages."""
    inner = path.relative_to(SOURCES).parts
    if inner[0] != "components" or len(inner) < 3:
        return []
    return sorted(SOURCES.joinpath(*inner[:2]).rglob("*.py"))


def input_digest(path: Path) -> str:
    """Return the digest of an input: that of its manifest if it has one, else over its files."""
    if not path.exists():
        raise DataError(f"{path} is missing: the stage that makes it has not run")
    if (path / MANIFEST).is_file():
        return shards.fingerprint(path)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return _over(
        {"" if f == path else f.relative_to(path).as_posix(): shards.sha256(f) for f in files}
    )


def listing_digest(listing: Listing) -> str:
    """Return the `input_digest` of an input that lies in the store."""
    digests = {file.path: file.sha256 for file in listing.files}
    return digests[MANIFEST] if MANIFEST in digests else _over(digests)


def _over(digests: Mapping[str, str]) -> str:
    listing = [f"{path} {digest}" for path, digest in digests.items()]
    return hashlib.sha256("\n".join(listing).encode()).hexdigest()
