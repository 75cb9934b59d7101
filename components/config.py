"""The base of every configuration section: strict, frozen, and without silent defaults.

A section sits beside the code that reads it; hyper-parameter variants are tagged unions over
`kind`, and a section knows how to build its thing.
"""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen section of the parameters: unknown keys and lossy conversions are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
