"""Images and a small network that need no data set, for tests and timings on a GPU."""

from typing import Any

import torch
from torch import nn

from components.attacks import Linf
from components.attacks.gradient import Pgd
from components.config import Config
from components.data.image_set import ImageSet, Shape
from components.training.classification import AdversarialClassification
from components.training.contract import Frozen, InLoop
from components.training.loop import Training, fit

THREAT = Linf(norm="linf", eps_255=8.0)
CLASSES = 10
# Of the images of a test; a benchmark takes larger ones.
SHAPE: Shape = (3, 16, 16)


def images(count: int, shape: Shape, seed: int, contrast: float = 0.25) -> ImageSet:
    """Return images of ten classes: each is its class's pattern, grey or faint, under noise.

    `contrast` is the largest height of a pattern, in [0,1] units; every image has its own, so that
    some withstand an attack of a given radius and others do not.
    """
    coarse = torch.randn(CLASSES, shape[0], 4, 4, generator=torch.Generator().manual_seed(0))
    pattern = nn.functional.interpolate(coarse, shape[1:], mode="bilinear").clamp(-1, 1)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    height = contrast * torch.rand(count, 1, 1, 1, generator=generator)
    noise = 0.05 * torch.randn(count, *shape, generator=generator)
    pixels = (0.5 + height * pattern[labels] + noise).clamp(0, 1)
    names = tuple(str(k) for k in range(CLASSES))
    return ImageSet((255 * pixels).round().byte(), labels, torch.arange(count) * 7 + 3, names)


def recipe(**changes: Any) -> Training:
    """Return the settings of a short training, with some changes."""
    settings = {
        "epochs": 1, "batch_size": 50, "optimiser": "adam", "learning_rate": 0.01,
        "weight_decay": 0.0, "schedule": "one_cycle", "augmentation": "none",
        "precision": "float32", **changes,
    }  # fmt: skip
    return Training.model_validate(settings)


def pgd(early_stop: bool = True) -> Pgd:
    """Return PGD-20 from one random start."""
    return Pgd(
        kind="pgd", steps=20, step=0.25, restarts=1, random_start=True, early_stop=early_stop,
        eot=1,
    )  # fmt: skip


def trained(model: Config, data: ImageSet, device: torch.device, epochs: int) -> nn.Module:
    """Return a network that was trained on `data` against FGSM for a few epochs, frozen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: nn.Module = model.build(data.shape, CLASSES)  # type: ignore[attr-defined]
    network.to(device)
    attack = InLoop(steps=1, step=1.25, random_start=True, ramp=0.0)
    objective = AdversarialClassification(
        kind="adversarial_classification", attack=attack, w_clean=0.5
    ).bind(Frozen(None, (), THREAT))
    config = recipe(epochs=epochs, batch_size=min(100, len(data)), learning_rate=0.003)
    for _ in fit(network, objective, data, None, config, 0, lambda *_: {}, None):
        pass
    return network.eval().requires_grad_(False)
