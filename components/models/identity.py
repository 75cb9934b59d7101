"""The identity of a network: digests of its weights and of the code that they run in.

Equal weights in changed code are another defense. The salt of a defense's noise, the draw of the
images that probes look at, and the registry go by this identity.
"""

import ast
import hashlib
import importlib.util
import io
import sys
import tokenize
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from torch import nn

from components.config import Config
from components.plugins import is_plugin, package_of

# Every defense runs through these modules, whatever it is made of.
ALWAYS = ("components.models.defense", "components.data.draws")
# No answer of a network depends on how plugins are found, and no result on a change of that.
APART = ("components.plugins",)
# Attributes of these types are settings. Tensors are in the state, and other objects have no text
# that is the same in every process.
SETTINGS = (bool, int, float, str, Config)
# The folders that libraries are installed in.
INSTALLED = {"site-packages", "dist-packages"}


def state_digest(module: nn.Module) -> str:
    """Return one sha256 of all parameters and buffers, which shows whether they have changed."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def code_digest(module: nn.Module) -> str:
    """Return one sha256 of the source that a network is made of, without comments and docstrings.

    These are the files that define the classes of its parts, and the files of the same packages or
    folders that these import. Torch and other libraries are left out, but not plugins.
    """
    return _digest_of(frozenset(modules_of(module)))


def modules_of(network: nn.Module) -> set[str]:
    """Return the names of the modules that define the classes of its parts, and their functions."""
    names = {type(part).__module__ for part in network.modules()}
    for part in network.modules():
        held = [value for value in vars(part).values() if callable(value)]
        names |= {str(each.__module__) for each in held if getattr(each, "__module__", None)}
    return names


def identity(module: nn.Module) -> str:
    """Return one sha256 of weights, code, and the kind and settings of every part."""
    digest = hashlib.sha256(f"{state_digest(module)} {code_digest(module)}".encode())
    for name, part in module.named_modules():
        kind = type(part)
        digest.update(f"\n{name} {kind.__module__}.{kind.__qualname__}".encode())
        for key, value in sorted(vars(part).items()):
            if isinstance(value, SETTINGS) and key != "training" and not key.startswith("_"):
                digest.update(f" {key}={value!r}".encode())
    return digest.hexdigest()


def sources(names: Iterable[str]) -> dict[str, Path]:
    """Return the files of modules `names` and of all that they import from the same packages.

    A module outside any package stands for all modules in its folder.
    """
    own = [name for name in names if not _is_library(name)]
    roots = [root for root in map(_root, own) if root]
    found: dict[str, Path] = {}
    waiting = own
    while waiting:
        name = waiting.pop()
        path = _file(sys.modules.get(name))
        if (
            name in (*found, *APART)
            or path is None
            or not any(path.is_relative_to(root) for root in roots)
        ):
            continue
        found[name] = path
        waiting += [other for other in _imports(name, path) if not _is_library(other)]
    return found


def stripped(source: str) -> str:
    """Return Python source without comments, docstrings and blank lines."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if first and ast.get_docstring(node, clean=False) is not None:
                lines[first.lineno - 1 : first.end_lineno] = [""] * _height(first)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _height(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


@lru_cache
def _digest_of(names: frozenset[str]) -> str:
    digest = hashlib.sha256()
    for name, path in sorted(sources((*names, *ALWAYS)).items()):
        digest.update(f"{name}\n{stripped(path.read_text(encoding='utf-8'))}\n".encode())
    return digest.hexdigest()


def _is_library(name: str) -> bool:
    """Say whether a module belongs to Python or to an installed library, but for our plugins."""
    top = name.partition(".")[0]
    if top == "components" or is_plugin(name):
        return False
    path = _file(sys.modules.get(name))
    if path is None or top in sys.stdlib_module_names:
        return True
    return not INSTALLED.isdisjoint(path.parts)


def _root(name: str) -> Path | None:
    """Return the folder of the top package of a module; of a module without one, its folder."""
    path = _file(sys.modules.get(package_of(name)))
    return path.parent if path else None


def _file(module: ModuleType | None) -> Path | None:
    path = getattr(module, "__file__", None)
    return Path(path) if path and path.endswith(".py") else None


def _imports(name: str, path: Path) -> Iterator[str]:
    """Yield the names of modules that a file imports; some may be names inside of a module."""
    module = sys.modules[name]
    package = name if hasattr(module, "__path__") else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = importlib.util.resolve_name("." * node.level + base, package)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
