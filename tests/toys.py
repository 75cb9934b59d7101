"""Small sections, data, attacks and helpers that several test files share."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter
from torch import Tensor, nn
from toy_networks import Linear

from components.attacks import L2, Attack, AttackConfig, Crafted, Linf, craft
from components.attacks.contract import Outcome
from components.data.draws import Draws
from components.data.image_set import ImageSet
from components.models.checkpoints import ModelCard, build, save
from components.models.defense import Defense, Mode, Target, bind
from components.models.purifiers.controls import Threshold
from components.models.purifiers.diffusion.ddpm import Ddpm, Diffusion
from components.probes import Finding

LINF = Linf(norm="linf", eps_255=32.0)
BALL = L2(norm="l2", eps_l2=0.7)
THREATS = pytest.mark.parametrize("threat", [LINF, BALL], ids=["linf", "l2"])
# Every kind of attack, with settings small enough for a test, and other settings of some.
ATTACKS: dict[str, dict[str, Any]] = {
    "noise": {"tries": 5},
    "fgsm": {"random_start": False, "step": 1.0, "eot": 2},
    "bim": {"steps": 8, "step": 0.25, "early_stop": True, "eot": 2},
    "pgd": {
        "steps": 8, "step": 0.25, "restarts": 2, "random_start": True, "early_stop": True, "eot": 2,
    },
    "cw_l2": {
        "c": 1.0, "searches": 2, "steps": 10, "learning_rate": 0.1, "confidence": 0.0, "eot": 2,
    },
    "a3": {},
    "apgd_ce": {"steps": 8, "restarts": 2, "eot": 2},
    "apgd_t": {"steps": 8, "targets": 2, "eot": 2},
    "apgd_dlr": {"steps": 8, "restarts": 2, "eot": 2},
    "apgd_margin": {"steps": 8, "restarts": 2, "eot": 2},
    "autoattack": {"version": "standard"},
    "detector_aware": {
        "sees": "defense", "weights": [0.0, 10.0], "steps": 8, "step": 0.25, "eot": 2,
    },
    "deepfool": {"steps": 10, "overshoot": 0.02, "classes": 10, "eot": 2},
    "elastic_net": {
        "rule": "en", "beta": 0.01, "c": 1.0, "searches": 2, "steps": 10, "learning_rate": 0.1,
        "confidence": 0.0, "eot": 2,
    },
    "fab_t": {"steps": 8, "targets": 3, "restarts": 2},
    "flip": {"at": 0.5, "steps": 8, "candidates": 8, "eot": 2},
    "mi_fgsm": {"steps": 8, "step": 0.25, "decay": 1.0},
    "r_fgsm": {"alpha": 0.5, "eot": 2},
    "square": {"queries": 40, "eot": 2},
    "stadv": {"bound": 0.2, "steps": 8, "step": 0.25, "smoothness": 0.05, "eot": 2},
}  # fmt: skip
ATTACK_VARIANTS: dict[str, dict[str, Any]] = {
    "fgsm from a random start": {"kind": "fgsm", "random_start": True, "step": 1.25, "eot": 2},
    "detector_aware, classifier": {
        "kind": "detector_aware", "sees": "classifier", "weights": [10.0], "steps": 8,
        "step": 0.25, "eot": 2,
    },
    "pgd, last iterate": {
        "kind": "pgd", "steps": 8, "step": 0.25, "restarts": 1, "random_start": True,
        "early_stop": False, "eot": 2,
    },
}  # fmt: skip
# A small diffusion network.
DDPM: dict[str, Any] = {
    "kind": "ddpm", "width": 2, "steps": 20, "beta_start": 1e-3, "beta_end": 0.2,
    "centred": False, "norm_input": True,
}  # fmt: skip


# Networks


def strided_pointwise(network: nn.Module) -> list[str]:
    """Return the 1 x 1 convolutions with a stride, whose weight gradient may crash (oneDNN)."""
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
        and max(module.kernel_size) == 1
        and max(module.stride) > 1
    ]


def small_ddpm(shape: tuple[int, int, int] = (1, 8, 8), **changes: Any) -> Diffusion:
    """Return a frozen network of section `DDPM` in float64, the same at every call."""
    torch.manual_seed(0)
    network = Ddpm.model_validate({**DDPM, **changes}).build(shape)
    with torch.no_grad():
        network.last.weight.mul_(3)  # so that the predicted noise matters
    return network.double().eval().requires_grad_(False)


# Images and draws


def head(data: ImageSet, count: int) -> ImageSet:
    """Return the first `count` images."""
    return data[torch.arange(count)]


def uniform_pixels(count: int, shape: tuple[int, int, int]) -> Tensor:
    """Return images (count, *shape) of uniform pixels in [0,1), the same at every call."""
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(1))


def random_bytes(count: int, shape: tuple[int, ...], seed: int) -> npt.NDArray[np.uint8]:
    """Return images (count, *shape) of uniform bytes."""
    return np.random.default_rng(seed).integers(256, size=(count, *shape), dtype=np.uint8)


def png(image: npt.NDArray[np.uint8]) -> bytes:
    """Return an image (H,W) or (H,W,3) as the bytes of a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def same_images(one: ImageSet, other: ImageSet) -> bool:
    """Whether both sets hold the same images under the same ids, in the same order."""
    return torch.equal(one.ids, other.ids) and torch.equal(one.images, other.images)


