"""The search space of a study: the domain of each parameter, and how values get into parameters.

A parameter is named by its key in params.yaml, from the section down:
`students.mine.objective.beta`. Parameters are plain nested mappings here, as YAML gives them.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from components.config import Config

Value = bool | int | float | str


class Range(Config):
    """Base of the domains with two bounds, both included."""

    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low {self.low} must be below high {self.high}")
        return self

    def bounds(self) -> tuple[Value, ...]:
        """Return the values that are checked before a search starts."""
        return self.low, self.high

    def contains(self, value: Value) -> bool:
        """Say whether `value` lies in this domain."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.low <= float(value) <= self.high


class Uniform(Range):
    """Any number between two bounds."""

    kind: Literal["uniform"]


class LogUniform(Range):
    """A positive number whose logarithm is uniform: for rates and weights."""

    kind: Literal["log_uniform"]
    low: Annotated[float, Field(gt=0)]


class Integer(Range):
    """A whole number."""

    kind: Literal["integer"]
    low: int
    high: int


class Choice(Config):
    """One of some values."""

    kind: Literal["choice"]
    values: Annotated[list[Value], Field(min_length=2)]

    def bounds(self) -> tuple[Value, ...]:
        """Return all values."""
        return tuple(self.values)

    def contains(self, value: Value) -> bool:
        """Say whether `value` is one of them."""
        return value in self.values


Domain = Annotated[Uniform | LogUniform | Integer | Choice, Field(discriminator="kind")]


def get(document: Mapping[str, Any], key: str) -> Any:
    """Return the value at `section.key`; ValueError where there is no such key."""
    value: Any = document
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ValueError(f"there is no {key} in the parameters")
        value = value[part]
    return value


def put(document: Mapping[str, Any], values: Mapping[str, Value]) -> dict[str, Any]:
    """Return a copy of `document` with `values` at their keys; ValueError for unknown keys."""
    changed = copy.deepcopy(dict(document))
    for key, value in values.items():
        get(document, key)
        *sections, last = key.split(".")
        get(changed, ".".join(sections))[last] = value
    return changed


def flatten(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Value]]:
    """Yield (key, value) of nested mappings, the key from the outermost section down."""
    for name, value in nested.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def nest(values: Mapping[str, Value]) -> dict[str, Any]:
    """Turn keys and values into nested mappings, as they stand in params.yaml."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *sections, last = key.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return nested
