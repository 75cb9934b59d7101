"""Image classifiers: pixels (N,C,H,W) in [0,1] to logits (N,K), normalisation included.

One section per kind; `build` makes the network. `ClassifierConfig` is their union: a new classifier
is added there. The ResNets are those of He et al. 2016 for 32 x 32 images: `resnet` is the CIFAR
form of depth 6n+2 (20, 56), `resnet18` the wide form with four stages. Deviation: where the shape
changes, the shortcut of `resnet` is a 1 x 1 convolution; the paper's has no parameters.
`defense_gan_a` and `defense_gan_b` are the MNIST classifiers of Samangouei et al. 2018 with the
paddings of DiffDefense (Silva et al. 2023); their sizes are fixed.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from components.config import Config
from components.data.draws import Draws
from components.data.image_set import Shape

Width = Annotated[int, Field(ge=1)]


class Classifier(nn.Module):
    """A network behind its own normalisation.

    `mean` and `std` (C,) are statistics of the training pixels. They are saved with the weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, channels: int, classes: int) -> None:
        super().__init__()
        self.network = network
        self.classes = classes
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def normalise_by(self, pixels: Tensor) -> None:
        """Set the normalisation from training pixels (N,C,H,W) in [0,1]."""
        self.mean.copy_(pixels.mean(dim=(0, 2, 3)))
        self.std.copy_(pixels.std(dim=(0, 2, 3)).clamp_min(1e-3))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N,K) of pixels (N,C,H,W) in [0,1]."""
        logits: Tensor = self.network((x - self.mean[:, None, None]) / self.std[:, None, None])
        return logits


class SmallCnn(Config):
    """Three 3 x 3 convolutions, two of them strided, and a linear layer: for digits and MNIST."""

    kind: Literal["small_cnn"]
    width: Width

    def build(self, shape: Shape, classes: int) -> Classifier:
        """Make the untrained network for images of `shape`."""
        widths = [self.width, 2 * self.width, 4 * self.width]
        layers: list[nn.Module] = []
        previous = shape[0]
        for stride, width in zip((1, 2, 2), widths, strict=True):
            layers += _conv_norm_relu(previous, width, stride)
            previous = width
        height, width = -(-shape[1] // 4), -(-shape[2] // 4)
        layers += [nn.Flatten(), nn.Linear(previous * height * width, classes)]
        return Classifier(nn.Sequential(*layers), shape[0], classes)


class ResNet(Config):
    """The CIFAR ResNet of depth 6n+2: three stages of n blocks; widths 1, 2 and 4 times `width`."""

    kind: Literal["resnet"]
    depth: int
    width: Width

    @field_validator("depth")
    @classmethod
    def _depth(cls, depth: int) -> int:
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth {depth} is not 6n+2 (8, 14, 20, 32, 44, 56, ...)")
        return depth

    def build(self, shape: Shape, classes: int) -> Classifier:
        """Make the untrained network for images of `shape`."""
        blocks = (self.depth - 2) // 6
        return _residual(shape, classes, [self.width * f for f in (1, 2, 4)], blocks)


class ResNet18(Config):
    """ResNet-18 with a 3 x 3 stem: four stages of two blocks; widths 1, 2, 4, 8 times `width`."""

    kind: Literal["resnet18"]
    width: Width

    def build(self, shape: Shape, classes: int) -> Classifier:
        """Make the untrained network for images of `shape`."""
        return _residual(shape, classes, [self.width * f for f in (1, 2, 4, 8)], 2)


class DefenseGanA(Config):
    """Defense-GAN's classifier A: two 5 x 5 convolutions of 64, strides 1 and 2, and 128 features.

    Nothing is padded, so on 28 x 28 images the last row and column of pixels have no effect.
    """

    kind: Literal["defense_gan_a"]

    def build(self, shape: Shape, classes: int) -> Classifier:
        """Make the untrained network; raise ValueError for images smaller than 9 x 9."""
        body = nn.Sequential(
            nn.Conv2d(shape[0], 64, 5), nn.ReLU(), nn.Conv2d(64, 64, 5, 2), nn.ReLU(), nn.Flatten()
        )
        features = _feature_count(self.kind, body, shape, 9)
        head = (
            KeyedDropout(0.25, "body"),
            nn.Linear(features, 128),
            nn.ReLU(),
            KeyedDropout(0.5, "head"),
        )
        network = nn.Sequential(body, *head, nn.Linear(128, classes))
        return Classifier(network, shape[0], classes)


class DefenseGanB(Config):
    """Defense-GAN's classifier B: convolutions 8 x 8 of 64, 6 x 6 and 5 x 5 of 128, then linear.

    Only the last convolution is padded, so on 28 x 28 images the last two rows and columns of
    pixels have no effect.
    """

    kind: Literal["defense_gan_b"]

    def build(self, shape: Shape, classes: int) -> Classifier:
        """Make the untrained network; raise ValueError for images smaller than 26 x 26."""
        body = nn.Sequential(
            nn.Conv2d(shape[0], 64, 8, 2), nn.ReLU(), nn.Conv2d(64, 128, 6, 2), nn.ReLU(),
            nn.Conv2d(128, 128, 5, 1, 1), nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        features = _feature_count(self.kind, body, shape, 26)
        head = (KeyedDropout(0.5, "head"), nn.Linear(features, classes))
        return Classifier(
            nn.Sequential(KeyedDropout(0.2, "pixels"), body, *head), shape[0], classes
        )


ClassifierConfig = Annotated[
    SmallCnn | ResNet | ResNet18 | DefenseGanA | DefenseGanB, Field(discriminator="kind")
]


class KeyedDropout(nn.Module):
    """Dropout at `rate` of the features (N,...) in training, reproducible after a resume.

    Torch's dropout draws from the global random stream, which is not part of the state that a
    training resumes from. Here noise is keyed by two saved buffers, the number of the call and a
    key drawn with the weights, and by `use`, which is unique within the network.
    """

    calls: Tensor
    key: Tensor

    def __init__(self, rate: float, use: str) -> None:
        super().__init__()
        self.rate, self.use = rate, use
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("key", torch.randint(1 << 31, ()))

    def _apply(self, *arguments: Any, **settings: Any) -> "KeyedDropout":
        """Keep both buffers in main memory, where every call can read them without waiting."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` in eval mode, else `x` with features dropped and the rest scaled up."""
        if not self.training:
            return x
        draws = Draws(
            int(self.key), "train", torch.arange(len(x), device=x.device), int(self.calls)
        )
        kept = draws.uniform(tuple(x.shape[1:]), f"dropout {self.use}") >= self.rate
        self.calls += 1
        return x * kept / (1 - self.rate)