def keyed(count: int) -> Draws:
    """Return the draws of `count` images whose ids are not row numbers."""
    return Draws(0, "score", torch.arange(count) * 11)


# Attacks


def parse_attack(name: str, **changes: Any) -> Any:
    """Return the attack of this name in `ATTACKS` or `ATTACK_VARIANTS`, with some changes."""
    section = ATTACK_VARIANTS.get(name) or {"kind": name, **ATTACKS[name]}
    return TypeAdapter(AttackConfig).validate_python({**section, **changes})


def linear_task(classes: int, count: int = 200) -> tuple[Linear, ImageSet]:
    """Return a linear model and grey images whose pixels stay clear of 0 and 1 under attack; one
    in twenty has a label that the model does not give.
    """
    generator = torch.Generator().manual_seed(classes)
    weight = torch.randn(classes, 36, generator=generator)
    images = torch.randint(90, 166, (count, 1, 6, 6), generator=generator, dtype=torch.uint8)
    model = Linear(weight, -(weight @ torch.full((36,), 128 / 255)))
    labels = model(images / 255).argmax(1)
    wrong = torch.rand(count, generator=generator) < 0.05
    labels[wrong] = (labels[wrong] + 1) % classes
    return model, ImageSet(images, labels, torch.arange(count) * 3, tuple(map(str, range(classes))))


def distances(model: Linear, data: ImageSet, dual: float) -> Tensor:
    """Return how far (N,) each image is from being wrong, below 0 if it is wrong already, in the
    norm whose dual is of order `dual`.
    """
    logits, y = model(data.pixels()).double(), data.labels
    gaps = logits.gather(1, y[:, None]) - logits
    spans = (model.weight[y][:, None] - model.weight[None]).double().norm(dim=2, p=dual)
    nearest: Tensor = (gaps / spans).scatter(1, y[:, None], torch.inf).amin(1)
    return nearest


def fooled(crafted: Crafted) -> int:
    """Return how many images the attack fooled."""
    return int(crafted.success.sum())


def failed(findings: list[Finding], level: str = "block") -> list[str]:
    """Return the names of the failed findings of this level."""
    return [f.name for f in findings if not f.passed and f.level == level]


def true_margins(model: nn.Module, crafted: Crafted) -> Tensor:
    """Return the margins (N,) of the crafted images: the true logit less the largest other one."""
    logits = model(crafted.images)
    true = logits.gather(1, crafted.labels[:, None]).squeeze(1)
    margins: Tensor = true - logits.scatter(1, crafted.labels[:, None], -torch.inf).amax(1)
    return margins


def resized(threat: Linf | L2, eps: float) -> Linf | L2:
    """Return the threat of the same norm with radius `eps`, in units of [0,1]."""
    if isinstance(threat, Linf):
        return Linf(norm="linf", eps_255=255 * eps)
    return L2(norm="l2", eps_l2=eps)


def grey_images(count: int, shape: tuple[int, int, int] = (1, 6, 6), classes: int = 2) -> ImageSet:
    """Return images of class 0 whose pixels stay clear of 0 and 1 under attack."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(90, 166, (count, *shape), generator=generator, dtype=torch.uint8)
    names = tuple(str(k) for k in range(classes))
    return ImageSet(images, torch.zeros(count).long(), torch.arange(count) * 5 + 2, names)


def thresholded(model: nn.Module) -> Defense:
    """Return the model behind a threshold at 0.5."""
    return Defense(model, Threshold(kind="threshold", at=0.5).build((1, 6, 6))).freeze()


def attack_model(
    attack: Attack, model: nn.Module, data: ImageSet, threat: Linf | L2, mode: Mode = "full"
) -> Crafted:
    """Attack a defense, or a bare classifier, in one batch."""
    defense = model if isinstance(model, Defense) else Defense(model, None)
    return craft(attack, defense.freeze(), mode, data, threat, 0, len(data))


def run_on_target(
    attack: Attack, defense: Defense, data: ImageSet, images: Tensor | None = None
) -> tuple[Target, Outcome]:
    """Run an attack without `craft`, on the pixels of `data` or on `images` in their place."""
    draws = Draws(0, "attack", data.ids)
    target = bind(defense.freeze(), "full", draws, getattr(attack, "eot", 1))
    pixels = data.pixels() if images is None else images
    return target, attack.run(target, pixels, data.labels, LINF, draws)


# Files


class Evil:
    """Calls a function where it is unpickled without care."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def write_model(
    folder: Path, model: dict[str, Any], shape: tuple[int, ...], names: list[str]
) -> Path:
    """Write the folder of an untrained network whose BatchNorm statistics are its own."""
    family = "classifier" if model["kind"] == "small_cnn" else "purifier"
    card = ModelCard(
        format=1, family=family, model=model, shape=list(shape), class_names=names, provenance={}
    )
    torch.manual_seed(0)
    network = build(card)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    save(folder, network, card)
    return folder
