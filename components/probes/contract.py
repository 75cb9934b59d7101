"""The finding that every check returns."""

from typing import Literal

import numpy as np
import numpy.typing as npt

from components.config import Config

# The p-value under which a paired test fails a check, after Holm's correction.
SIGNIFICANT = 0.01

# Fraction of right answers per image (N,).
Accuracies = npt.NDArray[np.float64]


class Finding(Config):
    """The outcome of one check: `detail` is a sentence, `figures` are its numbers for programs.

    If a check of level `block` fails, the score it is about is an upper bound and not a result.
    """

    name: str
    level: Literal["block", "warn"]
    passed: bool
    detail: str
    figures: dict[str, float] = {}
