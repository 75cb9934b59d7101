"""The bench of the probes: images, a defense and a threat, and the points that are probed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from components.attacks import L2, Attack, Linf
from components.attacks.apgd import ApgdCe, random_direction
from components.attacks.contract import Outcome
from components.attacks.gradient import Pgd
from components.data.draws import Draws, Role
from components.models.accuracy import count_correct
from components.models.defense import (
    Defense,
    Evaluation,
    Loss,
    Mode,
    Target,
    bind,
    fold_batch_norm,
)
from components.probes.contract import Accuracies
from components.probes.slopes import precise

EOT = 4
SCORE_DRAWS = 20
# The attack on whose way points are taken, and the fractions of its steps at which they are.
WAY = ApgdCe(kind="apgd_ce", steps=40, restarts=1, eot=EOT)
# Multiply-adds that one probe may spend: they decide how many images and queries it has. That is
# seconds on one core.
BUDGET = 1e11
# A gradient costs about as much as so many answers.
GRADIENT = 3
STOPS = {"a quarter": 0.25, "half": 0.5, "all": 1.0}


def spread(ids: Tensor, digest: str, seed: int, count: int) -> Tensor:
    """Return the rows of `count` images of `ids` (N,), drawn from all of them, in random order.

    The draw is keyed with the digest of a defense: it cannot know which images are probed.
    """
    keys = Draws(seed, "clean", ids.cpu()).stream(f"{digest}/probes")
    return keys.uniform((), "probed").argsort()[:count]


def rough(defense: Defense) -> bool:
    """Say whether the purifier descends or rounds, so that a last bit may become another label."""
    purifier = defense.purifier
    return purifier is not None and bool(purifier.stand_ins or not purifier.differentiable)


@dataclass(frozen=True)
class Bench:
    """What a trial runs on: a defense, pixels (N,C,H,W) with labels and ids (N,), a threat.

    `stored` is the worst stored example of each image, (N,C,H,W), if there is one. `batch` is the
    batch size of attacks and of the scoring. `mode` is the gradient mode of their attacks.
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

    def points(self) -> dict[str, Tensor]:
        """Return all points of these images by name: (N,C,H,W) each."""
        return self.still_points() | {f"{stop} of the way": x for stop, x in self.way[1].items()}

    def still_points(self) -> dict[str, Tensor]:
        """Return the points that need no gradient."""
        points = {"clean": self.x, "ball": self.ball}
        return points if self.stored is None else {**points, "stored": self.stored}

    def affordable(self, most: int) -> "Bench":
        """Return the bench with the first images, at most `most`, on which `WAY` is affordable."""
        eot = WAY.eot if self.defense.stochastic else 1
        count = int(BUDGET / (GRADIENT * WAY.steps * eot * multiply_adds(self)))
        count = min(most, max(count, 8), len(self.x))
        return self.pick(torch.arange(count, device=self.x.device))

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
