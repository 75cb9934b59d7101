"""Koo's convolutional autoencoder purifier (Koo et al. 2023, section 3), one deterministic pass.

The paper has 15 convolution and 15 deconvolution blocks (Conv, BN, ReLU) with skips, inspired by
APuDAE. APuDAE's code uses RED-Net30: additive skips into every second decoder block, from encoder
blocks 2, 4, ..., 14. Depth, width and strides are settings, so that small images get small nets.

The paper leaves three points open. Our readings: the last block is a deconvolution before Tanh,
without ReLU (which would halve the range); images are in [0,1] outside and u = 2x - 1 inside; by
default there is no global skip, so x_hat = (tanh(net(u)) + 1) / 2. `residual: global` is our own
option: the output is clip(u + tanh(net(u)), -1, 1), which starts near the identity and keeps clean
accuracy higher.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from components.data.draws import NoiseStream
from components.data.image_set import Shape
from components.models.purifiers.contract import Purifier, PurifierSection


class ConvAutoencoder(PurifierSection):
    """`blocks` convolutions and as many deconvolutions of `width` channels.

    `strided` lists the encoder blocks (from 1) that halve the resolution; the matching decoder
    blocks double it. For 32 x 32 images the paper has blocks 15, width 64, strided [1].
    """

    kind: Literal["conv_autoencoder"]
    blocks: Annotated[int, Field(ge=2)]
    width: Annotated[int, Field(ge=1)]
    strided: list[int]
    residual: Literal["none", "global"]

    @model_validator(mode="after")
    def _strided(self) -> "ConvAutoencoder":
        if any(not 1 <= block <= self.blocks for block in self.strided):
            raise ValueError(f"strided {self.strided} must name blocks 1..{self.blocks}")
        return self

    def build(self, shape: Shape) -> Purifier:
        """Make the untrained network; raise ValueError if `shape` cannot be halved so often."""
        factor = 2 ** len(set(self.strided))
        if shape[1] % factor or shape[2] % factor:
            raise ValueError(
                f"conv_autoencoder halves {len(set(self.strided))} times, "
                f"which {shape[1]} x {shape[2]} images do not allow"
            )
        return _Autoencoder(self, shape[0])


class _Autoencoder(Purifier):
    def __init__(self, config: ConvAutoencoder, channels: int) -> None:
        super().__init__()
        strides = [2 if block + 1 in config.strided else 1 for block in range(config.blocks)]
        width = config.width
        self.encoder = nn.ModuleList(
            _block(nn.Conv2d(width if block else channels, width, 3, stride, 1, bias=False))
            for block, stride in enumerate(strides)
        )
        self.decoder = nn.ModuleList(
            _block(
                nn.ConvTranspose2d(
                    width, width, 3, stride, 1, output_padding=stride - 1, bias=False
                )
            )
            for stride in reversed(strides[1:])
        )
        last = strides[0]
        self.last = nn.ConvTranspose2d(width, channels, 3, last, 1, output_padding=last - 1)
        self.residual = config.residual == "global"

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        u = 2 * x - 1
        feature, skips = u, []
        for index, block in enumerate(self.encoder, start=1):
            feature = block(feature)
            if index % 2 == 0 and index < len(self.encoder):
                skips.append((index, feature))
        # Decoder block j undoes encoder block n + 1 - j, so its output has the shape of the output
        # of encoder block n - j. The skip of that block is added there.
        for index, block in enumerate(self.decoder, start=1):
            feature = block(feature)
            if skips and skips[-1][0] == len(self.encoder) - index:
                feature = feature + skips.pop()[1]
        v = torch.tanh(self.last(feature))
        if self.residual:
            v = (u + v).clamp(-1, 1)
        return (v + 1) / 2


def _block(convolution: nn.Conv2d | nn.ConvTranspose2d) -> nn.Sequential:
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU())