class _Block(nn.Module):
    """The residual block: two 3 x 3 convolutions and a shortcut.

    The shortcut picks every `stride`-th pixel, then convolves with stride 1, which is equal to a
    1 x 1 convolution with a stride. On CPUs with AVX-512, the weight gradient of that one writes
    outside of its memory where fewer than 16 channels are stored channels last (torch 2.13).
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.body = nn.Sequential(
            *_conv_norm_relu(inputs, outputs, stride), *_conv_norm_relu(outputs, outputs, 1)[:-1]
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        picked = x[:, :, :: self.stride, :: self.stride]
        return F.relu(self.body(x) + self.shortcut(picked))


def _conv_norm_relu(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]


def _residual(shape: Shape, classes: int, widths: Sequence[int], blocks: int) -> Classifier:
    layers = _conv_norm_relu(shape[0], widths[0], 1)
    previous = widths[0]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            layers.append(_Block(previous, width, 2 if stage and not block else 1))
            previous = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(previous, classes)]
    return Classifier(nn.Sequential(*layers), shape[0], classes)


def _feature_count(kind: str, body: nn.Module, shape: Shape, smallest: int) -> int:
    """Return the number of features of `body`; raise ValueError for a side below `smallest`."""
    if min(shape[1:]) < smallest:
        raise ValueError(
            f"{kind} takes images of at least {smallest} x {smallest}, not {shape[1]} x {shape[2]}"
        )
    with torch.no_grad():
        return int(body(torch.zeros(1, *shape)).numel())
