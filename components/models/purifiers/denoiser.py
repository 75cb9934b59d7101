"""APuDAE's denoising autoencoder (Kalaria et al., section 3): one pass removes Gaussian noise.

Two nets: `denoiser` is the paper's Table 1 for MNIST and CIFAR-10, `red_net` the 30-block net
that the authors' code uses for CIFAR-10 (additive skips into every second decoder block, the image
added to the output). Used as it is, a denoiser is the paper's variant "direct"; `Apudae` descends
on its reconstruction error instead.

Readings: Table 1 prints ReLU and BN before the sigmoid, which would keep every pixel from being
dark, so the last deconvolution is bare; dropout is mentioned in the text, absent in the table, and
left out; `red_net` ends in a ReLU as in the code, and is clipped to 1 besides.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from components.config import Config
from components.data.draws import Draws
from components.data.image_set import Shape
from components.models.purifiers.contract import Purifier

Width = Annotated[int, Field(ge=1)]


class Denoiser(Config):
    """Two convolutions and two deconvolutions of `width` channels; the paper's width is 64."""

    kind: Literal["denoiser"]
    width: Width

    def build(self, shape: Shape) -> "DenoisingAutoencoder":
        """Make the untrained network; raise ValueError for sides that 2 does not divide."""
        _halvable(self.kind, shape)
        return _Small(shape[0], self.width)


class RedNet(Config):
    """`blocks` convolutions and deconvolutions of `width`; the authors' code has 15 of 64."""

    kind: Literal["red_net"]
    blocks: Annotated[int, Field(ge=2)]
    width: Width

    def build(self, shape: Shape) -> "DenoisingAutoencoder":
        """Make the untrained network; raise ValueError for sides that 2 does not divide."""
        _halvable(self.kind, shape)
        return _RedNet(shape[0], self.blocks, self.width)


class DenoisingAutoencoder(Purifier):
    """A network f of pixels to pixels that knows how far clean images lie from their image.

    `clean_mean` and `clean_std` describe the reconstruction error of clean training images; they
    are part of the weights.
    """

    clean_mean: Tensor
    clean_std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("clean_mean", torch.zeros(()))
        self.register_buffer("clean_std", torch.ones(()))

    def error(self, x: Tensor, passed: Tensor | None = None) -> Tensor:
        """Return rd(x) = |x - f(x)|^2 summed over the image (N,); gradients flow through both.

        `passed` is f(x), where the caller has it.
        """
        purified: Tensor = self(x) if passed is None else passed
        return (x - purified).square().flatten(1).sum(1)

    def calibrate(self, clean: Tensor, batch: int) -> None:
        """Take the statistics of the error from clean training images, as the paper says.

        Its code takes them from test images.
        """
        device = self.clean_mean.device
        with torch.no_grad():
            parts = torch.split(clean, batch)
            errors = torch.cat([self.error(part.to(device)) for part in parts])
        self.clean_mean.copy_(errors.mean())
        self.clean_std.copy_(errors.std().clamp_min(1e-6))

    def compute_detector_score(self, x: Tensor, draws: Draws | None, purified: Tensor | None) -> Tensor:
        """Return the reconstruction error, in deviations of clean images from their mean (N,)."""
        return (self.error(x, purified) - self.clean_mean) / self.clean_std


class _Small(DenoisingAutoencoder):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.down = _block(nn.Conv2d(channels, width, 3, 2, 1))
        self.flat = _block(nn.Conv2d(width, width, 3, 1, 1))
        self.rise = _block(nn.ConvTranspose2d(width, width, 3, 1, 1))
        self.last = nn.ConvTranspose2d(width, channels, 3, 2, 1, output_padding=1)

    def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
        down = self.down(x)
        # Equation 6: every encoder map is added to the decoder map that undoes its layer.
        risen = self.rise(self.flat(down)) + down
        return torch.sigmoid(self.last(risen))


class _RedNet(DenoisingAutoencoder):
    def __init__(self, channels: int, blocks: int, width: int) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(
            _block(nn.Conv2d(width if block else channels, width, 3, 1 if block else 2, 1))
            for block in range(blocks)
        )
        self.decoder = nn.ModuleList(
            _block(nn.ConvTranspose2d(width, width, 3, 1, 1)) for _ in range(blocks - 1)
        )
        self.last = nn.ConvTranspose2d(width, channels, 3, 2, 1, output_padding=1)

    def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
        feature, skips = x, []
        for index, block in enumerate(self.encoder, start=1):
            feature = block(feature)
            if index % 2 == 0 and index < len(self.encoder):
                skips.append(feature)
        for index, block in enumerate(self.decoder):
            feature = block(feature)
            if index % 2 == 0 and skips:
                feature = F.relu(feature + skips.pop())
        return F.relu(x + self.last(feature)).clamp(max=1)


def _block(convolution: nn.Conv2d | nn.ConvTranspose2d) -> nn.Sequential:
    # ReLU before BN, as Table 1 has it.
    return nn.Sequential(convolution, nn.ReLU(), nn.BatchNorm2d(convolution.out_channels))


def _halvable(kind: str, shape: Shape) -> None:
    if shape[1] % 2 or shape[2] % 2:
        raise ValueError(f"{kind} halves once, which {shape[1]} x {shape[2]} images do not allow")
