"""Networks whose code a user brings: its files, the function that makes the network, its weights.

A model folder of such a network has a card of kind `external` and holds the code in `code/`, so
that every process with the folder can build the network again. Loading it runs that code: load only
folders whose code you trust.

The files are imported by their own names, from a copy: nothing is written beside the originals, and
the identity of a network does not depend on where they lie.
"""

import atexit
import hashlib
import importlib
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from components.config import Config
from components.data.draws import Draws
from components.data.shards import write_bytes
from components.models.defense import Defense
from components.models.foreign import (
    ForeignClassifier,
    ForeignPurifier,
    adopt_classifier,
    adopt_purifier,
    anchored,
    unwrapped,
)
from components.models.identity import INSTALLED
from components.models.preprocessing import ForeignError, Size, first_line, read_weights
from components.models.purifiers.contract import Purifier

Family = Literal["classifier", "purifier"]
# Packages of Limpid, which may lie in the current folder.
OWN = ("limpid", "components", "pipelines")
# Digests of the code that this process has imported, by the names of its modules.
_IMPORTED: dict[str, str] = {}


class External(Config):
    """A network of a user's code, and what was found out about it when it was imported.

    `factory` is `module:function` in the code, called with `arguments`; `code` is the digest of all
    files. The rest is what `foreign` made of the network: whether it is `wrapped`, and if so
    whether it is random, whether a purifier has a gradient, and the sizes between which a
    classifier resizes.
    """

    kind: Literal["external"]
    factory: str
    arguments: dict[str, Any]
    code: str
    wrapped: bool
    stochastic: bool
    differentiable: bool
    resized: tuple[Size, Size] | None

    def build(self, files: Mapping[str, bytes], family: Family) -> nn.Module:
        """Return the network from the files of its code, without its weights.

        Raises ForeignError where the files are others, or make no network any more.
        """
        if digest_of(files) != self.code:
            raise ForeignError("the code of the network is not the code that was imported")
        network = make(files, self.factory, self.arguments)
        if family == "purifier":
            if not self.wrapped:
                return network
            return ForeignPurifier(network, self.stochastic, self.differentiable)
        if not self.wrapped:
            return anchored(network, "cpu")
        return ForeignClassifier(network, self.stochastic, self.resized)


def read_code(path: Path) -> dict[str, bytes]:
    """Return the Python files of a file or folder, by their paths in it.

    A folder with `__init__.py` is a package: its files are named below it. Raises ForeignError
    where there are none.
    """
    if path.is_file():
        return {path.name: path.read_bytes()}
    top = path.parent if (path / "__init__.py").is_file() else path
    found = {file.relative_to(top): file for file in sorted(path.rglob("*.py"))}
    files = {
        name.as_posix(): file.read_bytes()
        for name, file in found.items()
        if not any(part.startswith(".") for part in name.parts)
    }
    if not files:
        raise ForeignError(f"{path} has no Python files; name the file or folder of the network")
    return files


