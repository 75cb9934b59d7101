"""Purifiers that descend at test time: the anti-adversary layer, and self-supervision (SOAP)."""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from components.data.draws import Draws, NoiseStream
from components.models.classifiers import Classifier
from components.models.defense import margin
from components.models.purifiers import Purifier
from components.selftest.broken.parts import EPOCHS, Built, built, untrained
from components.selftest.toy import Toy, train
from components.training.contract import Batch, Metrics


class _Descent(Purifier):
    """Takes sign steps down a loss of the image, within `radius` (L-infinity) of it.

    The steps are constants to the gradient, since the derivative of a sign is zero.
    """

    def __init__(self, network: nn.Module, steps: int, step: float, radius: float) -> None:
        super().__init__()
        self.network, self.steps, self.step, self.radius = network, steps, step, radius

    def loss(self, x: Tensor, start: Tensor) -> Tensor:
        """Return what is minimised (N,) at `x`, for the images `start` (N,C,H,W)."""
        raise NotImplementedError

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        start, change = x.detach(), torch.zeros_like(x)
        with torch.enable_grad():
            for _ in range(self.steps):
                point = (start + change).requires_grad_()
                (slope,) = torch.autograd.grad(self.loss(point, start).sum(), point)
                change = (change - self.step * slope.sign()).clamp(-self.radius, self.radius)
        return (x + change).clamp(0, 1)


class _AntiAdversary(_Descent):
    def loss(self, x: Tensor, start: Tensor) -> Tensor:
        with torch.no_grad():
            predicted = self.network(start).argmax(1)
        return -margin(self.network(x), predicted)


def anti_adversary(toy: Toy, steps: int = 2, step: float = 0.15) -> Built:
    """Anti-adversary layer (Alfarra, Perez, Thabet, Bibi, Torr and Ghanem 2022).

    Two steps of 0.15 towards the class that is predicted, as in the paper, in front of a net that
    was trained normally. They climb the margin of that class; the paper's climb its probability,
    whose slope rounds to zero where the net is sure. The answer is nearly always that of the bare
    net.
    """
    purifier = _AntiAdversary(deepcopy(toy.classifier), steps, step, 1.0)
    return built(toy.classifier, purifier, toy.classifier)


class _TwoHeads(nn.Module):
    """A classifier, and a second head on its features that says by how much an image is turned."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        assert isinstance(classifier.network, nn.Sequential)
        self.classifier = classifier
        self.turns = deepcopy(classifier)
        assert isinstance(self.turns.network, nn.Sequential)
        head = classifier.network[-1]
        assert isinstance(head, nn.Linear)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            turns = nn.Linear(head.in_features, 4)
        self.turns.network = nn.Sequential(*list(classifier.network)[:-1], turns)

    def turned(self, x: Tensor) -> Tensor:
        """Return the cross-entropy (N,) of the four turns of each image."""
        views = torch.cat([x.rot90(k, (2, 3)) for k in range(4)])
        turns = torch.arange(4, device=x.device).repeat_interleave(len(x))
        losses = F.cross_entropy(self.turns(views), turns, reduction="none")
        return losses.view(4, len(x)).mean(0)


def _both(model: nn.Module, batch: Batch, progress: float, draws: Draws) -> tuple[Tensor, Metrics]:
    assert isinstance(model, _TwoHeads)
    loss = F.cross_entropy(model.classifier(batch.images), batch.labels)
    loss = loss + 0.5 * model.turned(batch.images).mean()
    return loss, {"loss": loss}


class _SelfSupervised(_Descent):
    def loss(self, x: Tensor, start: Tensor) -> Tensor:
        assert isinstance(self.network, _TwoHeads)
        return self.network.turned(x)


def self_supervised(toy: Toy) -> Built:
    """SOAP-like: purification by a self-supervised loss (Shi, Holtz and Mishne 2021).

    The loss is that of rotation prediction, on features that it shares with the classifier. Five
    sign steps, as in the paper; the radius is that of the threat, not chosen per image.
    """
    classifier = untrained(toy.train.shape)
    classifier.normalise_by(toy.train.pixels())
    model = _TwoHeads(classifier)
    train(model, _both, toy.train, EPOCHS)
    purifier = _SelfSupervised(deepcopy(model), 5, 0.06, 0.2)
    return built(model.classifier, purifier, model.classifier)
