"""What a search may turn: values to choose among, and how they get into parameters.

A domain is named by its place in params.yaml, as `section.key`: `students.mine.objective.beta`.
Parameters are plain nested mappings here, as YAML gives them.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from components.config import Config

Value = bool | int | float | str


class Range(Config):
    """Base of the domains with two ends, both of them allowed."""

    low: float
    high: float

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low {self.low} must be below high {self.high}")
        return self

    def bounds(self) -> tuple[Value, ...]:
        """Return the values to try before anything starts."""
        return self.low, self.high

    def contains(self, value: Value) -> bool:
        """Say whether `value` is one this domain may take."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.low <= float(value) <= self.high


class Uniform(Range):
    """Any number between two ends."""

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


def get(document: Mapping[str, Any], place: str) -> Any:
    """Return what stands at `section.key`; ValueError where there is no such place."""
    value: Any = document
    for part in place.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ValueError(f"there is no {place} in the parameters")
        value = value[part]
    return value


def put(document: Mapping[str, Any], values: Mapping[str, Value]) -> dict[str, Any]:
    """Return a copy of `document` with `values` at their places; ValueError for unknown places."""
    changed = copy.deepcopy(dict(document))
    for place, value in values.items():
        get(document, place)
        *folders, last = place.split(".")
        get(changed, ".".join(folders))[last] = value
    return changed


def flatten(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Value]]:
    """Yield (place, value) of nested mappings."""
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def nest(values: Mapping[str, Value]) -> dict[str, Any]:
    """Turn places and values into nested mappings, as they stand in params.yaml."""
    nested: dict[str, Any] = {}
    for place, value in values.items():
        *folders, last = place.split(".")
        inner = nested
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[last] = value
    return nested
