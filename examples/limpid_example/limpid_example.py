"""A bilateral filter (Tomasi and Manduchi 1998) with learned widths, as a purifier of Limpid."""

from itertools import product
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from components.data.draws import NoiseStream
from components.data.image_set import Shape
from components.models.purifiers.contract import Purifier, PurifierSection


class Bilateral(PurifierSection):
    """Each pixel becomes a mean of those within `radius`, near and similar ones first."""

    kind: Literal["bilateral"]
    radius: Annotated[int, Field(ge=1)]

    def build(self, shape: Shape) -> Purifier:
        """Make the untrained filter; raise ValueError for images that it is too large for."""
        if min(shape[1:]) <= self.radius:
            raise ValueError(f"radius {self.radius} needs images of more pixels a side")
        return BilateralFilter(self.radius)


class BilateralFilter(Purifier):
    """Learns two numbers: how fast weights fall with the distance, and with the difference."""

    def __init__(self, radius: int) -> None:
        super().__init__()
        self.radius = radius
        self.widths = nn.Parameter(torch.tensor([1.0, 0.2]).log())

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        """Return the weighted means (N,C,H,W) of images (N,C,H,W)."""
        place, value = 0.5 * (-2 * self.widths).exp()
        padded = F.pad(x, 4 * (self.radius,), mode="reflect")
        height, width = x.shape[2:]
        total = weights = torch.zeros_like(x[:, :1])
        for row, column in product(range(2 * self.radius + 1), repeat=2):
            pixels = padded[:, :, row : row + height, column : column + width]
            far = (row - self.radius) ** 2 + (column - self.radius) ** 2
            other = (pixels - x).square().mean(1, keepdim=True)
            weight = torch.exp(-place * far - value * other)
            total, weights = total + weight * pixels, weights + weight
        return (total / weights).clamp(0, 1)
