"""A3, the adaptive auto attack: restarts of PGD on the margin that learn from those before them
(Liu et al. 2022, "Practical Evaluation of Adversarial Robustness via Adaptive Auto Attack").

A restart begins with steps of a whole radius along the gradient of a weighted sum of the logits.
The weights are random first; later ones have the signs of those that fooled images. After the first
restarts only the easiest of the images that stand are attacked, fewer and fewer of them, by more
and more steps. The others are given up and count as right. So accuracy under A3 is an upper bound,
and no claim rests on it: the number of record is that of a ladder with AutoAttack.

Signs and ranks are statistics of one part of the images, the batch that the attack is given: in
another batch an image may fare otherwise. The idea is the paper's. The schedule and all details are
those of the authors' code (liuye6666/adaptive_auto_attack) with its settings for CIFAR-10; where we
depart from it, a comment says so.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from components.attacks.apgd import runners_up
from components.attacks.contract import L2, Attack, Cost, Linf, LossFamily, Outcome
from components.attacks.search import Search, search_cost
from components.data.draws import Draws
from components.models.defense import Loss, Target, margin


@dataclass(frozen=True)
class Round:
    """`restarts` restarts on the easiest `share` of the images that stand.

    Each takes `lead` steps along a direction of the logits, then `steps` steps on the margin.
    """

    share: float
    lead: int
    steps: int
    restarts: int = 1


# Every image that stands takes part in these: without a direction, along a random one, and along
# one with the signs that the second round has learned.
OPENING = (Round(1, 0, 8), Round(1, 7, 15), Round(1, 7, 15))
# What follows, ...
BY_MARGIN = (
    Round(0.7, 7, 32), Round(0.6, 7, 37), Round(0.5, 7, 37), Round(0.4, 7, 42), Round(0.3, 7, 47),
    Round(0.2, 7, 52), Round(0.1, 7, 57), Round(0.1, 7, 57, 4), Round(0.065, 7, 62, 4),
    Round(0.03, 7, 67, 50),
)  # fmt: skip
# ... and what follows where directions alone fool images, since the margin has no good gradient.
BY_DIRECTION = (
    Round(1, 10, 15, 10), Round(1, 15, 20), Round(1, 15, 25), Round(1, 10, 20), Round(1, 10, 25),
    Round(1, 10, 28), Round(1, 10, 30), Round(0.8, 10, 35, 5), Round(0.5, 10, 45, 5),
    Round(0.5, 10, 55, 20),
)  # fmt: skip
# That is where they fool this fraction of what the first round leaves, in the other two.
LEADING = 0.05
# Where less than this fraction of the images stands, all of them go on, with fewer restarts in a
# round. The authors do so below 0.1, with ten restarts more instead, which costs more than
# AutoAttack.
FEW, FEW_RESTARTS = 0.2, 20


class A3(Attack):
    """A3: it has no settings. For deterministic defenses, under both norms, from two classes on.

    Raises ValueError for stochastic defenses: its ranks and signs take one answer for the truth.
    """

    early_stopping: ClassVar[bool] = True
    losses: ClassVar[tuple[LossFamily, ...]] = ("margin",)

    kind: Literal["a3"]

    def effort(self, classes: int, stochastic: bool) -> Cost:
        """The cost of an image that is given up after the opening, and a pass to rank classes."""
        gradients = sum(each.lead + each.steps for each in OPENING)
        return search_cost(gradients, len(OPENING), 1, stochastic) + Cost(1, 0)

    def require_fit(self, stochastic: bool) -> None:
        """Raise ValueError for a stochastic target."""
        if stochastic:
            raise ValueError(
                "a3 is not for stochastic defenses, whose single answers rank no images: "
                "use apgd_ce and apgd_dlr with eot, or autoattack with version: rand"
            )

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return the iterate of lowest margin."""
        self.require_fit(target.stochastic)
        search = Search(target, images, labels, threat, early_stop=True)
        _Restarts(search, draws).run()
        return search.outcome()


