"""Scores: forward passes, counting, intervals, paired tests. No gradient is taken here.

The headline is defined as follows. A is the clean image and every attack of the primary threat;
each attack stored one image per test image, chosen with noise of role `attack` alone. Per test
image the worst of A is chosen by the share correct over draws of role `select`, ties by the fixed
order of A; the headline is the mean share correct of these choices over new draws of role
`score`. So the noise that selects never scores. A deterministic defense has one draw of each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
import numpy.typing as npt
from torch import Tensor

from components.attacks import Crafted
from components.data.draws import Role
from components.models.accuracy import Counts, count_correct
from components.models.defense import Defense
from components.probes.statistics import summarise

# The name of the clean images among the sets.
CLEAN = "clean"
# Points of a curve over passes, to every tenfold.
TO_TENFOLD = 16


@dataclass(frozen=True)
class Score:
    """How often each test image was classified right: `select` and `score` (N,) out of `draws`."""

    draws: int
    select: Counts
    score: Counts

    def accuracy(self) -> npt.NDArray[np.float64]:
        """Return the share of right answers per image, under the scoring noise."""
        return self.score / self.draws


@dataclass(frozen=True)
class Effort:
    """What a set cost: forward and backward passes on every image (N,), and which are `fooled`.

    Where the attack stops at success (`Attack.stops`), an image was fooled when its passes ended.
    """

    passes: Counts
    fooled: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, crafted: Crafted) -> "Effort":
        """Count both kinds of passes together."""
        passes = crafted.forward + crafted.backward
        return cls(passes.numpy(), crafted.success.numpy())

    @classmethod
    def together(cls, efforts: "Sequence[Effort]") -> "Effort":
        """Return what several sets of the same images cost, each given as many passes."""
        fooled = np.stack([effort.fooled for effort in efforts])
        passes = np.stack([effort.passes for effort in efforts])
        first = np.where(fooled, passes, passes.max(0)).min(0)
        return cls(first, fooled.max(0))

    def longest(self) -> int:
        """Return the most passes spent on an image."""
        return int(self.passes.max(initial=1))

    def curve(self) -> list[tuple[int, float]]:
        """Return (k, share of the images that k passes did not fool), to the last that were spent.

        The k are whole numbers, evenly spaced by their logarithm.
        """
        most = self.longest()
        evenly = np.geomspace(1, most, 1 + int(np.ceil(TO_TENFOLD * np.log10(most))))
        counts = np.unique(evenly.round().astype(np.int64))
        return [(int(k), float(1 - (self.fooled & (self.passes <= k)).mean())) for k in counts]


def count_score(
    defense: Defense, images: Tensor, labels: Tensor, ids: Tensor, seed: int, role: Role,
    select_draws: int, score_draws: int, batch: int,
) -> Score:  # fmt: skip
    """Count right answers under `role`, and apart from those under the noise that selects.

    A deterministic defense is asked once, for both.
    """
    draws = score_draws if defense.stochastic else 1
    scored = count_correct(defense, images, labels, ids, seed, role, draws, batch)
    if not defense.stochastic:
        return Score(draws, scored, scored)
    chosen = count_correct(defense, images, labels, ids, seed, "select", select_draws, batch)
    return Score(draws, chosen * draws // select_draws, scored)


def per_class(
    shares: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], names: Sequence[str]
) -> dict[str, dict[str, float | int]]:
    """Return accuracy, interval and n of every class that has images, in the order of classes."""
    return {
        name: summarise(shares[labels == index])
        for index, name in enumerate(names)
        if (labels == index).any()
    }


def worst(scores: Mapping[str, Score], order: Sequence[str]) -> tuple[list[str], Score]:
    """Return per image the name of the worst entry by `select`, and the scores of these choices.

    Ties go to the first in `order`. The result's `score` is of noise that had no part in choosing.
    """
    select = np.stack([scores[name].select / scores[name].draws for name in order])
    chosen = select.argmin(axis=0)
    rows = np.arange(select.shape[1])
    draws = max(scores[name].draws for name in order)

    def pick(of: str) -> Counts:
        stack = np.stack([getattr(scores[n], of) * (draws // scores[n].draws) for n in order])
        return np.asarray(stack[chosen, rows], dtype=np.int64)

    return [order[index] for index in chosen], Score(draws, pick("select"), pick("score"))


def worst_of(score: Score, tries: int) -> npt.NDArray[np.float64]:
    """Return per image the chance that `tries` of its draws, taken at random, are all right."""
    tries = min(tries, score.draws)
    ways = comb(score.draws, tries)
    return np.array([comb(int(right), tries) / ways for right in score.score])


def majority_of(score: Score, tries: int) -> npt.NDArray[np.float64]:
    """Return per image the chance that more than half of `tries` random draws are right."""
    tries = min(tries, score.draws)
    ways = comb(score.draws, tries)

    def chance(right: int) -> float:
        wrong = score.draws - right
        needed = range(tries // 2 + 1, tries + 1)
        return sum(comb(right, k) * comb(wrong, tries - k) for k in needed) / ways

    return np.array([chance(int(right)) for right in score.score])
