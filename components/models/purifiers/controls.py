"""Controls: purifiers that need no training, which a learned purifier must beat.

`identity`, `gaussian_noise`, `bit_depth`, `median` and `threshold` are common input transforms;
`jpeg` has a module of its own. `bit_depth` and `threshold` quantise: their gradient is zero, so an
attack that follows it finds robustness that does not exist, and the checks must notice.
`random_network` is an untrained network: its accuracy is no merit of training.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from components.data.draws import NoiseStream
from components.data.image_set import Shape
from components.models.purifiers.autoencoder import ConvAutoencoder
from components.models.purifiers.contract import Purifier, PurifierSection, StandIn


class Identity(PurifierSection):
    """Leave images as they are."""

    kind: Literal["identity"]

    def build(self, shape: Shape) -> Purifier:
        """Make the purifier."""
        return _Identity()


class GaussianNoise(PurifierSection):
    """Add Gaussian noise of standard deviation `sigma` (pixels in [0,1]) and clip."""

    kind: Literal["gaussian_noise"]
    sigma: Annotated[float, Field(gt=0)]

    def stochastic(self) -> bool:
        """Say that the purifier draws noise."""
        return True

    def build(self, shape: Shape) -> Purifier:
        """Make the purifier."""
        return _GaussianNoise(self.sigma)


class BitDepth(PurifierSection):
    """Round to `bits` bits per pixel (Xu et al. 2018)."""

    kind: Literal["bit_depth"]
    bits: Annotated[int, Field(ge=1, le=8)]

    def build(self, shape: Shape) -> Purifier:
        """Make the purifier."""
        return _BitDepth(self.bits)


class Median(PurifierSection):
    """Take the median over a window of odd side `size`, edges replicated (Xu et al. 2018)."""

    kind: Literal["median"]
    size: Literal[3, 5]

    def build(self, shape: Shape) -> Purifier:
        """Make the purifier."""
        return _Median(self.size)


class Threshold(PurifierSection):
    """Binarise every pixel at `at`: the control that DiffDefense must beat on MNIST."""

    kind: Literal["threshold"]
    at: Annotated[float, Field(gt=0, lt=1)]

    def build(self, shape: Shape) -> Purifier:
        """Make the purifier."""
        return _Threshold(self.at)


class RandomNetwork(PurifierSection):
    """The network `inner` untrained, with the initial weights drawn from `seed`."""

    kind: Literal["random_network"]
    inner: ConvAutoencoder
    seed: int

    def build(self, shape: Shape) -> Purifier:
        """Make the network; raise ValueError where `inner` does not fit `shape`."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            return self.inner.build(shape)


class _Identity(Purifier):
    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        return x


class _GaussianNoise(Purifier):
    stochastic = True

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        assert stream is not None
        noise = stream.normal(tuple(x.shape[1:]), "noise").to(x.dtype)
        return (x + self.sigma * noise).clamp(0, 1)


class _BitDepth(Purifier):
    differentiable = False
    stand_ins: tuple[StandIn, ...] = ("soft",)

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.levels: int = 2**bits - 1

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        return torch.round(x * self.levels) / self.levels

    def stand_in(self, kind: StandIn, x: Tensor, stream: NoiseStream | None) -> Tensor:
        scaled = x * self.levels
        low = scaled.detach().floor()
        # One sigmoid for every step, half way between two levels.
        return (low + _soft_step(scaled - low - 0.5)) / self.levels


class _Median(Purifier):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        margin = self.size // 2
        padded = F.pad(x, (margin,) * 4, mode="replicate")
        windows = padded.unfold(2, self.size, 1).unfold(3, self.size, 1)
        medians, _ = torch.median(windows.flatten(4), dim=4)
        return medians


class _Threshold(Purifier):
    differentiable = False
    stand_ins: tuple[StandIn, ...] = ("soft",)

    def __init__(self, at: float) -> None:
        super().__init__()
        self.at = at

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        return (x > self.at).to(x.dtype)

    def stand_in(self, kind: StandIn, x: Tensor, stream: NoiseStream | None) -> Tensor:
        return _soft_step(x - self.at)


def _soft_step(x: Tensor) -> Tensor:
    """Return a step from 0 to 1 at 0: a sigmoid a tenth wide, steep but never flat."""
    return torch.sigmoid(10 * x)