@dataclass(frozen=True)
class Direction:
    """Weights of the logits, whose weighted sum the first steps of a restart climb.

    The true class has a weight between `low` and `high`, one of the `nearest` runners-up has the
    weight `other`, and all other classes have weights between -1 and 1.
    """

    low: float
    high: float
    other: float
    nearest: int

    def weights(self, draws: Draws, labels: Tensor, ranked: Tensor, restart: int) -> Tensor:
        """Return weights (N,K); restarts take the runners-up in turn, as numbered from 1.

        `ranked` (N,K) are the classes by falling logit, the true one last. The authors draw the
        weight of the true class once for all images.
        """
        weights = random_weights(draws, ranked.shape[1])
        true = self.low + (self.high - self.low) * draws.uniform((1,), "a3 true class")
        runner_up = ranked[:, (restart - 1) % self.nearest, None]
        return weights.scatter(1, labels[:, None], true).scatter(1, runner_up, self.other)


def random_weights(draws: Draws, classes: int) -> Tensor:
    """Return weights (N,K) between -1 and 1."""
    return 2 * draws.uniform((classes,), "a3 weights") - 1


def learned_signs(weights: Tensor, labels: Tensor, reached: Tensor) -> tuple[float, float]:
    """Return the summed weights of the true class and of the class `reached` (N,) by fooled images.

    `weights` (N,K) are those that fooled them. In float64 the sums are exact, so that the order of
    the images does not matter.
    """
    true, other = (
        weights.double().gather(1, classes[:, None]).sum().item() for classes in (labels, reached)
    )
    return true, other


def choose(classes: int, true: float, other: float, leads: bool, last: bool) -> Direction:
    """Return the direction of a round, by what was learned (`learned_signs`).

    `leads` says whether directions alone fool images (`BY_DIRECTION`), `last` whether the round is
    one of the last. The weights of the two classes grow with the number of the others. From 100
    classes on the authors go by no signs; below ten they have no rule.
    """
    scale = max(classes / 10, 1)
    nearest = 20 if classes > 100 else 14 if classes > 10 else 4 if last and not leads else 9
    down = other < 0 and not (leads or last) and classes < 100
    if last:
        low, high = (0.0, 0.0) if leads else (-0.8, 0.1)
    elif leads or (true > 0 and classes < 100):
        low, high = -0.1, 0.5
    else:
        low, high = -0.5, 0.1
    weight = -0.8 if down else 0.8
    return Direction(scale * low, scale * high, scale * weight, min(nearest, classes - 1))


def planned(each: Round, standing: int, images: int) -> tuple[int, int]:
    """Return how many of `standing` images a round attacks, in a part of `images`, and how often.

    A fraction of an image is rounded up to a whole one, which gets as many restarts less. The
    authors attack at least 100, of 10,000 images.
    """
    if standing < FEW * images:
        return standing, min(each.restarts, FEW_RESTARTS)
    wanted = round(each.share * standing, 6)
    count = math.ceil(wanted)
    return count, math.ceil(each.restarts * wanted / count)


def step_lengths(steps: int) -> list[float]:
    """Return the lengths of the steps on the margin in radii: they fall along a cosine."""
    least = 0.1 if steps <= 10 else 0.001
    waves = [math.cos(math.pi * step / (steps + 1)) for step in range(steps)]
    return [least + (1 - least) * (1 + wave) / 2 for wave in waves]


