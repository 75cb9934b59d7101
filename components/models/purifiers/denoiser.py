"""APuDAE's denoising autoencoders (Kalaria et al., section 3), trained to remove Gaussian noise.

There are two networks. `denoiser` is the paper's Table 1 for MNIST and CIFAR-10. `red_net` is the
30-block network that the authors' code uses for CIFAR-10: additive skips into every second decoder
block, and the image added to the output. One pass of a denoiser is the paper's variant "direct";
the inference `apudae` descends on its reconstruction error instead.

Our readings: Table 1 prints ReLU and BN before the sigmoid, so that no pixel could be dark; here
the last deconvolution has neither. Dropout is in the text but not in the table, and is left out.
`red_net` ends in a ReLU as in the code, and is also clipped to 1.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from components.data.draws import NoiseStream
from components.data.image_set import Shape
from components.models.purifiers.contract import Purifier, PurifierSection

Width = Annotated[int, Field(ge=1)]


class Denoiser(PurifierSection):
    """Two convolutions and two deconvolutions of `width` channels; the paper has width 64."""

    kind: Literal["denoiser"]
    width: Width

    def build(self, shape: Shape) -> "DenoisingAutoencoder":
        """Make the untrained network; raise ValueError for odd sides."""
        _require_even(self.kind, shape)
        return _TableOneNet(shape[0], self.width)


class RedNet(PurifierSection):
    """`blocks` convolutions and as many deconvolutions of `width` channels.

    The authors' code has blocks 15, width 64.
    """

    kind: Literal["red_net"]
    blocks: Annotated[int, Field(ge=2)]
    width: Width

    def build(self, shape: Shape) -> "DenoisingAutoencoder":
        """Make the untrained network; raise ValueError for odd sides."""
        _require_even(self.kind, shape)
        return _RedNet(shape[0], self.blocks, self.width)


class DenoisingAutoencoder(Purifier):
    """A network f from pixels to pixels, with statistics of its error on clean images.

    `clean_mean` and `clean_std` (scalars) are the mean and the standard deviation of the
    reconstruction error of clean training images. They are saved with the weights.
    """

    clean_mean: Tensor
    clean_std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("clean_mean", torch.zeros(()))
        self.register_buffer("clean_std", torch.ones(()))

    def error(self, x: Tensor, reconstructed: Tensor | None = None) -> Tensor:
        """Return the reconstruction error rd(x) = |x - f(x)|^2, summed over each image (N,).

        The gradient flows through x and f(x). `reconstructed` is f(x), if the caller has it.
        """
        purified: Tensor = self(x) if reconstructed is None else reconstructed
        return (x - purified).square().flatten(1).sum(1)

    def calibrate(self, clean: Tensor, batch: int) -> None:
        """Take the statistics of the error from clean training images, as in the paper.

        The authors' code takes them from test images.
        """
        device = self.clean_mean.device
        with torch.no_grad():
            parts = torch.split(clean, batch)
            errors = torch.cat([self.error(part.to(device)) for part in parts])
        self.clean_mean.copy_(errors.mean())
        self.clean_std.copy_(errors.std().clamp_min(1e-6))

    def compute_detector_score(
        self, x: Tensor, stream: NoiseStream | None, purified: Tensor | None
    ) -> Tensor:
        """Return the standardised reconstruction error (N,): 0 is the mean of clean images."""
        return (self.error(x, purified) - self.clean_mean) / self.clean_std


class _TableOneNet(DenoisingAutoencoder):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.down = _block(nn.Conv2d(channels, width, 3, 2, 1))
        self.flat = _block(nn.Conv2d(width, width, 3, 1, 1))
        self.rise = _block(nn.ConvTranspose2d(width, width, 3, 1, 1))
        self.last = nn.ConvTranspose2d(width, channels, 3, 2, 1, output_padding=1)

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        down = self.down(x)
        # Equation 6: every encoder map is added to the decoder map of the same layer.
        up = self.rise(self.flat(down)) + down
        return torch.sigmoid(self.last(up))


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

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
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


def _require_even(kind: str, shape: Shape) -> None:
    if shape[1] % 2 or shape[2] % 2:
        raise ValueError(f"{kind} halves once, which {shape[1]} x {shape[2]} images do not allow")
