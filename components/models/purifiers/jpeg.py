"""JPEG compression as a purifier (Das et al. 2017, Guo et al. 2018), with a soft stand-in.

It computes the lossy part of ITU-T T.81 with the tables of its annex K, scaled as libjpeg scales
them. Grey images are compressed as they are, colour images as YCbCr without chroma subsampling;
sides are replicated to the next multiple of 8. Deviation from a file: it rounds coefficients only,
not pixels.

It rounds, so it has no gradient. Attacks take the derivative of its stand-in `soft`, which rounds
softly.

Shapes: N images, C channels (1 or 3), H W, blocks of 8 x 8.
"""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from components.data.draws import NoiseStream
from components.data.image_set import Shape
from components.models.purifiers.contract import Purifier, PurifierSection, StandIn

# ITU-T T.81, annex K, tables K.1 (luminance) and K.2 (chrominance).
LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *(4 * ((99,) * 8,)),
)
# JFIF: luminance, blue difference and red difference of R, G, B.
YCBCR = (
    (0.299, 0.587, 0.114),
    (-0.168735892, -0.331264108, 0.5),
    (0.5, -0.418687589, -0.081312411),
)
# Images of 8-bit levels have coefficients exactly half way between two steps. Such ties are rounded
# away from zero, as in libjpeg, however float32 represents the level. The next value that a
# constant block can have is twice as far from the tie.
TIE = 1 / 4080


class Jpeg(PurifierSection):
    """Compress as a JPEG file of `quality` does, and decompress."""

    kind: Literal["jpeg"]
    quality: Annotated[int, Field(ge=1, le=100)]

    def build(self, shape: Shape) -> Purifier:
        """Make the purifier; raise ValueError for images that are neither grey nor RGB."""
        if shape[0] not in (1, 3):
            raise ValueError(f"jpeg takes images of 1 or 3 channels, not of {shape[0]}")
        return _Jpeg(self.quality)


class _Jpeg(Purifier):
    differentiable = False
    stand_ins: tuple[StandIn, ...] = ("soft",)

    def __init__(self, quality: int) -> None:
        super().__init__()
        self.quality = quality

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        return self._compress(x, round_coefficients)

    def stand_in(self, kind: StandIn, x: Tensor, stream: NoiseStream | None) -> Tensor:
        return self._compress(x, round_softly)

    def _compress(self, x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
        height, width = x.shape[2:]
        colour = x.shape[1] == 3
        # In float32 the batch size would decide which way the finest steps are rounded.
        tables, dct = quantisation_tables(self.quality).to(x.device), dct_matrix().to(x.device)
        ycbcr = torch.tensor(YCBCR, dtype=torch.float64, device=x.device)
        # The shift by 128 leaves Cb and Cr as they are: their rows sum to 0.
        planes = 255 * x.double() - 128
        if colour:
            planes = torch.einsum("pc,nchw->nphw", ycbcr, planes)
        planes = F.pad(planes, (0, -width % 8, 0, -height % 8), mode="replicate")
        count, channels, padded_height, padded_width = planes.shape
        blocks = planes.reshape(count, channels, padded_height // 8, 8, padded_width // 8, 8)
        table = tables[:channels, None, None]
        coefficients = dct @ blocks.transpose(3, 4) @ dct.T / table
        blocks = dct.T @ (rounding(coefficients) * table) @ dct
        planes = blocks.transpose(3, 4).reshape(planes.shape)[:, :, :height, :width]
        if colour:
            planes = torch.einsum("cp,nphw->nchw", ycbcr.inverse(), planes)
        return ((planes + 128) / 255).clamp(0, 1).to(x.dtype)


def quantisation_tables(quality: int) -> Tensor:
    """Return the quantisation tables (3,8,8) of Y, Cb and Cr, scaled as libjpeg does."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    tables = torch.tensor([LUMINANCE, CHROMINANCE, CHROMINANCE])
    return ((tables * scale + 50) // 100).clamp(1, 255).double()


def dct_matrix() -> Tensor:
    """Return the matrix (8,8) of the orthonormal DCT-II, one cosine per row."""
    index = torch.arange(8, dtype=torch.float64)
    cosines = (torch.pi / 8 * index[:, None] * (index + 0.5)).cos() / 2
    cosines[0] /= 2**0.5
    return cosines


def round_coefficients(x: Tensor) -> Tensor:
    """Round, ties away from zero; the gradient is zero."""
    return (x.abs() + 0.5 + TIE).floor().copysign(x)


def round_softly(x: Tensor) -> Tensor:
    """Return round(x) + (x - round(x))^3, an approximation whose slope is 3 (x - round(x))^2.

    Shin and Song 2017.
    """
    rounded = round_coefficients(x.detach())
    return rounded + (x - rounded) ** 3