def write_code(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files of a network's code below a folder."""
    for name, content in files.items():
        write_bytes(folder / name, content)


def digest_of(files: Mapping[str, bytes]) -> str:
    """Return the sha256 of files, names and contents."""
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


@contextmanager
def no_files_beside() -> Iterator[None]:
    """Raise ForeignError if a file of the current folder is imported meanwhile, but for Limpid's.

    The code is stored without it, and other processes would lack it.
    """
    here, before = Path.cwd(), set(sys.modules)
    yield
    for name in sorted(set(sys.modules) - before):
        path = Path(getattr(sys.modules.get(name), "__file__", None) or "/")
        known = name.partition(".")[0] in (*OWN, *sys.stdlib_module_names)
        # The current folder may hold an environment, and the copies of the code.
        stored = not INSTALLED.isdisjoint(path.parts) or path.is_relative_to(_unpacked_in())
        if path.is_relative_to(here) and not known and not stored:
            raise ForeignError(
                f"the code imports {name} from {path}, which is not one of its files; put both "
                "into one folder, and name that as the code"
            )


@no_files_beside()
def import_network(
    files: Mapping[str, bytes], factory: str, arguments: Mapping[str, Any], weights: Path | None,
    images: Tensor, classes: int,
) -> tuple[nn.Module, Family, External]:  # fmt: skip
    """Make a network of a user's code, fill in its weights, and find out what it is like.

    It is tried on the first of `images`, pixels (N,C,H,W) in [0,1]. If the answer has four
    dimensions it is a purifier, else a classifier. Returns the network as it is attacked, frozen,
    in eval mode.

    Raises ForeignError where there is no such network or it cannot be judged as it is, one sentence
    for each reason.
    """
    network = make(files, factory, arguments)
    if weights is not None:
        load_weights(network, weights)
    family: Family = "classifier"
    adopted: nn.Module
    if isinstance(network, Purifier) or _maps_images(network, images[:2]):
        family, adopted = "purifier", adopt_purifier(network, images)
    else:
        adopted = adopt_classifier(network, images, classes)
        with torch.no_grad():
            some, draws = images[:2], Draws(0, "clean", torch.arange(len(images[:2])))
            columns = Defense(adopted, None).classify(some, draws).shape[1]
        if columns != classes:
            raise ForeignError(
                f"the classifier has {columns} classes, and the images have {classes}; write a "
                "module whose forward picks the columns of these classes"
            )
    found = External(
        kind="external", factory=factory, arguments=dict(arguments), code=digest_of(files),
        wrapped=isinstance(adopted, ForeignClassifier | ForeignPurifier),
        stochastic=getattr(adopted, "stochastic", False),
        differentiable=getattr(adopted, "differentiable", True),
        resized=getattr(adopted, "resized", None),
    )  # fmt: skip
    return adopted, family, found


def load_weights(network: nn.Module, path: Path) -> None:
    """Load a file of weights into a network; raise ForeignError where it is not for this one."""
    stored = read_weights(path)
    try:
        missing, unexpected = network.load_state_dict(stored, strict=False)
    except RuntimeError as error:
        # The first line names the class, the next ones the tensors of other shapes.
        lines = [line.strip().rstrip(".") for line in str(error).splitlines()]
        raise ForeignError(f"{path} does not fit the network: {(lines[1:] or lines)[0]}") from None
    if missing or unexpected:
        of = f"lacks {', '.join(missing[:3])}" if missing else f"has {', '.join(unexpected[:3])}"
        too = "which the network has" if missing else "which the network has not"
        raise ForeignError(f"{path} {of}, {too}; the names must be those of its state_dict")


def make(files: Mapping[str, bytes], factory: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Call `module:function` of the code with its arguments, and return the network.

    Raises ForeignError where the code cannot be imported, fails, or returns something else.
    """
    name, _, function = factory.partition(":")
    module = _import(files, name)
    found = getattr(module, function, None)
    if not callable(found):
        raise ForeignError(f"{name} has no function {function}; name module:function")
    try:
        network = found(**arguments)
    except (Exception, SystemExit) as error:
        raise ForeignError(
            f"{factory} fails with the arguments {dict(arguments)}: {first_line(error)}"
        ) from error
    if not isinstance(network, nn.Module):
        raise ForeignError(
            f"{factory} returns a {type(network).__name__}; it must return a torch.nn.Module"
        )
    return unwrapped(network)


def require_equal(network: nn.Module, again: nn.Module, images: Tensor) -> None:
    """Raise ForeignError where a network that was built again answers otherwise.

    Its state_dict is stored, and the function called anew in every process.
    """
    noise = Draws(0, "clean", torch.arange(len(images))).stream("import")

    def answer(one: nn.Module) -> Tensor:
        with torch.no_grad():
            if isinstance(one, Purifier):
                purified: Tensor = one(images, noise if one.stochastic else None)
                return purified
            return Defense(one, None).classify(images, noise)

    if not torch.allclose(answer(network), answer(again), rtol=1e-4, atol=1e-5):
        raise ForeignError(
            "the function makes another network at every call; keep all that it draws or reads in "
            "parameters and buffers, or seed it"
        )


def _import(files: Mapping[str, bytes], name: str) -> Any:
    """Import a module of the code; other code has to have other names in one process."""
    digest, tops = digest_of(files), {file.split("/")[0].removesuffix(".py") for file in files}
    if name.partition(".")[0] not in tops:
        raise ForeignError(f"the code has no module {name}; it has {', '.join(sorted(tops))}")
    for top in sorted(tops):
        _require_free(top, digest)
        _IMPORTED[top] = digest
    folder = _unpacked_in() / digest
    if not folder.exists():
        write_code(folder, files)
        importlib.invalidate_caches()
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise ForeignError(f"the code of {name} cannot be imported: {first_line(error)}") from error


def _require_free(top: str, digest: str) -> None:
    """Raise ForeignError where a name of the code is that of other code in this process."""
    if _IMPORTED.get(top, digest) != digest:
        raise ForeignError(
            f"two networks have different code called {top}; rename one of the two files or folders"
        )
    if top in _IMPORTED:
        return
    found = sys.modules.get(top)
    if found is not None:
        of = getattr(found, "__file__", None) or "Python"
    elif top in sys.stdlib_module_names:
        of = "Python"
    else:
        spec = importlib.util.find_spec(top)
        of = (spec and spec.origin) or ""
        # A file of the current folder may be the code itself.
        if INSTALLED.isdisjoint(Path(of).parts):
            return
    raise ForeignError(f"the code has {top}, which is also the name of a module of {of}; rename it")


@cache
def _unpacked_in() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="limpid-code-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _maps_images(network: nn.Module, x: Tensor) -> bool:
    """Say whether the answer to pixels (N,C,H,W) has four dimensions, as images have."""
    try:
        with torch.no_grad(), torch.random.fork_rng():
            answer = network.eval()(x)
    except Exception:
        # The sentence about a classifier says what is wrong.
        return False
    return isinstance(answer, Tensor) and answer.ndim == 4
