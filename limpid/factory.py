"""Networks from a function of the caller: `module:function` or `file.py:function`, and weights."""

import importlib
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from components.models.defense import Defense
from components.models.external import load_weights
from components.models.preprocessing import first_line
from limpid.judging import BARE, PURIFIER, UNSEEN
from pipelines.errors import ConfigError, near

# Frames of libraries and of the import say less than the caller's line that led there.
LIBRARY = re.compile(r"^<frozen|[/\\]lib[/\\]python3")
FORM = "write module:function or file.py:function"


def networks_of(
    factory: str, unseen: str | None, weights: Mapping[str, Path]
) -> dict[str, nn.Module | None]:
    """Return the classifier, the purifier and the unseen classifier that factories return.

    A factory takes no arguments, and returns a classifier, a pair (classifier, purifier) or a
    `Defense`. `weights` are files by network; each has to fit it, name by name. Raises ConfigError
    or ForeignError, in one sentence, for anything else.
    """
    made = _call(factory)
    if isinstance(made, Defense):
        made = (made.classifier, made.purifier)
    classifier, purifier = (
        made if isinstance(made, tuple | list) and len(made) == 2 else (made, None)
    )
    if not isinstance(classifier, nn.Module) or not isinstance(purifier, nn.Module | None):
        raise ConfigError(_strange(factory, made, "a classifier, or a pair (classifier, purifier)"))
    networks = {BARE: classifier, PURIFIER: purifier, UNSEEN: None}
    if unseen is not None:
        networks[UNSEEN] = other = _call(unseen)
        if not isinstance(other, nn.Module):
            raise ConfigError(_strange(unseen, other, "a classifier"))
    for name, path in weights.items():
        network = networks[name]
        if network is None:
            raise ConfigError(f"{path} is for the {name}, and there is no {name} to load it into")
        load_weights(network, path)
    return networks


def _call(factory: str) -> Any:
    """Return what a factory returns."""
    function = _function(factory)
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{factory} raised {_said(error)}") from error


def _function(factory: str) -> Callable[[], Any]:
    place, _, name = factory.rpartition(":")
    if not place or not name.isidentifier():
        raise ConfigError(f"the factory is {factory!r}; {FORM}")
    module = _imported(place)
    found = getattr(module, name, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if callable(value)]
        problem = (
            f"has no function {name}" if found is None else f"has a {name} that is no function"
        )
        raise ConfigError(f"{place} {problem}{near(name, known) or f'; {FORM}'}")
    function: Callable[[], Any] = found
    return function


def _imported(place: str) -> ModuleType:
    """Import a module that can be found from the current folder, or a file."""
    path = Path(place).absolute() if place.endswith(".py") else None
    if path is not None and not path.is_file():
        raise ConfigError(f"{place} is not there; {FORM}")
    name = path.stem if path else place
    sys.path.insert(0, str(path.parent if path else Path.cwd()))
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent and f"{name}.".startswith(f"{absent}."):
            raise ConfigError(
                f"there is no module {name} here or among what is installed; {FORM}"
            ) from None
        raise ConfigError(f"{place} cannot be imported: it raised {_said(error)}") from error
    if path is not None and Path(module.__file__ or "").resolve() != path.resolve():
        raise ConfigError(f"{place} has the name of another module, {name}; rename the file")
    return module


def _said(error: BaseException) -> str:
    """Return kind, first line and place of an error in somebody else's code."""
    files = traceback.extract_tb(error.__traceback__)
    own = [f for f in files if f.filename != __file__ and not LIBRARY.search(f.filename)]
    where = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {first_line(error)}{where}"


def _strange(factory: str, made: Any, wanted: str) -> str:
    kind = type(made).__name__
    if isinstance(made, tuple | list):
        kind += f" of {', '.join(type(one).__name__ for one in made) or 'nothing'}"
    elif isinstance(made, type):
        kind = f"the class {made.__name__}"
    return f"{factory} returned {kind}; it must return {wanted}, each a torch.nn.Module"
