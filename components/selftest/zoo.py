"""More honest defenses, of every kind that a false alarm was ever suspected of.

They take minutes, so the pipeline leaves them out; `limpid selftest --all` runs them. Purifiers are
small and trained for seconds: what counts is that their answers and gradients are those of their
kind, not that they are any good.
"""

from collections.abc import Callable
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.defense import Defense
from components.models.purifiers import InferenceConfig, Purifier, PurifierConfig
from components.models.purifiers.jpeg import Jpeg
from components.probes import Finding
from components.selftest.honest import AUTOENCODER
from components.selftest.toy import THREAT, Case, Toy, probed, probed_by, train
from components.training.atop import Atop
from components.training.classification import Classification
from components.training.contract import Frozen, Objective
from components.training.generative import (
    Denoising,
    NoisePrediction,
    ReformerDetectors,
    WganGp,
)


def _network(make: Callable[[], nn.Module], classes: int = 10) -> Case:
    """Return the case of a classifier of 8 x 8 digits, trained for seconds; see `_regrouped`."""

    def case(toy: Toy) -> list[Finding]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            body = make()
        data = _regrouped(toy, classes)
        model = Classifier(body, 1, classes)
        model.normalise_by(data.train.pixels())
        objective = Classification(kind="classification").bind(Frozen(None, (), THREAT))
        train(model, objective, data.train, 5)
        return probed_by(Defense(model, None).freeze(), data)

    return case


def _regrouped(toy: Toy, classes: int) -> Toy:
    """Return the toy with as many classes: parity for 2, the digit and its mean grey for 100."""

    def labels(data: ImageSet) -> Tensor:
        if classes == 100:
            grey = data.pixels().mean((1, 2, 3))
            return 10 * data.labels + (100 * (grey - 0.15)).long().clamp(0, 9)
        return data.labels % classes

    names = tuple(str(k) for k in range(classes))
    train, val, test = (
        ImageSet(data.images, labels(data), data.ids, names)
        for data in (toy.train, toy.val, toy.test)
    )
    return Toy(train, val, test, toy.classifier, toy.other)


def _cnn(
    act: type[nn.Module], classes: int = 10, norm: bool = False, pool: bool = False
) -> Callable[[], nn.Module]:
    """Return what makes a network of two convolutions and a linear layer."""

    def make() -> nn.Module:
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 12), (12, 24)):
            layers.append(nn.Conv2d(inputs, outputs, 3, 1 if pool else 2, 1))
            layers += [nn.GroupNorm(3, outputs)] if norm else []
            layers.append(act())
            layers += [nn.MaxPool2d(2)] if pool else []
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(96, classes))

    return make


class _Vit(nn.Module):
    """A small vision transformer (Dosovitskiy et al. 2021): 16 patches of 2 x 2, one block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 32, 2, 2)
        self.place = nn.Parameter(0.02 * torch.randn(16, 32))
        self.norms = nn.ModuleList([nn.LayerNorm(32), nn.LayerNorm(32)])
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.place
        inner = self.norms[0](tokens)
        tokens = tokens + self.attention(inner, inner, inner, need_weights=False)[0]
        tokens = tokens + self.mlp(self.norms[1](tokens))
        logits: Tensor = self.head(tokens.mean(1))
        return logits


class _Casting(nn.Module):
    """A network that computes in float32, whatever it is given."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x.float())
        return logits


def _casting(toy: Toy) -> list[Finding]:
    return probed(None, _Casting(toy.classifier))(toy)


def _compiled(toy: Toy) -> list[Finding]:
    return probed(None, torch.compile(toy.classifier, dynamic=True))(toy)  # type: ignore[arg-type]


def _purifier(network: dict[str, Any], objective: Objective, epochs: int = 8, **how: Any) -> Case:
    """Return the case of a purifier that was trained shortly; `how` is an inference, if any."""

    def case(toy: Toy) -> list[Finding]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            built = TypeAdapter(PurifierConfig).validate_python(network).build(toy.train.shape)
        train(built, objective, toy.train, epochs, gan=network["kind"] == "gan")
        if how:
            built = TypeAdapter(InferenceConfig).validate_python(how).wrap(built)
        assert isinstance(built, Purifier)
        built.eval().requires_grad_(False).calibrate(toy.train.pixels(), 100)
        return probed(built)(toy)

    return case


def _atop(toy: Toy) -> list[Finding]:
    """Return the findings of a masking autoencoder, fine-tuned by AToP."""
    model: dict[str, Any] = {
        "kind": "random_transform",
        "transform": {"kind": "rt2", "patch": 1, "missing": 0.15, "sigma": 0.1},
        "inner": AUTOENCODER.model_dump(),
    }
    tuned = Atop.model_validate({
        "kind": "atop", "lambda": 0.1, "loss": "mse", "target": "clean", "w_clean": 0.1,
        "adversary": {
            "kind": "defense", "steps": 1, "step": 1.25, "random_start": True, "ramp": 0.3,
        },
    })  # fmt: skip
    return _purifier(model, tuned.bind(Frozen(toy.classifier, (), THREAT)), 4)(toy)


NOTHING = Frozen(None, (), THREAT)
DENOISING = Denoising(kind="denoising", sigma_max=0.3).bind(NOTHING)
DIFFUSION = NoisePrediction(kind="noise_prediction").bind(NOTHING)
DENOISER = {"kind": "denoiser", "width": 8}
DDPM = {
    "kind": "ddpm", "width": 8, "steps": 20, "beta_start": 0.001, "beta_end": 0.2, "centred": True,
    "norm_input": True,
}  # fmt: skip
APUDAE: dict[str, Any] = {
    "kind": "apudae",
    "steps": 4,
    "scaled": False,
    "noise_255": 0.0,
    "transform": None,
}

ZOO: dict[str, Case] = {
    "two classes": _network(_cnn(nn.ReLU, 2), 2),
    "a hundred classes": _network(_cnn(nn.ReLU, 100), 100),
    "group norm": _network(_cnn(nn.ReLU, norm=True)),
    "max-pool": _network(_cnn(nn.ReLU, pool=True)),
    "softplus": _network(_cnn(nn.Softplus)),
    "small ViT": _network(_Vit),
    "network in float32": _casting,
    "compiled network": _compiled,
    "AToP": _atop,
    "Defense-GAN": _purifier(
        {"kind": "gan", "latent": 16, "width": 8},
        WganGp(kind="wgan_gp", critic_steps=3).bind(NOTHING), 30,
        kind="defense_gan", iterations=3, restarts=2, rate=10.0,
    ),
    "DiffPure": _purifier(
        DDPM, DIFFUSION, 8, kind="diffpure", t_star=2, sampler="ddpm", substeps=2
    ),
    "DiffDefense": _purifier(
        DDPM, DIFFUSION, 8, kind="diffdefense", mode="released", iterations=2, restarts=2, steps=1,
        rate=25.0,
    ),
    "APuDAE A": _purifier(
        DENOISER, DENOISING, **{**APUDAE, "optimiser": "sgd", "target": "minimum", "rate": 2.0}
    ),
    "APuDAE E": _purifier(
        DENOISER, DENOISING, **{**APUDAE, "optimiser": "adam", "target": "one_sided", "rate": 0.02}
    ),
    "MagNet": _purifier(
        # The paper's width of 3 learns nothing in seconds, and returns one grey for every image.
        {"kind": "magnet", "width": 6},
        ReformerDetectors(kind="reformer_detectors", volume=0.1).bind(NOTHING), 20,
    ),
    "JPEG": probed(Jpeg(kind="jpeg", quality=50).build((1, 8, 8))),
}  # fmt: skip
