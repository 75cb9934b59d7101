"""Configs, objectives and recorders that the tests of training share."""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from toys import LINF, head

from components.data.draws import Draws
from components.data.image_set import ImageSet
from components.models.purifiers import PurifierConfig
from components.training.atop import Atop
from components.training.contract import Batch, Frozen, Metrics, Objective
from components.training.koo import Distillation
from components.training.loop import Training, fit
from components.training.objectives import ClassifierObjective, PurifierObjective

AUTOENCODER = {
    "kind": "conv_autoencoder", "blocks": 3, "width": 6, "strided": [], "residual": "global",
}  # fmt: skip
NOISY = {
    "kind": "random_transform", "inner": AUTOENCODER,
    "transform": {"kind": "rt2", "patch": 2, "missing": 0.25, "sigma": 0.1},
}  # fmt: skip
MAGNET = {"kind": "magnet", "width": 3}
GAN = {"kind": "gan", "latent": 16, "width": 4}
DDPM = {
    "kind": "ddpm", "width": 4, "steps": 10, "beta_start": 0.0001, "beta_end": 0.2,
    "centred": False, "norm_input": True,
}  # fmt: skip
POOL = {"kind": "pool"}
IN_LOOP = {"steps": 3, "step": 0.5, "random_start": True, "ramp": 0.0}
TEACHER = {"kind": "adversarial_teacher", "adversary": POOL, "w_adv": 1.0, "w_classification": 0.0}
DISTILLATION = {
    "kind": "distillation", "adversary": POOL, "beta": 0.5, "gamma": 0.5, "nt_input": "clean",
    "w_classification": 0.0,
}  # fmt: skip
ATOP = {
    "kind": "atop", "adversary": POOL, "lambda": 0.1, "loss": "mse", "target": "clean",
    "w_clean": 0.0,
}  # fmt: skip
ROBUST = {"kind": "adversarial_classification", "attack": IN_LOOP, "w_clean": 0.5}
# Every kind of objective: the union or class that parses it, and a section of it.
SECTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "classification": (ClassifierObjective, {"kind": "classification"}),
    "adversarial_classification": (ClassifierObjective, ROBUST),
    "normal_teacher": (PurifierObjective, {"kind": "normal_teacher"}),
    "adversarial_teacher": (PurifierObjective, TEACHER),
    "reconstruction": (PurifierObjective, {"kind": "reconstruction", "loss": "mse"}),
    "distillation": (Distillation, DISTILLATION),
    "atop": (Atop, ATOP),
    "denoising": (PurifierObjective, {"kind": "denoising", "sigma_max": 0.3}),
    "reformer_detectors": (PurifierObjective, {"kind": "reformer_detectors", "volume": 0.1}),
    "noise_prediction": (PurifierObjective, {"kind": "noise_prediction"}),
    "wgan_gp": (PurifierObjective, {"kind": "wgan_gp", "critic_steps": 2}),
}


def parse(name: str, **changes: Any) -> Any:
    """Return the objective section of this kind, with some changes."""
    union, section = SECTIONS[name]
    return TypeAdapter(union).validate_python({**section, **changes})


def bind(name: str, frozen: Frozen, **changes: Any) -> Objective:
    """Return the bound objective of this kind."""
    objective: Objective = parse(name, **changes).bind(frozen)
    return objective


def untrained(config: dict[str, Any], seed: int = 0) -> Any:
    """Return a network for digits, in training mode."""
    torch.manual_seed(seed)
    built = TypeAdapter(PurifierConfig).validate_python(config).build((1, 8, 8))
    return built.train()


def first_batch(data: ImageSet, count: int = 64) -> tuple[Batch, Draws]:
    """Return the first images as a batch with x' of a pool, and their draws."""
    some = head(data, count)
    draws = Draws(0, "train", some.ids)
    moved = LINF.start(some.pixels(), draws, "pool")
    return Batch(some.pixels(), some.labels, moved), draws


# The loop

CONFIG = Training(
    epochs=4,
    batch_size=32,
    optimiser="adamw",
    learning_rate=0.01,
    weight_decay=0.001,
    schedule="one_cycle",
    augmentation="flip_crop",
    precision="float32",
)


def nothing(model: nn.Module, epoch: int) -> Mapping[str, float]:
    """Validate nothing."""
    return {}


def changed(**changes: Any) -> Training:
    """Return `CONFIG` with some changes."""
    return Training(**{**CONFIG.model_dump(), **changes})


class Scalar(nn.Module):
    """A model of one weight, in which every step of the optimiser shows."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value]))


class Recorder:
    """An objective of gradient 1 that records its calls."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.ids: list[list[int]] = []
        self.progress: list[float] = []
        self.weights: list[float] = []
        self.noise: list[Tensor] = []

    def __call__(
        self, model: nn.Module, batch: Batch, progress: float, draws: Draws
    ) -> tuple[Tensor, Metrics]:
        assert model.training and draws.role == "train"
        weight = model.get_parameter("weight")
        self.batches.append(batch)
        self.ids.append(draws.ids.tolist())
        self.progress.append(progress)
        self.weights.append(weight.item())
        self.noise.append(draws.uniform((2,), "test"))
        return weight.sum(), {"loss": weight.sum(), "step": torch.tensor(float(len(self.ids)))}


def record(data: ImageSet, attacked: Tensor | None = None, **changes: Any) -> Recorder:
    """Train a `Scalar` on `data` and return the record."""
    recorder = Recorder()
    steps = {"optimiser": "sgd", "weight_decay": 0.0, "augmentation": "none", **changes}
    for _ in fit(Scalar(), recorder, data, attacked, changed(**steps), 0, nothing, None):
        pass
    return recorder
