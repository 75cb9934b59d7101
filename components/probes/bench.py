"""The bench of the probes: images, a defense and a threat, and the points that are probed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from components.attacks import L2, Attack, Crafted, Linf
from components.attacks.apgd import ApgdCe, random_direction
from components.attacks.contract import Outcome
from components.attacks.gradient import Pgd
from components.data.draws import Draws, NoiseStream, Role
from components.models.accuracy import count_correct
from components.models.defense import (
    Defense,
    Evaluation,
    Loss,
    Mode,
    SeededByBatch,
    Target,
    bind,
    draws_noise,
    fold_batch_norm,
)
from components.probes.contract import Accuracies
from components.probes.slopes import precise

EOT = 4
SCORE_DRAWS = 20
# The attack on whose way points are taken, and the fractions of its steps at which they are.
WAY = ApgdCe(kind="apgd_ce", steps=40, restarts=1, eot=EOT)
# What one probe may spend decides how many images and queries it has: so many multiply-adds, which
# are seconds on one core, or this fraction of the answers that the attacks took, if that is more.
BUDGET, SHARE = 1e11, 0.01
# A gradient costs about as much as so many answers.
GRADIENT = 3
STOPS = {"a quarter": 0.25, "half": 0.5, "all": 1.0}


def spread(ids: Tensor, secret: str, seed: int, count: int) -> Tensor:
    """Return the rows of `count` images of `ids` (N,), drawn from all of them, in random order.

    The draw is keyed with a `secret` that no defense can know while it is attacked (`Stored`), so
    it cannot know which images will be probed.
    """
    keys = Draws(seed, "clean", ids.cpu()).stream(f"{secret}/probes")
    return keys.uniform((), "probed").argsort()[:count]


def rough(defense: Defense) -> bool:
    """Say whether the purifier descends or rounds, so that a last bit may become another label."""
    purifier = defense.purifier
    return purifier is not None and bool(purifier.stand_ins or not purifier.differentiable)


class Headed(nn.Module, SeededByBatch):
    """A frozen classifier whose logits (N,K) pass through `head`; it draws the same noise."""

    def __init__(self, classifier: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.classifier, self.head = classifier, head
        self.stochastic = draws_noise(classifier)
        self.batchwise = isinstance(classifier, SeededByBatch) and classifier.batchwise
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, *noise: NoiseStream | None) -> Tensor:
        """Return what the head makes of the logits of pixels (N,C,H,W) in [0,1]."""
        found: Tensor = self.head(self.classifier(x, *noise))
        return found


@dataclass(frozen=True)
class Stored:
    """What the attacks on a defense left behind.

    `sets` are those of its bounded attacks in all modes: the probed images of each, at least.
    `secret` keys the draw of these images (`spread`). It is a digest of the defense and of all its
    sets: it does not exist while they are crafted. `answers` is the number of answers that the
    attacks took, over all images; a gradient counts as `GRADIENT`.
    """

    sets: Sequence[Crafted]
    secret: str
    answers: float

    def examples(self, ids: Tensor) -> list[Tensor]:
        """Return the examples (N,C,H,W) of every set for these ids (N,), and in their order."""
        return [one.images[_rows(one.ids, ids)] for one in self.sets]

    def worst(self, ids: Tensor) -> Tensor:
        """Return the example of lowest margin of these ids, (N,C,H,W)."""
        margins = torch.stack([one.margin[_rows(one.ids, ids)] for one in self.sets])
        return torch.stack(self.examples(ids))[margins.argmin(0), torch.arange(len(ids))]


def _rows(ids: Tensor, wanted: Tensor) -> Tensor:
    """Return the rows of `ids` at which the `wanted` ones are."""
    order = ids.argsort()
    return order[torch.searchsorted(ids[order], wanted)]


@dataclass(frozen=True)
class Bench:
    """What a trial runs on: a defense, pixels (N,C,H,W) with labels and ids (N,), a threat.

    `stored` is the worst stored example of each image, (N,C,H,W), if there is one. `batch` is the
    batch size of attacks and of the scoring. `mode` is the gradient mode of their attacks. `secret`
    draws more images, and `spent` is the number of answers that attacks took (`Stored`). `classes`
    are those that the images of the whole set have.
    """

    defense: Defense
    x: Tensor
    labels: Tensor
    ids: Tensor
    threat: Linf | L2
    seed: int
    stored: Tensor | None = None
    batch: int = 150
    mode: Mode = "full"
    secret: str = ""
    spent: float = 0
    classes: Tensor | None = None

    @property
    def draws(self) -> Draws:
        """Noise of role `attack` for these images."""
        return Draws(self.seed, "attack", self.ids)

    @cached_property
    def folded(self) -> Defense:
        """The copy of the defense that attacks run on."""
        return fold_batch_norm(self.defense)

    @cached_property
    def precise(self) -> Defense:
        """The copy of the defense that differences are taken of, in float64 if it runs so."""
        return precise(self.defense, self.x, self.draws)

    @cached_property
    def ball(self) -> Tensor:
        """A random point of the ball around each image: off the grid of stored levels.

        It is reflected at 0 and 1, not clipped: clipped pixels would tie, and ties are kinks.
        """
        way = random_direction(self.threat, self.draws, self.x, "probe point")
        moved = (self.x + self.threat.eps * way).abs()
        return 1 - (1 - moved).abs()

    @cached_property
    def way(self) -> tuple[Outcome, dict[str, Tensor]]:
        """The outcome of `WAY` on these images, and its iterates after each of the `STOPS`."""
        stops = [round(stop * WAY.steps) for stop in STOPS.values()]
        log = [self.x.clone() for _ in stops]
        target = bind(self.folded, self.mode, self.draws, WAY.eot)
        watched = _Watched(target, log, stops)
        outcome = WAY.run(watched, self.x, self.labels, self.threat, self.draws)
        return outcome, dict(zip(STOPS, log, strict=True))

    @cached_property
    def rated_way(self) -> Accuracies:
        """The rates of what `WAY` found."""
        return self.rate(self.way[0].images)

    @cached_property
    def behind(self) -> "Bench":
        """The bench of the classifier alone, with the purified images.

        Whatever stands in for a purifier, its attacks follow the gradient of this classifier there.
        """
        alone = Defense(self.defense.classifier, None).freeze()
        with torch.no_grad():
            x = self.defense.purify(self.x, self.draws)
        return replace(self, defense=alone, x=x, stored=None, mode="full")

    def points(self) -> dict[str, Tensor]:
        """Return all points of these images by name: (N,C,H,W) each."""
        return self.still_points() | {f"{stop} of the way": x for stop, x in self.way[1].items()}

    def still_points(self) -> dict[str, Tensor]:
        """Return the points that need no gradient."""
        points = {"clean": self.x, "ball": self.ball}
        return points if self.stored is None else {**points, "stored": self.stored}

    @cached_property
    def answers(self) -> float:
        """The number of answers to one image that one probe may take."""
        return max(BUDGET / multiply_adds(self), SHARE * self.spent)

    def affordable(self, most: int) -> "Bench":
        """Return the bench with the first images, at most `most`, on which `WAY` is affordable."""
        eot = WAY.eot if self.defense.stochastic else 1
        count = int(self.answers / (GRADIENT * WAY.steps * eot))
        return self.first(min(most, max(count, 8)))

    def first(self, count: int) -> "Bench":
        """Return the bench with the first `count` images, or all if there are fewer."""
        return self.pick(torch.arange(min(count, len(self.x)), device=self.x.device))

    def pick(self, rows: Tensor) -> "Bench":
        """Return the bench with some of its images."""
        stored = None if self.stored is None else self.stored[rows]
        return replace(
            self, x=self.x[rows], labels=self.labels[rows], ids=self.ids[rows], stored=stored
        )

    def run(self, attack: Attack, mode: Mode, threat: Linf | L2, seed: int) -> Tensor:
        """Return the images that `attack` finds."""
        draws = Draws(seed, "attack", self.ids)
        target = bind(self.folded, mode, draws, getattr(attack, "eot", 1))
        return attack.run(target, self.x, self.labels, threat, draws).images

    def accuracies(self, images: Tensor, role: Role = "select") -> Accuracies:
        """Return the accuracy per image (N,), under noise that no attack has seen."""
        counts = count_correct(
            self.defense, images, self.labels, self.ids, self.seed, role, SCORE_DRAWS, self.batch
        )
        return counts / SCORE_DRAWS

    def rate(self, images: Tensor) -> Accuracies:
        """Return the accuracies (2,N) under noise that selects and under noise that scores."""
        chosen = self.accuracies(images, "select")
        scored = self.accuracies(images, "score") if self.defense.stochastic else chosen
        return np.stack([chosen, scored])

    def pgd(self, steps: int, eot: int = EOT) -> Pgd:
        """Return PGD whose steps add up to 2.5 radii, whatever their number."""
        return Pgd(
            kind="pgd", steps=steps, step=2.5 / steps, restarts=1, random_start=True,
            early_stop=True, eot=eot,
        )  # fmt: skip


def worst(ratings: Sequence[Accuracies]) -> Accuracies:
    """Return the accuracy per image (N,) on the worst of the sets with these `Bench.rate`.

    The noise that selects the worst set is not the noise that scores it.
    """
    chosen, scored = np.stack(ratings, 1)
    lowest: Accuracies = scored[chosen.argmin(0), np.arange(chosen.shape[1])]
    return lowest


class _Watched(Target):
    """A target that keeps where an attack on it stands after so many gradients.

    An image that the attack leaves alone stays where it was left.
    """

    def __init__(self, target: Target, log: Sequence[Tensor], stops: Sequence[int]) -> None:
        super().__init__(
            target.defense, target.mode, target.draws, target.eot, target.passes, target.rows
        )
        self.log, self.stops = log, stops

    def __getitem__(self, rows: Tensor) -> "_Watched":
        return _Watched(super().__getitem__(rows), self.log, self.stops)

    def evaluate(
        self, x: Tensor, labels: Tensor, loss: Loss, query: int, bare: bool = False
    ) -> Evaluation:
        found = super().evaluate(x, labels, loss, query, bare)
        for stop, kept in zip(self.stops, self.log, strict=True):
            if query <= stop + 1:
                kept[self.rows] = x.detach()
        return found


def multiply_adds(bench: Bench) -> float:
    """Return the multiply-adds of the convolutions and linear layers in one answer to one image.

    Counted while it answers, so the steps of a descent count as often as they run, and thrice: each
    takes a gradient.
    """
    total = 0.0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        weight = module.get_parameter("weight")
        transposed = isinstance(module, nn.ConvTranspose2d)
        cost = (inputs[0] if transposed else output).numel() * weight[0].numel()
        total += cost * (GRADIENT if torch.is_grad_enabled() else 1)

    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    defense, first = bench.defense, torch.arange(1, device=bench.x.device)
    hooks = [m.register_forward_hook(count) for m in defense.modules() if isinstance(m, kinds)]
    try:
        with torch.no_grad():
            defense(bench.x[first], bench.draws[first])
    finally:
        for hook in hooks:
            hook.remove()
    return max(total, 1.0)
