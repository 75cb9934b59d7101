"""Purifiers that need no training: what a learned one must beat, and lies that must be caught.

`identity`, `gaussian_noise`, `bit_depth`, `median` and `threshold` are the usual input
transformations; `bit_depth` and `threshold` quantise, so their gradient is zero and an attack
that follows it reports robustness that is not there.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from components.config import Config
from components.data import Shape
from components.draws import Draws
from components.purifiers.contract import Purifier


class Identity(Config):
    """Leave images as they are."""

    kind: Literal["identity"]

    def build(self, shape: Shape) -> Purifier:
        """Make the purifier."""
        return _Identity()


class GaussianNoise(Config):
    """Add Gaussian noise of deviation `sigma` (in [0,1] units) and clip."""

    kind: Literal["gaussian_noise"]
    sigma: Annotated[float, Field(gt=0)]

    def build(self, shape: Shape) -> Purifier:
        """Make the purifier."""
        return _GaussianNoise(self.sigma)


class BitDepth(Config):
    """Round to `bits` bits per pixel (Xu et al. 2018)."""

    kind: Literal["bit_depth"]
    bits: Annotated[int, Field(ge=1, le=8)]

    def build(self, shape: Shape) -> Purifier:
        """Make the purifier."""
        return _BitDepth(self.bits)


class Median(Config):
    """Take the median over a window of odd side `size`, edges replicated (Xu et al. 2018)."""

    kind: Literal["median"]
    size: Literal[3, 5]

    def build(self, shape: Shape) -> Purifier:
        """Make the purifier."""
        return _Median(self.size)


class Threshold(Config):
    """Binarise every pixel at `at`: the control DiffDefense has to beat on MNIST."""

    kind: Literal["threshold"]
    at: Annotated[float, Field(gt=0, lt=1)]

    def build(self, shape: Shape) -> Purifier:
        """Make the purifier."""
        return _Threshold(self.at)


class _Identity(Purifier):
    def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
        return x


class _GaussianNoise(Purifier):
    stochastic = True

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
        assert draws is not None
        noise = draws.normal(tuple(x.shape[1:]), "noise").to(x.dtype)
        return (x + self.sigma * noise).clamp(0, 1)


class _BitDepth(Purifier):
    differentiable = False

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.levels: int = 2**bits - 1

    def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
        return torch.round(x * self.levels) / self.levels


class _Median(Purifier):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
        margin = self.size // 2
        padded = F.pad(x, (margin,) * 4, mode="replicate")
        windows = padded.unfold(2, self.size, 1).unfold(3, self.size, 1)
        medians, _ = torch.median(windows.flatten(4), dim=4)
        return medians


class _Threshold(Purifier):
    differentiable = False

    def __init__(self, at: float) -> None:
        super().__init__()
        self.at = at

    def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
        return (x > self.at).to(x.dtype)
