"""Purifiers that need no training: what a learned one must beat, and lies that must be caught.

`identity`, `gaussian_noise`, `bit_depth`, `median`, `threshold` and `jpeg` are the usual input
transformations; `bit_depth` and `threshold` quantise, so their gradient is zero and an attack
that follows it reports robustness that is not there. `jpeg` quantises too, but hands attacks the
gradient of a softer rounding. `random_network` is a purifier nobody trained: whatever it scores is
no merit of training.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from components.config import Config
from components.data.draws import Draws
from components.data.image_set import Shape
from components.models.purifiers.autoencoder import ConvAutoencoder
from components.models.purifiers.contract import Purifier, StandIn


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


class Jpeg(Config):
    """Compress as a JPEG file of `quality` does (Das et al. 2017, Guo et al. 2018) and read it.

    The lossy part of ITU-T T.81 with the tables of its annex K, scaled as libjpeg scales them:
    grey images as they are, colour as YCbCr without chroma subsampling, sides that 8 does not
    divide replicated to the next multiple. Unlike a file it rounds coefficients only, not pixels.
    """

    kind: Literal["jpeg"]
    quality: Annotated[int, Field(ge=1, le=100)]

    def build(self, shape: Shape) -> Purifier:
        """Make the purifier; raise ValueError for images that are neither grey nor RGB."""
        if shape[0] not in (1, 3):
            raise ValueError(f"jpeg takes images of 1 or 3 channels, not of {shape[0]}")
        return _Jpeg(self.quality)


class RandomNetwork(Config):
    """The network `inner` with the weights it starts from, drawn with `seed`: untrained."""

    kind: Literal["random_network"]
    inner: ConvAutoencoder
    seed: int

    def build(self, shape: Shape) -> Purifier:
        """Make the network; raise ValueError where `inner` does not fit `shape`."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            return self.inner.build(shape)


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
    stand_ins: tuple[StandIn, ...] = ("soft",)

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.levels: int = 2**bits - 1

    def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
        return torch.round(x * self.levels) / self.levels

    def stand_in(self, kind: StandIn, x: Tensor, draws: Draws | None) -> Tensor:
        steps = x * self.levels
        low = steps.detach().floor()
        # One sigmoid for every step, half way between two levels.
        return (low + _soft(steps - low - 0.5)) / self.levels


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
    stand_ins: tuple[StandIn, ...] = ("soft",)

    def __init__(self, at: float) -> None:
        super().__init__()
        self.at = at

    def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
        return (x > self.at).to(x.dtype)

    def stand_in(self, kind: StandIn, x: Tensor, draws: Draws | None) -> Tensor:
        return _soft(x - self.at)


def _soft(x: Tensor) -> Tensor:
    """Return a step from 0 to 1 at 0 that is a sigmoid a tenth wide: steep, and never flat."""
    return torch.sigmoid(10 * x)


# ITU-T T.81, annex K, tables K.1 (luminance) and K.2 (chrominance).
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *(4 * ((99,) * 8,)),
)
# JFIF: luminance, blue and red difference of R, G, B.
_YCBCR = (
    (0.299, 0.587, 0.114),
    (-0.168735892, -0.331264108, 0.5),
    (0.5, -0.418687589, -0.081312411),
)


class _Jpeg(Purifier):
    # It quantises, but its gradient is usable, which is what attacks and checks go by: backwards
    # the rounding is that of `_Round`. That this is not the derivative of what it computes is for
    # the check `gradient_correct` to say, and it does.
    differentiable = True

    def __init__(self, quality: int) -> None:
        super().__init__()
        self.quality = quality

    def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
        height, width = x.shape[2:]
        colour = x.shape[1] == 3
        # In float64, or the size of a batch decides what is rounded up at the finest steps.
        tables, waves = _tables(self.quality).to(x.device), _waves().to(x.device)
        ycbcr = torch.tensor(_YCBCR, dtype=torch.float64, device=x.device)
        planes = 255 * x.double() - 128  # the rows of differences sum to 0: no shift for them
        if colour:
            planes = torch.einsum("pc,nchw->nphw", ycbcr, planes)
        planes = F.pad(planes, (0, -width % 8, 0, -height % 8), mode="replicate")
        count, channels, high, wide = planes.shape
        blocks = planes.reshape(count, channels, high // 8, 8, wide // 8, 8).transpose(3, 4)
        table = tables[:channels, None, None]
        steps = waves @ blocks @ waves.T / table
        blocks = waves.T @ (_rounded(steps) * table) @ waves
        planes = blocks.transpose(3, 4).reshape(planes.shape)[:, :, :height, :width]
        if colour:
            planes = torch.einsum("cp,nphw->nchw", ycbcr.inverse(), planes)
        return ((planes + 128) / 255).clamp(0, 1).to(x.dtype)


def _tables(quality: int) -> Tensor:
    """Return the quantisation tables (3,8,8) of Y, Cb and Cr, scaled as libjpeg does."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    tables = torch.tensor([_LUMINANCE, _CHROMINANCE, _CHROMINANCE])
    return ((tables * scale + 50) // 100).clamp(1, 255).double()


def _waves() -> Tensor:
    """Return the matrix (8,8) of the orthonormal DCT-II, one wave a row."""
    index = torch.arange(8, dtype=torch.float64)
    waves = (torch.pi / 8 * index[:, None] * (index + 0.5)).cos() / 2
    waves[0] /= 2**0.5
    return waves


# Images of 8-bit levels have coefficients half way between two steps. Such ties go away from zero,
# as in libjpeg, and must not hang on how float32 holds a level; the next value that a constant
# block can have is twice as far from the tie.
_TIE = 1 / 4080


class _Round(torch.autograd.Function):
    """Round; backwards, round(x) + (x - round(x))^3, the approximation of Shin and Song 2017."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rounded = (x.abs() + 0.5 + _TIE).floor().copysign(x)
        ctx.save_for_backward(x - rounded)
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (rest,) = ctx.saved_tensors
        slope: Tensor = gradients[0] * 3 * rest**2
        return slope


def _rounded(x: Tensor) -> Tensor:
    rounded: Tensor = _Round.apply(x)  # type: ignore[no-untyped-call]
    return rounded
