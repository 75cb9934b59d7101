"""The base of every configuration section: strict, frozen, and without silent defaults.

A section sits beside the code that reads it; hyper-parameter variants are tagged unions over
`kind`, and a section knows how to build its thing.
"""

import difflib
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen section of the parameters: unknown keys and lossy conversions are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ConfigError(ValueError):
    """Parameters that cannot be used: one sentence, said before anything starts."""


def near(name: str, names: Iterable[str]) -> str:
    """Ask for the one of `names` that is most like a wrong one, to end a sentence with."""
    near = difflib.get_close_matches(name, sorted(names), 1)
    return f", did you mean {near[0]}?" if near else ""
