"""Networks from a function of the caller: `module:function` or `file.py:function`, and weights."""

import importlib
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from components.models.defense import Defense
from components.models.preprocessing import first_line, read_weights
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
    `Defense`. `weights` are files by network; each has to fit it, name by name. Raises ConfigError,
    in one sentence, for anything else.
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
        _load(name, networks[name], path)
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


def _load(name: str, network: nn.Module | None, path: Path) -> None:
    """Load the weights of a network; raise ConfigError where a name or a shape does not fit."""
    if network is None:
        raise ConfigError(f"there are weights for the {name}, and no {name} to load them into")
    stored, own = read_weights(path), network.state_dict()
    lacking = {
        "it lacks": [key for key in own if key not in stored],
        "the network has no": [key for key in stored if key not in own],
        "of another shape are": [
            f"{key} {tuple(stored[key].shape)} for {tuple(own[key].shape)}"
            for key in own
            if key in stored and stored[key].shape != own[key].shape
        ],
    }
    problems = [f"{problem} {_some(keys)}" for problem, keys in lacking.items() if keys]
    if problems:
        raise ConfigError(f"{path} does not fit the {name}: {'; '.join(problems)}")
    network.load_state_dict(stored)


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
