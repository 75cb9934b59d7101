"""Purifiers, networks and a random defense that several test files share.

The salt of a defense's noise covers all that this file imports. It imports no attack, probe or
check, so that a change to one of these moves no draw of a test.
"""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

from components.data.draws import Draws, NoiseStream, fresh
from components.models.defense import Defense
from components.models.purifiers.contract import Purifier

# Purifiers


class Noisy(Purifier):
    """An honest random purifier: keyed Gaussian noise of scale `sigma`, clipped to [0,1]."""

    stochastic = True

    def __init__(self, sigma: float = 0.1) -> None:
        super().__init__()
        self.sigma = sigma

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        assert stream is not None
        noise = stream.normal(tuple(x.shape[1:]), "noise").to(x.dtype)
        return (x + self.sigma * noise).clamp(0, 1)


class Rounded(Purifier):
    """Rounds pixels to multiples of 1/`levels`: the gradient is zero, but the graph is whole."""

    def __init__(self, levels: int = 15, differentiable: bool = False) -> None:
        super().__init__()
        self.levels, self.differentiable = levels, differentiable

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        return torch.round(x * self.levels) / self.levels


class Detached(Purifier):
    """Scales pixels by `factor`, cut off from the graph."""

    def __init__(self, factor: float = 0.9) -> None:
        super().__init__()
        self.factor = factor

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        with torch.no_grad():
            return self.factor * x


class Blurred(Purifier):
    """An honest deterministic purifier: a slight blur."""

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        return 0.8 * x + 0.2 * nn.functional.avg_pool2d(x, 3, 1, 1)


# Classifiers


class Precise(nn.Module):
    """A classifier in float64, so that the size of a batch moves no result by rounding."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = deepcopy(classifier).double()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(x.double())
        return logits


class Linear(nn.Module):
    """Logits W x + b over flattened pixels."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).to(self.weight.dtype) @ self.weight.T + self.bias


class Shaken(nn.Module):
    """An honest random classifier: keyed Gaussian noise on the pixels and logits of another."""

    stochastic = True

    def __init__(self, classifier: nn.Module, pixels: float = 0.1, logits: float = 0.0) -> None:
        super().__init__()
        self.classifier, self.pixels, self.logits = classifier, pixels, logits

    def forward(self, x: Tensor, stream: NoiseStream | None = None) -> Tensor:
        stream = fresh(len(x), x.device) if stream is None else stream
        noise = stream.normal(tuple(x.shape[1:]), "noise").to(x.dtype)
        logits: Tensor = self.classifier(x + self.pixels * noise)
        return logits + self.logits * stream.normal(tuple(logits.shape[1:]), "more").to(logits)


class Constant(nn.Module):
    """Gives every image the same logits."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), -1) + 0 * x.flatten(1).sum(1, keepdim=True)


class Function(nn.Module):
    """A classifier from a function of pixels; it has a parameter, so a device."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class ParityModel(nn.Module):
    """The network that the authors' AutoAttack was recorded on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 5, stride=2, padding=2)
        self.conv2 = nn.Conv2d(8, 16, 5, stride=2, padding=2)
        self.fc1, self.fc2 = nn.Linear(784, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x).relu()).relu()
        logits: Tensor = self.fc2(self.fc1(x.flatten(1)).relu())
        return logits


# Defenses


def listening(classifier: nn.Module, record: Callable[[Draws], None]) -> Defense:
    """Return a random defense that reports the draws of every query to `record`."""

    class Listening(Defense):
        def purify(self, x: Tensor, draws: Draws | NoiseStream | None = None) -> Tensor:
            assert isinstance(draws, Draws)
            record(draws)
            return super().purify(x, draws)

        def detector_score(
            self, x: Tensor, draws: Draws | NoiseStream | None, purified: Tensor | None = None
        ) -> Tensor:
            assert isinstance(draws, Draws)
            record(draws)
            return super().detector_score(x, draws, purified)

    return Listening(classifier, Noisy())
