"""Classifiers of another kind: k-WTA, thermometer encoding, a stable ODE, mixup inference."""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from components.data.draws import Draws, NoiseStream
from components.data.image_set import ImageSet
from components.models.purifiers import Purifier
from components.selftest.broken.parts import CLASSES, EPOCHS, Built, built, plain, untrained
from components.selftest.toy import Toy, train
from components.training.contract import Batch, Metrics

HIDDEN = 64


class _Winners(nn.Module):
    """k-winners-take-all: the largest `share` of the features of an image stay, the rest is 0."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        kept = max(int(self.share * flat.shape[1]), 1)
        least = flat.topk(kept, 1).values[:, -1:]
        return (flat * (flat >= least)).view_as(x)


def k_wta(toy: Toy) -> Built:
    """k-winners-take-all in place of ReLU (Xiao, Zhong and Zheng 2020).

    The network is discontinuous at dense points, so the gradient of one does not lead to the next.
    Kept share 0.1, as in the paper; the network has three layers, not eighteen.
    """
    model = untrained(toy.train.shape)
    model.normalise_by(toy.train.pixels())
    assert isinstance(model.network, nn.Sequential)
    for index, layer in enumerate(model.network):
        if isinstance(layer, nn.ReLU):
            model.network[index] = _Winners(0.1)
    train(model, plain, toy.train, EPOCHS)
    return built(model, None, toy.classifier)


class _Thermometer(nn.Module):
    """Encodes pixels that are multiples of 1/`levels`: channel k is 1 where a pixel reaches k.

    Between two levels the channel is a ramp. The purifier in front leaves no such pixels, but it is
    what its gradient is taken of.
    """

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        below = torch.arange(self.levels, device=x.device, dtype=x.dtype)[:, None, None]
        return (self.levels * x - below).clamp(0, 1)


class _Levels(Purifier):
    """Rounds pixels to multiples of 1/`levels`: it has no gradient, and says so."""

    differentiable = False

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        return (self.levels * x).round() / self.levels


def thermometer(toy: Toy) -> Built:
    """Thermometer encoding (Buckman, Roy, Raffel and Goodfellow 2018).

    Sixteen levels, as in the paper. Rounding is a purifier here, the code the first layer of the
    classifier. The paper also trains adversarially; here the encoding stands alone.
    """
    levels = 16
    _, height, width = toy.train.shape
    model = nn.Sequential(_Thermometer(levels), untrained((levels, height, width)))
    train(model, plain, toy.train, EPOCHS)
    return built(model, _Levels(levels), toy.classifier)


class _Ode(nn.Module):
    """Features z (N,K), moved along dz/dt = f(z) for five units of time by Euler steps.

    f is a network of one hidden layer, less z.
    """

    def __init__(self, features: nn.Module, size: int) -> None:
        super().__init__()
        self.features = features
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.inner, self.outer = nn.Linear(size, HIDDEN), nn.Linear(HIDDEN, size)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.features(x)
        for _ in range(10):
            z = z + 0.5 * self.field(z)
        return z

    def field(self, z: Tensor) -> Tensor:
        """Return f (N,K)."""
        field: Tensor = self.outer(self.inner(z).tanh()) - z
        return field

    def jacobian(self, z: Tensor) -> Tensor:
        """Return the derivative of f (N,K,K)."""
        slope = 1 - self.inner(z).tanh().square()
        own = torch.eye(z.shape[1], device=z.device, dtype=z.dtype)
        jacobian: Tensor = (self.outer.weight * slope[:, None]) @ self.inner.weight - own
        return jacobian


def _stable(
    model: nn.Module, batch: Batch, progress: float, draws: Draws
) -> tuple[Tensor, Metrics]:
    """Train for right answers that are Lyapunov-stable equilibria (the paper's equation 12).

    f is small there, and its Jacobian is diagonal with negative entries.
    """
    assert isinstance(model, _Ode)
    end = model(batch.images)
    jacobian = model.jacobian(end)
    diagonal = jacobian.diagonal(dim1=1, dim2=2)
    others = jacobian - diagonal.diag_embed()
    loss = F.cross_entropy(end, batch.labels) + 0.05 * model.field(end).square().mean()
    loss = loss + 0.05 * diagonal.exp().mean() + 0.05 * others.abs().sum(2).mean()
    return loss, {"loss": loss}


def stable_ode(toy: Toy) -> Built:
    """SODEF-like: a stable neural ODE behind frozen features (Kang, Song, Ding and Tay 2021).

    The features are the ten logits of the base net, and the answer is the end of the path, without
    the paper's last layer of fixed, separated vectors. Euler steps of one half, five units of time.
    """
    model = _Ode(deepcopy(toy.classifier), CLASSES)
    train(model, _stable, toy.train, EPOCHS)
    return built(model, None, toy.classifier)


class _MixupInference(nn.Module):
    """Averages the answers to mixtures with images of other classes than the one predicted."""

    images: Tensor
    labels: Tensor

    def __init__(self, classifier: nn.Module, pool: ImageSet, weight: float) -> None:
        super().__init__()
        self.classifier, self.weight = classifier, weight
        self.register_buffer("images", pool.pixels())
        self.register_buffer("labels", pool.labels)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            predicted = self.classifier(x).argmax(1)
        pairs = self.weight * x[:, None] + (1 - self.weight) * self.images.to(x.dtype)
        answers = self.classifier(pairs.flatten(0, 1)).log_softmax(1)
        same = (self.labels == predicted[:, None])[:, :, None]
        answers = answers.view(len(x), len(self.labels), -1).masked_fill(same, -torch.inf)
        mean: Tensor = answers.logsumexp(1)
        return mean


def _mixed(model: nn.Module, batch: Batch, progress: float, draws: Draws) -> tuple[Tensor, Metrics]:
    """Train on pairs of images, mixed in random proportions (mixup, Zhang et al. 2018)."""
    weight = draws.uniform((1, 1, 1), "mixup")
    logits = model(weight * batch.images + (1 - weight) * batch.images.roll(1, 0))
    first, second = (
        F.cross_entropy(logits, labels, reduction="none")
        for labels in (batch.labels, batch.labels.roll(1, 0))
    )
    share = weight.flatten()
    loss = (share * first + (1 - share) * second).mean()
    return loss, {"loss": loss}


def mixup_inference(toy: Toy) -> Built:
    """Mixup inference with other labels (Pang, Xu and Zhu 2020).

    The classifier is trained by mixup. The paper averages thirty mixtures with images that it draws
    for every answer; here they are nine, with one fixed image of every other class.
    """
    model = untrained(toy.train.shape)
    model.normalise_by(toy.train.pixels())
    train(model, _mixed, toy.train, 2 * EPOCHS)
    firsts = [int((toy.train.labels == k).nonzero()[0]) for k in range(CLASSES)]
    inference = _MixupInference(deepcopy(model), toy.train[torch.tensor(firsts)], 0.6)
    return built(inference, None, model)
