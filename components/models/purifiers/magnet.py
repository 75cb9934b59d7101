"""MagNet (Meng and Chen 2017): two small autoencoders that reform images and detect attacks.

AE-I halves the resolution once, AE-II keeps it (the authors' networks for MNIST, all activations
sigmoid). The reformed image is AE-I(x). The reconstruction errors of both detect attacks. Both are
trained to restore clean images from noisy ones; the noise and the loss belong to the objective.

Deviations: in the paper each detector has a threshold, chosen by its false positive rate on clean
images, and an image counts as attacked if either error exceeds its threshold. Here there is one
score, the larger of the two standardised errors, so that there is one ROC curve. The detectors that
compare softmax outputs of the classifier are left out: a purifier sees images only. The authors
count a detected image as correct; the accuracy behind `purify` alone is the stricter number.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from components.data.draws import NoiseStream
from components.data.image_set import Shape
from components.models.purifiers.contract import Purifier, PurifierSection


class MagNet(PurifierSection):
    """Autoencoders of `width` channels; the paper has width 3."""

    kind: Literal["magnet"]
    width: Annotated[int, Field(ge=1)]

    def build(self, shape: Shape) -> "MagNetPurifier":
        """Make the untrained network; raise ValueError for odd sides."""
        if shape[1] % 2 or shape[2] % 2:
            raise ValueError(
                f"magnet halves once, which {shape[1]} x {shape[2]} images do not allow"
            )
        return MagNetPurifier(shape[0], self.width)


class MagNetPurifier(Purifier):
    """AE-I (`halving`) and AE-II (`keeping`), with statistics of their errors on clean images.

    `error_mean` and `error_std` (2,) are means and standard deviations over clean training images.
    They are saved with the weights.
    """

    error_mean: Tensor
    error_std: Tensor

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.halving = nn.Sequential(
            *_layer(channels, width), nn.AvgPool2d(2), *_layer(width, width),
            *_layer(width, width), nn.Upsample(scale_factor=2), *_layer(width, width),
            *_layer(width, channels),
        )  # fmt: skip
        self.keeping = nn.Sequential(
            *_layer(channels, width), *_layer(width, width), *_layer(width, channels)
        )
        self.register_buffer("error_mean", torch.zeros(2))
        self.register_buffer("error_std", torch.ones(2))

    def autoencode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return AE-I(x) and AE-II(x), each (N,C,H,W) in [0,1]."""
        return self.halving(x), self.keeping(x)

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        """Return AE-I(x)."""
        reformed: Tensor = self.halving(x)
        return reformed

    def errors(self, x: Tensor) -> Tensor:
        """Return the mean |x - AE-I(x)|^2 and the mean |x - AE-II(x)| of every image (N,2)."""
        first, second = self.autoencode(x)
        squared, absolute = (x - first).square(), (x - second).abs()
        return torch.stack([squared.flatten(1).mean(1), absolute.flatten(1).mean(1)], 1)

    def calibrate(self, clean: Tensor, batch: int) -> None:
        """Take the statistics of both errors from clean training images (M,C,H,W)."""
        device = self.error_mean.device
        with torch.no_grad():
            parts = torch.split(clean, batch)
            errors = torch.cat([self.errors(part.to(device)) for part in parts])
        self.error_mean.copy_(errors.mean(0))
        self.error_std.copy_(errors.std(0, correction=0).clamp_min(1e-6))

    def compute_detector_score(
        self, x: Tensor, stream: NoiseStream | None, purified: Tensor | None
    ) -> Tensor:
        """Return the larger of the two standardised errors (N,)."""
        return ((self.errors(x) - self.error_mean) / self.error_std).amax(1)


def _layer(inputs: int, outputs: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, 3, 1, 1), nn.Sigmoid()
