"""Carved out of components/objectives.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from components.attacks import L2, Linf
from components.attacks.gradient import ascend
from components.config import Config
from components.data.draws import Draws
from components.models.defense import Defense, bind
from components.models.purifiers import Purifier

# Draws of the noise under which x' and x are learnt from; the attack uses 0, 1, 2, ...
SEEN_ATTACKED, SEEN_CLEAN = -1, -2

Weight = Annotated[float, Field(ge=0)]
Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """Clean images (N,C,H,W) float32, labels (N,), the pool's x' for them (or None).

    `step` counts the batches of the training.
    """

    images: Tensor
    labels: Tensor
    attacked: Tensor | None
    step: int = 0


@dataclass(frozen=True)
class Frozen:
    """The networks an objective may look through but never change, and the threat it trains for.

    `teachers` is (adversarial teacher, normal teacher) for distillation, else empty.
    """

    classifier: nn.Module | None
    teachers: Sequence[Purifier]
    threat: Linf | L2


class Objective(Protocol):
    """A bound objective."""

    def __call__(
        self, model: nn.Module, batch: Batch, progress: float, draws: Draws
    ) -> tuple[Tensor, Metrics]:
        """Return the loss to minimise and what to log."""
        ...


class InLoop(Config):
    """An attack inside training: bare PGD whose radius grows to the threat's over `ramp`."""

    steps: Annotated[int, Field(ge=1)]
    step: Annotated[float, Field(gt=0)]
    random_start: bool
    ramp: Annotated[float, Field(ge=0, le=1)]

    def perturb(
        self,
        model: nn.Module,
        defense: Defense,
        batch: Batch,
        threat: Linf | L2,
        progress: float,
        draws: Draws,
    ) -> Tensor:
        """Return x' that attacks `defense`; `model`, in training, is in eval mode meanwhile.

        Eval mode keeps the attack's forward passes out of the BatchNorm statistics.
        """
        radius = threat.scaled(min(1.0, progress / self.ramp)) if self.ramp else threat
        images, labels = batch.images, batch.labels
        start = radius.start(images, draws, "start") if self.random_start else images
        target = bind(defense, "full", draws, 1)
        model.eval()
        attacked = ascend(target, start, images, labels, radius, self.steps, self.step)
        model.train()
        return attacked


class PoolAdversary(Config):
    """x' from the adversarial pool."""

    kind: Literal["pool"]


class ClassifierAdversary(InLoop):
    """x' attacks the frozen classifier, in the loop."""

    kind: Literal["classifier"]


class DefenseAdversary(InLoop):
    """x' attacks the purifier in training and the classifier behind it, in the loop."""

    kind: Literal["defense"]


Adversary = Annotated[
    PoolAdversary | ClassifierAdversary | DefenseAdversary, Field(discriminator="kind")
]


def _attacked(
    adversary: PoolAdversary | ClassifierAdversary | DefenseAdversary,
    model: nn.Module,
    batch: Batch,
    frozen: Frozen,
    progress: float,
    draws: Draws,
) -> Tensor:
    classifier = _needed(frozen.classifier)
    if isinstance(adversary, PoolAdversary):
        assert batch.attacked is not None, "the stage did not load the pool"
        return batch.attacked
    assert isinstance(model, Purifier)
    purifier = model if isinstance(adversary, DefenseAdversary) else None
    defense = Defense(classifier, purifier)
    return adversary.perturb(model, defense, batch, frozen.threat, progress, draws)


def _needed(classifier: nn.Module | None) -> nn.Module:
    assert classifier is not None, "this objective looks through the frozen classifier"
    return classifier


def _true_class(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(1).gather(1, labels[:, None]).squeeze(1)


def _classified(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    return torch.stack([F.cross_entropy(one, labels) for one in logits]).sum()


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.detach().argmax(1) == labels).float().mean()
