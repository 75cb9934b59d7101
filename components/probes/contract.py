"""The finding that every check returns."""

from typing import Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import model_validator

from components.config import Config

# The p-value under which a paired test fails a check, after Holm's correction.
SIGNIFICANT = 0.01

# Fraction of right answers per image (N,).
Accuracies = npt.NDArray[np.float64]


class Finding(Config):
    """The outcome of one check: `detail` is a sentence, `figures` are its numbers for programs.

    If a check of level `block` fails, the score it is about is an upper bound and not a result. One
    that was not `asked`, for want of something that it needs, has not passed and only warns.
    """

    name: str
    level: Literal["block", "warn"]
    passed: bool
    detail: str
    figures: dict[str, float] = {}
    asked: bool = True

    @model_validator(mode="after")
    def _unasked_warns(self) -> Self:
        if not self.asked and (self.passed or self.level != "warn"):
            raise ValueError(f"{self.name} was not asked: it has not passed, and only warns")
        return self


def not_asked(name: str, why: str) -> Finding:
    """Return the finding of a check that was not asked: `why` says what it needs."""
    return Finding(name=name, level="warn", passed=False, detail=f"not asked: {why}", asked=False)
