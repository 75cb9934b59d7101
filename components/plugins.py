"""Kinds that other installed packages add, by entry points of the groups `limpid.GROUP`.

The section of such a kind has one field more, `plugin`: name and version of its distribution and a
digest of all files of its package. What is installed must be what is named there, so whatever
depends on a section depends on that code, too.

Plugins are loaded when a union is first used, which is after their own modules were imported where
a program begins with those. A module of a plugin may import all of `components` but `selftest`.
"""

import hashlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache, reduce
from importlib.metadata import EntryPoint, entry_points
from itertools import accumulate
from operator import or_
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, Field, ValidationError, create_model
from pydantic_core import ErrorDetails, PydanticCustomError

from components.config import Config

GROUPS = ("purifiers", "attacks", "classifiers", "datasets", "checks")
# Kinds of cards that no section of params.yaml has.
RESERVED = ("given", "external")
# The type of the error where another plugin is installed than the one that is named.
OTHER = "other_plugin"
KIND = re.compile(r"[a-z][a-z0-9_]*")
# Under this name a section with its pin is found again by what unpickles it.
NAME = "{}:{}"
# Tags of the unions that plugins may add to, as pydantic's errors list them.
_tags: set[str] = set()


class PluginError(ValueError):
    """A plugin that cannot be used; the text is one sentence."""


