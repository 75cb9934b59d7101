"""Image classifiers: pixels (N,C,H,W) in [0,1] to logits (N,K), normalisation included.

One section per kind; `build` makes the network. `ClassifierConfig` is their union: a new classifier
is added there, or by a plugin (`components.plugins`).

The ResNets are those of He et al. 2016 for 32 x 32 images: `resnet` is the CIFAR form of depth 6n+2
(20, 56), `resnet18`, `resnet34` and `resnet50` the wide form with four stages.
Deviations: where the shape changes, the shortcut of `resnet` is a 1 x 1 convolution; the paper's
has no parameters. The wide forms begin with a 3 x 3 convolution and do not pool; `resnet50` has its
stride in the 3 x 3 convolution, as later implementations do. `wide_resnet` is that of Zagoruyko and
Komodakis 2016, without dropout.
`defense_gan_a` and `defense_gan_b` are the MNIST classifiers of Samangouei et al. 2018 with the
paddings of DiffDefense (Silva et al. 2023); their sizes are fixed.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from components import plugins
from components.config import Config
from components.data.draws import Draws
from components.data.image_set import Shape

Width = Annotated[int, Field(ge=1)]


class Classifier(nn.Module):
    """A network behind its own normalisation.

    `mean` and `std` (C,) are statistics of the training pixels. They are saved with the weights.
    With `raw` pixels they stay 0 and 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, channels: int, classes: int, raw: bool = False) -> None:
        super().__init__()
        self.network, self.classes, self.raw = network, classes, raw
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def normalise_by(self, pixels: Tensor) -> None:
        """Set the normalisation from training pixels (N,C,H,W) in [0,1], unless they are `raw`."""
        if self.raw:
            return
        self.mean.copy_(pixels.mean(dim=(0, 2, 3)))
        self.std.copy_(pixels.std(dim=(0, 2, 3)).clamp_min(1e-3))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N,K) of pixels (N,C,H,W) in [0,1]."""
        logits: Tensor = self.network((x - self.mean[:, None, None]) / self.std[:, None, None])
        return logits


class ClassifierSection(Config):
    """Base of the section of every classifier: a subclass has `kind: Literal[...]` and `build`.

    `raw_pixels` gives the network pixels in [0,1]; where it is absent, they are normalised.
    """

    kind: str
    raw_pixels: bool = False

    def build(self, shape: Shape, classes: int) -> Classifier:
        """Make the untrained network for images of `shape`; raise ValueError if it has none."""
        raise NotImplementedError

    def behind(self, network: nn.Module, shape: Shape, classes: int) -> Classifier:
        """Return a network of logits behind the normalisation that the section asks for."""
        return Classifier(network, shape[0], classes, self.raw_pixels)


class SmallCnn(ClassifierSection):
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
        return self.behind(nn.Sequential(*layers), shape, classes)


class ResNet(ClassifierSection):
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
        blocks = [(self.depth - 2) // 6] * 3
        return self.behind(_residual(shape, classes, self.width, blocks, _Block), shape, classes)


class ResNet18(ClassifierSection):
    """ResNet-18 with a 3 x 3 stem: four stages of two blocks; widths 1, 2, 4, 8 times `width`."""

    kind: Literal["resnet18"]
    width: Width

    def build(self, shape: Shape, classes: int) -> Classifier:
        """Make the untrained network for images of `shape`."""
        network = _residual(shape, classes, self.width, (2, 2, 2, 2), _Block)
        return self.behind(network, shape, classes)


class ResNet34(ClassifierSection):
    """ResNet-34 with a 3 x 3 stem: four stages of 3, 4, 6 and 3 blocks; widths as in ResNet-18."""

    kind: Literal["resnet34"]
    width: Width

    def build(self, shape: Shape, classes: int) -> Classifier:
        """Make the untrained network for images of `shape`."""
        network = _residual(shape, classes, self.width, (3, 4, 6, 3), _Block)
        return self.behind(network, shape, classes)


class ResNet50(ClassifierSection):
    """ResNet-50 with a 3 x 3 stem: the stages of ResNet-34, of bottlenecks four times as wide."""

    kind: Literal["resnet50"]
    width: Width

    def build(self, shape: Shape, classes: int) -> Classifier:
        """Make the untrained network for images of `shape`."""
        network = _residual(shape, classes, self.width, (3, 4, 6, 3), _Bottleneck)
        return self.behind(network, shape, classes)


class WideResNet(ClassifierSection):
    """WRN-`depth`-`widen`: three stages of (depth - 4) / 6 blocks, 16, 32 and 64 times `widen`."""

    kind: Literal["wide_resnet"]
    depth: int
    widen: Width

    @field_validator("depth")
    @classmethod
    def _depth(cls, depth: int) -> int:
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth {depth} is not 6n+4 (10, 16, 22, 28, 34, 40, 70, ...)")
        return depth

    def build(self, shape: Shape, classes: int) -> Classifier:
        """Make the untrained network for images of `shape`."""
        layers: list[nn.Module] = [nn.Conv2d(shape[0], 16, 3, 1, 1, bias=False)]
        blocks = [(self.depth - 4) // 6] * 3
        channels = _stages(layers, 16, 16 * self.widen, blocks, _PreBlock)
        layers += [nn.BatchNorm2d(channels), nn.ReLU(), *_pooled(channels, classes)]
        return self.behind(nn.Sequential(*layers), shape, classes)


class DefenseGanA(ClassifierSection):
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
        return self.behind(network, shape, classes)


class DefenseGanB(ClassifierSection):
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
        network = nn.Sequential(KeyedDropout(0.2, "pixels"), body, *head)
        return self.behind(network, shape, classes)


_Classifier = (
    SmallCnn | ResNet | ResNet18 | ResNet34 | ResNet50 | WideResNet | DefenseGanA | DefenseGanB
)

if TYPE_CHECKING:
    ClassifierConfig = Annotated[_Classifier, Field(discriminator="kind")]
else:
    __getattr__ = plugins.unions(
        __name__, "classifiers", {"ClassifierConfig": (_Classifier, ClassifierSection)}
    )


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
    """The residual block: two 3 x 3 convolutions of `width` and a shortcut.

    The shortcut picks every `stride`-th pixel, then convolves with stride 1, which is equal to a
    1 x 1 convolution with a stride. On CPUs with AVX-512, the weight gradient of that one writes
    outside of its memory where fewer than 16 channels are stored channels last (torch 2.13).
    """

    outputs_per_width = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride, outputs = stride, self.outputs_per_width * width
        self.body = self._convolutions(inputs, width, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(*_conv_norm_relu(inputs, outputs, 1, 1)[:-1])

    def _convolutions(self, inputs: int, width: int, outputs: int) -> nn.Sequential:
        first, second = (inputs, width, self.stride), (width, outputs, 1)
        return nn.Sequential(*_conv_norm_relu(*first), *_conv_norm_relu(*second)[:-1])

    def forward(self, x: Tensor) -> Tensor:
        picked = x[:, :, :: self.stride, :: self.stride]
        return F.relu(self.body(x) + self.shortcut(picked))


class _Bottleneck(_Block):
    """The residual block of ResNet-50: 1 x 1, 3 x 3 and 1 x 1, with four times `width` outputs."""

    outputs_per_width = 4

    def _convolutions(self, inputs: int, width: int, outputs: int) -> nn.Sequential:
        first, second = _conv_norm_relu(inputs, width, 1, 1), (width, width, self.stride)
        last = _conv_norm_relu(width, outputs, 1, 1)[:-1]
        return nn.Sequential(*first, *_conv_norm_relu(*second), *last)


class _PreBlock(nn.Module):
    """The block of Wide ResNets: BatchNorm and ReLU come before each of two 3 x 3 convolutions.

    Where the shape changes, the shortcut is a 1 x 1 convolution of the first ReLU's output. It
    picks pixels as in `_Block`.
    """

    outputs_per_width = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride, self.norm = stride, nn.BatchNorm2d(inputs)
        self.body = nn.Sequential(
            *_conv_norm_relu(inputs, width, stride), nn.Conv2d(width, width, 3, 1, 1, bias=False)
        )
        changes = stride != 1 or inputs != width
        self.shortcut = nn.Conv2d(inputs, width, 1, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm(x))
        if self.shortcut is not None:
            x = self.shortcut(active[:, :, :: self.stride, :: self.stride])
        added: Tensor = self.body(active)
        return added + x


def _conv_norm_relu(inputs: int, outputs: int, stride: int, size: int = 3) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]


def _residual(
    shape: Shape, classes: int, width: int, blocks: Sequence[int], block: type[_Block]
) -> nn.Sequential:
    layers = _conv_norm_relu(shape[0], width, 1)
    channels = _stages(layers, width, width, blocks, block)
    return nn.Sequential(*layers, *_pooled(channels, classes))


def _stages(
    layers: list[nn.Module], inputs: int, width: int, blocks: Sequence[int],
    block: type[_Block | _PreBlock],
) -> int:  # fmt: skip
    """Append stages of so many `blocks` each, and return the channels of the last.

    Each stage but the first has half the resolution and twice the width of the one before.
    """
    for stage, count in enumerate(blocks):
        for index in range(count):
            layers.append(block(inputs, width, 2 if stage and not index else 1))
            inputs = block.outputs_per_width * width
        width *= 2
    return inputs


def _pooled(channels: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]


def _feature_count(kind: str, body: nn.Module, shape: Shape, smallest: int) -> int:
    """Return the number of features of `body`; raise ValueError for a side below `smallest`."""
    if min(shape[1:]) < smallest:
        raise ValueError(
            f"{kind} takes images of at least {smallest} x {smallest}, not {shape[1]} x {shape[2]}"
        )
    with torch.no_grad():
        return int(body(torch.zeros(1, *shape)).numel())
