"""The defenses that attacks are tried on: a small network of random weights, with grey images.

This file imports no attack: the noise of a defense is salted with the code that defines it.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from components.data.draws import Draws, NoiseStream
from components.data.image_set import ImageSet, Shape
from components.models.classifiers import SmallCnn
from components.models.defense import Defense
from components.models.purifiers.contract import Purifier

# One label in so many is wrong from the start.
WRONG = 8


class NoisyBlur(Purifier):
    """A slight blur and keyed Gaussian noise, so that detector scores differ, too."""

    stochastic = True

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        """Return blurred and noisy images."""
        assert stream is not None
        noise = stream.normal(tuple(x.shape[1:]), "noise").to(x.dtype)
        blurred = 0.8 * x + 0.2 * nn.functional.avg_pool2d(x, 3, 1, 1)
        return (blurred + 0.02 * noise).clamp(0, 1)


class Counting(nn.Module):
    """A network in float64, where no size of batch shows by rounding; it counts its images.

    `passes` are the images that it answered, and the gradients that went through it. It is a list:
    a number would be a setting, which the noise of a defense depends on.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.passes = network.double(), [0, 0]

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N,K) in float64."""
        self.passes[0] += len(x)
        if x.requires_grad:
            x.register_hook(self._count)  # type: ignore[no-untyped-call]
        logits: Tensor = self.network(x.double())
        return logits

    def _count(self, gradient: Tensor) -> None:
        self.passes[1] += len(gradient)


class Constant(nn.Module):
    """Gives every image the same `logits`, whatever its pixels, through a graph of gradient 0."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N,K)."""
        return self.logits + 0 * x.flatten(1).sum(1, keepdim=True)


def small_network(shape: Shape, classes: int, device: torch.device) -> nn.Module:
    """Return a convolutional network of random weights that gives `grey_set` many classes.

    Its weights are the next of the global random stream.
    """
    model = SmallCnn(kind="small_cnn", width=4).build(shape, classes).to(device).eval()
    with torch.no_grad():
        last = [part for part in model.modules() if isinstance(part, nn.Linear)][-1]
        last.bias.sub_(model(grey_pixels(64, shape).to(device).float() / 255).mean(0))
    return model.requires_grad_(False)


def labelled(network: nn.Module, shape: Shape, classes: int, count: int) -> ImageSet:
    """Return grey images, away from black and white, that `network` gets right but for some.

    Their ids are not row numbers.
    """
    device = next(network.parameters()).device
    images = grey_pixels(count, shape)
    labels = network(images.to(device).float() / 255).argmax(1).cpu()
    labels[::WRONG] = (labels[::WRONG] + 1) % classes
    ids = torch.arange(count) * 5 + 2
    return ImageSet(images, labels, ids, tuple(str(k) for k in range(classes)))


def grey_pixels(count: int, shape: Shape) -> Tensor:
    """Return images (count, *shape) uint8 of random levels from 90 to 165."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(90, 166, (count, *shape), generator=generator, dtype=torch.uint8)


def recording(network: nn.Module, record: Callable[[Draws], None]) -> Defense:
    """Return `network` behind noise; every draw of it that a query takes goes to `record`."""

    class Recording(Defense):
        def purify(self, x: Tensor, draws: Draws | NoiseStream | None = None) -> Tensor:
            if isinstance(draws, Draws):
                record(draws)
            return super().purify(x, draws)

        def detector_score(
            self, x: Tensor, draws: Draws | NoiseStream | None, purified: Tensor | None = None
        ) -> Tensor:
            if isinstance(draws, Draws):
                record(draws)
            return super().detector_score(x, draws, purified)

    return Recording(network, NoisyBlur())