class _Restarts:
    """The restarts on one part: the search, the ranks of its classes, the number of restarts."""

    def __init__(self, search: Search, draws: Draws) -> None:
        self.search, self.draws = search, draws
        self.ranked = search.labels[:, None][:, :0]
        self.made = 0

    def run(self) -> None:
        """Make all restarts, until no image stands."""
        blind, first, second = OPENING
        self._round(blind, None)
        left = self._rank()
        if not len(left):
            return
        number, classes = self.made, self.ranked.shape[1]
        led = self._round(first, None)
        signs = self._signs(left, number)
        led += self._round(second, choose(classes, *signs, leads=False, last=False))
        # The authors ask this anew in every round.
        leads = led >= LEADING * len(left)
        rounds, final = (BY_DIRECTION, 2) if leads else (BY_MARGIN, 3)
        for index, each in enumerate(rounds):
            last = index >= len(rounds) - final
            self._round(each, choose(classes, *signs, leads, last))

    def _standing(self) -> Tensor:
        """Make the rows that stand the active ones, the easiest first, and return them.

        Equal ones stand in the order of their ids.
        """
        search = self.search
        search.restart()
        order = self.draws.ids[search.rows].argsort(stable=True)
        easiest = search.margin[search.rows[order]].argsort(stable=True)
        search.select(order[easiest])
        return search.rows

    def _rank(self) -> Tensor:
        """Rank the classes of the rows that stand, at a random image on the edge of the ball.

        Return the rows that still stand. The authors do this before the first round, and under L2
        at the clean image.
        """
        search, rows = self.search, self._standing()
        if len(rows):
            noise = self.draws[rows].normal(tuple(search.images.shape[1:]), "a3 edge")
            noise = noise.to(search.images.dtype)
            x = search.project(search.threat.ascend(search.origin, noise, search.threat.eps))
            with torch.no_grad():
                logits = search.target[rows](x, 0)
            search.record(x, margin(logits, search.labels[rows]))
            self.ranked = search.labels[:, None].repeat(1, logits.shape[1])
            self.ranked[rows] = runners_up(logits, search.labels[rows])
        return self._standing()

    def _signs(self, rows: Tensor, restart: int) -> tuple[float, float]:
        """Return what the random weights of a restart have in common on those `rows` it fooled."""
        fooled = rows[self.search.margin[rows] <= 0]
        if not len(fooled):
            return 0.0, 0.0
        labels = self.search.labels[fooled]
        with torch.no_grad():
            logits = self.search.target[fooled](self.search.best[fooled], 0)
        weights = random_weights(self.draws[fooled].redraw(restart), logits.shape[1])
        return learned_signs(weights, labels, runners_up(logits, labels)[:, 0])

    def _round(self, each: Round, direction: Direction | None) -> int:
        """Make the restarts of a round, with random weights if there is no direction.

        Return how many images its steps along directions fooled. On few images the restarts run
        side by side, in a batch no larger than the part. The authors make one after another, and
        rank the images anew for each.
        """
        images, made, led = len(self.search.images), 0, 0
        while standing := len(self._standing()):
            count, restarts = planned(each, standing, images)
            if made >= restarts:
                break
            copies = min(restarts - made, max(images // count, 1))
            self.search.select(torch.arange(count, device=self.search.rows.device))
            numbers = range(self.made, self.made + copies)
            for runs, of, _ in self.search.copies(copies):
                led += _climb(runs, *self._begin(of[::copies], numbers, direction), each)
            self.made, made = self.made + copies, made + copies
        return led

    def _begin(
        self, rows: Tensor, numbers: range, direction: Direction | None
    ) -> tuple[Tensor, Tensor]:
        """Return the start and the weights of each restart, all of one of the `rows` together."""
        search, starts, weights = self.search, [], []
        labels, ranked = search.labels[rows], self.ranked[rows]
        for number in numbers:
            draws = self.draws[rows].redraw(number)
            starts.append(search.threat.start(search.images[rows], draws, "a3 start"))
            weights.append(
                direction.weights(draws, labels, ranked, number)
                if direction
                else random_weights(draws, ranked.shape[1])
            )
        return torch.stack(starts, 1).flatten(0, 1), torch.stack(weights, 1).flatten(0, 1)


def _climb(search: Search, x: Tensor, weights: Tensor, each: Round) -> int:
    """Make a restart of a round from `x` over the active rows of `search`.

    `weights` (n,K) are those of the steps that lead. Return how many rows these fooled.
    """
    threat, led = search.threat, 0
    for step, length in enumerate([1.0] * each.lead + step_lengths(each.steps)):
        loss = _weighted(weights) if step < each.lead else _lack_of_margin
        gradient = search.evaluate(x, loss).gradient
        if step == each.lead:
            led = int((search.margin <= 0).sum())
        x, gradient, weights = search.drop_fooled(x, gradient, weights)
        if not len(search.rows):
            return len(search.margin) if step < each.lead else led
        x = search.project(threat.ascend(x, gradient, length * threat.eps))
    search.query(x)
    return led


def _weighted(weights: Tensor) -> Loss:
    """Return the sum of the logits under `weights` (n,K)."""
    return lambda logits, labels: (weights * logits).sum(1)


def _lack_of_margin(logits: Tensor, labels: Tensor) -> Tensor:
    return -margin(logits, labels)
