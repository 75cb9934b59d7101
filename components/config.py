"""The base class of every section of the parameters: strict, frozen, and without silent defaults.

A section is defined beside the code that reads it, and builds the object it describes. Variants are
tagged unions over the field `kind`.
"""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen section of the parameters; unknown keys and lossy conversions are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
