"""What an objective is, and the adversarial examples x' that it may train on.

An objective section is bound to the frozen networks that it needs. The bound objective is called as
`(model, batch, progress, draws) -> loss, metrics`. `progress` in [0,1] is the finished part of the
training, so that ramps need no state. `draws` is keyed noise of role `train`, new in every epoch.

`adversary` says which model x' attacks. `pool` takes the stored examples, which were crafted once
against the frozen classifier (Koo). `classifier` attacks the frozen classifier in the loop (AToP's
FGSM). `defense` attacks purifier and classifier together in the loop, by the full gradient; only
this one depends on the purifier. `none` attacks nothing: x' is the clean image, for ablations that
train on clean images alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Protocol

from pydantic import Field
from torch import Tensor, nn

from components.attacks import L2, Linf
from components.attacks.gradient import ascend
from components.config import Config
from components.data.draws import Draws
from components.models.defense import Defense, bind
from components.models.purifiers import Purifier

# The draws of the purifier's noise when the loss of x' and of x is taken. The attack in the loop
# uses draws 0, 1, 2, ..., so it does not see this noise.
LOSS_ATTACKED, LOSS_CLEAN = -1, -2

Weight = Annotated[float, Field(ge=0)]
Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """Clean images (N,C,H,W) float32, labels (N,), and x' of the pool for them (or None).

    `step` is the number of the batch in the whole training, from 0. `taught` are the outputs of the
    teachers (N,C,H,W) each, where they are stored.
    """

    images: Tensor
    labels: Tensor
    attacked: Tensor | None
    step: int = 0
    taught: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Teacher:
    """A frozen purifier to distil; one that is `normal` was trained on clean images alone."""

    purifier: Purifier
    normal: bool


@dataclass(frozen=True)
class Frozen:
    """The networks that an objective uses but never changes, and the threat it trains for.

    `teachers` are those of a distillation, else there are none.
    """

    classifier: nn.Module | None
    teachers: Sequence[Teacher]
    threat: Linf | L2

    def required_classifier(self) -> nn.Module:
        """Return the classifier of an objective that cannot do without one."""
        assert self.classifier is not None, "this objective needs the frozen classifier"
        return self.classifier


class Objective(Protocol):
    """A bound objective."""

    def __call__(
        self, model: nn.Module, batch: Batch, progress: float, draws: Draws
    ) -> tuple[Tensor, Metrics]:
        """Return the loss to minimise and what to log."""
        ...


@dataclass(frozen=True)
class Taught:
    """An objective whose teachers give the same answer to an image in every epoch.

    `teach` returns their outputs for a batch, without gradient. Where nothing augments, the loop
    calls it once for every image, and then `objective` finds the outputs in its batches.
    """

    objective: Objective
    teach: Callable[[Batch], Sequence[Tensor]]

    def __call__(
        self, model: nn.Module, batch: Batch, progress: float, draws: Draws
    ) -> tuple[Tensor, Metrics]:
        """Return what `objective` does."""
        return self.objective(model, batch, progress, draws)


class InLoop(Config):
    """An attack inside training: plain PGD.

    Its radius grows linearly to that of the threat over the first part `ramp` of the training.
    """

    # How the accuracy under its x' is logged.
    metric: ClassVar[str] = "accuracy_attacked"

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
        """Return x' that attacks `defense`, with `model`, the one in training, in eval mode.

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


class FixedAdversary(Config):
    """Base of the adversaries whose x' is the same in every epoch."""

    def of(self, batch: Batch) -> Tensor:
        """Return x' of this batch (N,C,H,W)."""
        raise NotImplementedError

    def examples(
        self, model: nn.Module, batch: Batch, frozen: Frozen, progress: float, draws: Draws
    ) -> Tensor:
        """Return x' of this batch (N,C,H,W)."""
        return self.of(batch)


class PoolAdversary(FixedAdversary):
    """x' from the adversarial pool."""

    metric: ClassVar[str] = "accuracy_attacked"

    kind: Literal["pool"]

    def of(self, batch: Batch) -> Tensor:
        """Return the stored x' of this batch (N,C,H,W)."""
        assert batch.attacked is not None, "the stage did not load the pool"
        return batch.attacked


class NoAdversary(FixedAdversary):
    """No attack: x' is the clean image."""

    metric: ClassVar[str] = "accuracy_clean"

    kind: Literal["none"]

    def of(self, batch: Batch) -> Tensor:
        """Return the clean images of this batch (N,C,H,W)."""
        return batch.images


class ClassifierAdversary(InLoop):
    """x' attacks the frozen classifier, in the loop."""

    kind: Literal["classifier"]

    def examples(
        self, model: nn.Module, batch: Batch, frozen: Frozen, progress: float, draws: Draws
    ) -> Tensor:
        """Return x' (N,C,H,W) that attacks the classifier alone."""
        defense = Defense(frozen.required_classifier(), None)
        return self.perturb(model, defense, batch, frozen.threat, progress, draws)


class DefenseAdversary(InLoop):
    """x' attacks the purifier in training and the classifier behind it, in the loop."""

    kind: Literal["defense"]

    def examples(
        self, model: nn.Module, batch: Batch, frozen: Frozen, progress: float, draws: Draws
    ) -> Tensor:
        """Return x' (N,C,H,W) that attacks the classifier behind `model`."""
        assert isinstance(model, Purifier)
        defense = Defense(frozen.required_classifier(), model)
        return self.perturb(model, defense, batch, frozen.threat, progress, draws)


Adversary = Annotated[
    PoolAdversary | NoAdversary | ClassifierAdversary | DefenseAdversary,
    Field(discriminator="kind"),
]


def takes_pool(objective: Config) -> bool:
    """Say whether an objective section trains on x' of the adversarial pool."""
    return isinstance(getattr(objective, "adversary", None), PoolAdversary)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the fraction of logits (N,K) that are largest at their label, without gradient."""
    return (logits.detach().argmax(1) == labels).float().mean()
