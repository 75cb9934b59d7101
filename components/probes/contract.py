"""What a check says: a finding, how grave it is, and the figures behind it."""

from typing import Literal

import numpy as np
import numpy.typing as npt

from components.config import Config

# Exact paired tests raise a check below this, after Holm's correction.
SIGNIFICANT = 0.01

Accuracies = npt.NDArray[np.float64]


class Finding(Config):
    """The outcome of one check: `detail` is a sentence with the figures.

    `block` means that the number it concerns is shown as an upper bound and never as a result.
    `figures` are those of the detail that a program may want.
    """

    name: str
    level: Literal["block", "warn"]
    passed: bool
    detail: str
    figures: dict[str, float] = {}
