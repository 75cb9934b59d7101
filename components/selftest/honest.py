"""Honest cases: defenses and known answers on which no blocking check may fail.

A case is added as one entry of `HONEST`. Two answers are known without any attack: an undefended
network falls, and a linear model is robust exactly where its margin exceeds the radius times the
dual norm of the weights.
"""

import torch
from torch import Tensor, nn

from components.attacks import Linf, craft
from components.attacks.apgd import ApgdCe
from components.checks.scores import undefended_falls
from components.checks.sets import effort
from components.data.image_set import ImageSet
from components.models.classifiers import ResNet, SmallCnn
from components.models.defense import Defense
from components.models.purifiers.autoencoder import ConvAutoencoder
from components.models.purifiers.controls import BitDepth, GaussianNoise, Identity, Median
from components.probes import Finding
from components.selftest.toy import (
    THREAT,
    Case,
    Toy,
    probed,
    purifying,
    stored,
    train,
    train_classifier,
)
from components.training.contract import Frozen
from components.training.koo import NormalTeacher

APGD = ApgdCe(kind="apgd_ce", steps=100, restarts=1, eot=1)
SMALL = SmallCnn(kind="small_cnn", width=8)
AUTOENCODER = ConvAutoencoder(
    kind="conv_autoencoder", blocks=2, width=12, strided=[2], residual="none"
)


def _undefended_falls(toy: Toy) -> list[Finding]:
    crafted = toy.craft(APGD)
    return [
        undefended_falls(1 - float(crafted.success.float().mean()), THREAT),
        effort("full/apgd_ce", APGD, crafted, 10, stochastic=False),
        *stored(toy, crafted.images),
    ]


class _Linear(nn.Module):
    """A linear classifier of pixels (N,C,H,W), whose robust accuracy has a closed form."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias

    def robust(self, x: Tensor, labels: Tensor, eps: float) -> Tensor:
        """Return which images (N,) no change below `eps` in L-infinity fools, box aside."""
        logits = self(x)
        gaps = logits.gather(1, labels[:, None]) - logits
        dual = (self.weight[labels][:, None] - self.weight[None]).abs().sum(2)
        safe: Tensor = (gaps > eps * dual) | (torch.arange(len(self.bias)) == labels[:, None])
        return safe.all(1)


def _closed_form(toy: Toy) -> list[Finding]:
    """Compare the robust accuracy of a linear model with its closed form, away from the box."""
    generator = torch.Generator().manual_seed(0)
    model = _Linear(torch.randn(4, 16, generator=generator), torch.zeros(4)).requires_grad_(False)
    levels = torch.randint(102, 154, (500, 1, 4, 4), generator=generator, dtype=torch.uint8)
    x = levels.float() / 255
    labels = model(x).argmax(1)
    data = ImageSet(levels, labels, torch.arange(500), ("0", "1", "2", "3"))
    threat = Linf(norm="linf", eps_255=4)
    crafted = craft(APGD, Defense(model, None).freeze(), "full", data, threat, 0, 500)
    exact = int(model.robust(x, labels, threat.eps).sum())
    found = int((~crafted.success).sum())
    return [
        Finding(
            name="closed_form",
            level="block",
            passed=abs(found - exact) <= 0.005 * len(data),
            detail=f"APGD-CE leaves {found} of {len(data)} images right, the closed form {exact}",
        )
    ]


class _Confident(nn.Module):
    """A classifier whose logits are a thousand times as large."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(x)
        return 1000 * logits


def _classifier(config: SmallCnn | ResNet, robust: bool) -> Case:
    return lambda toy: probed(None, train_classifier(config, toy.train, robust))(toy)


def _control(config: Identity | GaussianNoise | Median | BitDepth) -> Case:
    return lambda toy: probed(config.build(toy.test.shape))(toy)


def _autoencoder(config: ConvAutoencoder) -> Case:
    """Return the case of a purifier that was briefly trained to reproduce clean images."""

    def case(toy: Toy) -> list[Finding]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            purifier = config.build(toy.train.shape)
        frozen = Frozen(toy.classifier, (), THREAT)
        train(purifier, NormalTeacher(kind="normal_teacher").bind(frozen), toy.train, 3)
        return probed(purifier)(toy)

    return case


HONEST: dict[str, Case] = {
    "known answer: undefended falls": _undefended_falls,
    "known answer: linear model": _closed_form,
    "bare classifier": probed(None),
    "confident classifier": lambda toy: probed(None, _Confident(toy.classifier))(toy),
    "residual classifier": _classifier(ResNet(kind="resnet", depth=8, width=4), False),
    "adversarially trained classifier": _classifier(SMALL, True),
    "identity": _control(Identity(kind="identity")),
    "Gaussian noise": _control(GaussianNoise(kind="gaussian_noise", sigma=0.1)),
    "median filter": _control(Median(kind="median", size=3)),
    "autoencoder": _autoencoder(AUTOENCODER),
    "scaled input": purifying(lambda x, draws: 0.5 * x + 0.25),
    "blur": purifying(lambda x, draws: torch.nn.functional.avg_pool2d(x, 3, 1, 1)),
}