def unions(
    module: str, group: str, table: Mapping[str, tuple[Any, type[Config]]]
) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module whose unions plugins of a group add to.

    `table` has the union of the built-in sections of each, and the base class of its sections.
    The tagged unions are built when they are first asked for. They raise PluginError where a plugin
    cannot be used, or takes a kind that is taken.
    """

    def build(name: str) -> Any:
        if name not in table:
            raise AttributeError(f"module {module} has no attribute {name}")
        own = {kind for built_in, _ in table.values() for kind in map(kind_of, get_args(built_in))}
        bases = tuple(dict.fromkeys(base for _, base in table.values()))
        built_in, base = table[name]
        sections = list(get_args(built_in))
        for kind, (point, section) in _loaded(group).items():
            if kind in own or kind in RESERVED:
                raise PluginError(f"{_named(point)} has the kind {kind}, which Limpid has: {CLASH}")
            if not issubclass(section, bases):
                allowed = " or ".join(f"{one.__module__}.{one.__qualname__}" for one in bases)
                raise PluginError(
                    f"{_named(point)} is {point.value}, which is no {allowed}: derive it from that"
                )
            if issubclass(section, base):
                sections.append(section)
        _tags.add(", ".join(repr(kind_of(section)) for section in sections))
        either: Any = reduce(or_, sections)
        made = Annotated[either, Field(discriminator="kind")]
        setattr(sys.modules[module], name, made)
        return made

    return build


CLASH = "rename one of them, or uninstall the plugin"


def members(union: Any) -> dict[str, type[Config]]:
    """Return the sections of a tagged union by kind."""
    return {kind_of(section): section for section in get_args(get_args(union)[0])}


def kind_of(section: type[Config]) -> str:
    """Return the tag of a section."""
    return str(get_args(section.model_fields["kind"].annotation)[0])


def in_words(error: ValidationError) -> tuple[ErrorDetails, str]:
    """Return the first error of a section and its message; for an unknown kind with a hint."""
    first = error.errors()[0]
    return first, first["msg"].removeprefix("Value error, ") + hint(first)


def hint(error: ErrorDetails) -> str:
    """Return the end of a sentence for a kind that nobody has, where a plugin could have it."""
    if error["type"] == "union_tag_invalid" and error["ctx"]["expected_tags"] in _tags:
        return "; if it comes from a plugin, this Python lacks it: install it here"
    return ""


def checks(named: Mapping[str, str]) -> Mapping[str, Callable[..., Any]]:
    """Return the checks that are `named`, with the plugin that each comes from.

    Raises PluginError for one that no plugin here has, or two have, and the error of a pin
    (`OTHER`) where another plugin is installed than is named. A check that fails raises
    PluginError, too.
    """
    there: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group="limpid.checks"), key=_named):
        if point.name in there and point.name in named:
            other = _named(there[point.name])
            raise PluginError(
                f"{_named(point)} has the check {point.name}, and so has {other}: {CLASH}"
            )
        there[point.name] = point
    found: dict[str, Callable[..., Any]] = {}
    for name in named:
        if name not in there:
            known = f"there are {', '.join(sorted(there))}" if there else "there is none"
            raise PluginError(f"no plugin here has the check {name}; {known}")
        check = load(there[name])
        if not callable(check):
            raise PluginError(f"{_named(there[name])} is {there[name].value}, which is no function")
        found[name] = _in_one_sentence(there[name], check)
    pins = {name: pin(there[name]) for name in named}
    stale = [name for name in named if named[name] != pins[name]]
    if stale:
        raise _other(f"{_says(named[stale[0]])} for {stale[0]}", pins[stale[0]], pins)
    return found


def _in_one_sentence(point: EntryPoint, check: Callable[..., Any]) -> Callable[..., Any]:
    """Return a check whose own errors are raised as PluginError."""

    def asked(*given: Any) -> Any:
        try:
            return check(*given)
        # Any code may run in a check.
        except Exception as error:
            # Where tasks are run there is advice for this; torch takes seconds to import.
            if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
                raise
            reason = next(iter(str(error).splitlines()), "")
            raise PluginError(
                f"{_named(point)} failed in its check, {type(error).__name__}: {reason}; repair "
                "it, or leave it out of checks.plugins"
            ) from error

    return asked


def is_plugin(module: str) -> bool:
    """Say whether a module that was imported belongs to the package of an installed plugin."""
    return any(_inside(module, package) for package in _packages())


def package_of(module: str) -> str:
    """Return the outermost package of a module that was imported, and is no bare namespace."""
    names = accumulate(module.split("."), "{}.{}".format)
    return next((name for name in names if _file(name)), module)


def __getattr__(name: str) -> Any:
    group, colon, kind = name.partition(":")
    if not colon:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    if kind not in _loaded(group):
        raise PluginError(f"no plugin here has {kind} in limpid.{group}: install it on this node")
    return _loaded(group)[kind][1]


@cache
def _loaded(group: str) -> Mapping[str, tuple[EntryPoint, type[Config]]]:
    """Return entry points and sections of a group by kind, each section with its pin."""
    found: dict[str, tuple[EntryPoint, type[Config]]] = {}
    for point in sorted(entry_points(group=f"limpid.{group}"), key=_named):
        section = _section(point)
        kind = kind_of(section)
        if kind in found:
            raise PluginError(
                f"{_named(point)} has the kind {kind}, and so has {_named(found[kind][0])}: {CLASH}"
            )
        found[kind] = point, _pinned(section, NAME.format(group, kind), pin(point))
    return found


def _section(point: EntryPoint) -> type[Config]:
    """Load the section of an entry point; raise PluginError for anything else."""
    section = load(point)
    if isinstance(section, type) and issubclass(section, Config):
        fields = section.model_fields
        kinds = get_args(fields["kind"].annotation) if "kind" in fields else ()
        if len(kinds) == 1 and KIND.fullmatch(str(kinds[0])) and "plugin" not in fields:
            return section
    raise PluginError(
        f"{_named(point)} is {point.value}, which is no section: a Config with one field "
        'kind: Literal["name_in_small_letters"], and none called plugin'
    )


def load(point: EntryPoint) -> Any:
    """Import what an entry point names; raise PluginError where that fails."""
    try:
        return point.load()
    # Any code may run when a module is imported.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        half = "partially initialized" in reason
        do = (
            "let its modules import nothing of pipelines, limpid and components.selftest"
            if half
            else "repair it, or uninstall it"
        )
        raise PluginError(
            f"{_named(point)} cannot be imported, {type(error).__name__}: {reason}; {do}"
        ) from error


def pin(point: EntryPoint) -> str:
    """Return name, version and digest of the plugin of an entry point that was loaded."""
    assert point.dist is not None
    return f"{point.dist.name} {point.dist.version} sha256-{_digest(package_of(point.module))}"


@cache
def _digest(package: str) -> str:
    """Return one sha256 of all files of a package, or of the one file of a module.

    Bytecode and hidden files are left out.
    """
    digest, main = hashlib.sha256(), _file(package)
    if main is None or not main.is_file():
        raise PluginError(f"the plugin {package} has no files: install it unpacked")
    whole = hasattr(sys.modules[package], "__path__")
    for name, path in sorted(_files(main.parent)) if whole else [(main.name, main)]:
        digest.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
        if path.is_file() and not hidden:
            yield "/".join(parts), path


def _pinned(section: type[Config], name: str, installed: str) -> type[Config]:
    """Return a section with the field `plugin`, which must name what is installed."""

    def same(given: str) -> str:
        if given != installed:
            raise _other(_says(given), installed, installed)
        return given

    # The default is refused too: that way all that is missing is found together.
    field: Any = Annotated[str, AfterValidator(same)], Field(default="", validate_default=True)
    made = create_model(
        section.__name__, __base__=section, __doc__=section.__doc__, __module__=__name__,
        plugin=field,
    )  # fmt: skip
    made.__qualname__ = name
    return made


def _says(named: str) -> str:
    return f"names {named}" if named else "is missing"


def _other(says: str, installed: str, right: Any) -> PydanticCustomError:
    """Return the error for another plugin than is installed; `right` is what should be given."""
    return PydanticCustomError(
        OTHER, "{says}, and {installed} is installed",
        {"says": says, "installed": installed, "right": right},
    )  # fmt: skip


@cache
def _points() -> tuple[EntryPoint, ...]:
    return tuple(point for group in GROUPS for point in entry_points(group=f"limpid.{group}"))


def _packages() -> set[str]:
    return {package_of(point.module) for point in _points()}


def _inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _file(module: str) -> Path | None:
    path = getattr(sys.modules.get(module), "__file__", None)
    return Path(path) if path else None


def _named(point: EntryPoint) -> str:
    """Return what sentences call an entry point."""
    owner = point.dist.name if point.dist else "?"
    return f"the plugin {owner} ({point.group}: {point.name})"
