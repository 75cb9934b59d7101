"""Scores: right answers are counted by forward passes alone.

The headline is defined as follows. A is the clean image and every attack of the primary threat;
each attack stored one image per test image, chosen with noise of role `attack` alone. For each test
image the worst of A is selected: the one of lowest accuracy over draws of role `select`, the first
in the fixed order of A where several are equal. The headline is the mean accuracy of the selected
images over new draws of role `score`: the noise that selects the worst attack is not the noise that
scores it. For a deterministic defense one draw serves both. For a random one the headline is the
accuracy under the worst single set of A, selected and scored likewise, if that is smaller.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from components.attacks import Crafted
from components.data.draws import Role
from components.models.accuracy import (
    Classes,
    Counts,
    Values,
    count_correct,
    predict,
    predict_and_detect,
    times,
)
from components.models.defense import Defense
from components.probes.contract import Accuracies
from components.probes.statistics import summarise

# The name of the clean images among the adversarial sets.
CLEAN = "clean"
# Points of `Effort.curve` per factor of ten in passes.
PER_DECADE = 16


@dataclass(frozen=True)
class Score:
    """How often each test image was classified right, of `draws`: `select` and `score` (N,)."""

    draws: int
    select: Counts
    score: Counts

    def accuracy(self) -> Accuracies:
        """Return the accuracy per image (N,), under the scoring noise."""
        return self.score / self.draws


@dataclass(frozen=True)
class Effort:
    """The cost of a set: forward and backward `passes` on every image (N,), and which are `fooled`.

    If the attack stops at success (`Attack.stops`), a fooled image was fooled by its last pass.
    """

    passes: Counts
    fooled: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, crafted: Crafted) -> "Effort":
        """Return the effort behind a set, both kinds of passes added."""
        passes = crafted.forward + crafted.backward
        return cls(passes.numpy(), crafted.success.numpy())

    @classmethod
    def together(cls, efforts: "Sequence[Effort]") -> "Effort":
        """Return the effort of several attacks on the same images that run side by side.

        After k passes of each, an image is fooled if one of them has fooled it.
        """
        fooled = np.stack([effort.fooled for effort in efforts])
        passes = np.stack([effort.passes for effort in efforts])
        first = np.where(fooled, passes, passes.max(0)).min(0)
        return cls(first, fooled.max(0))

    def longest(self) -> int:
        """Return the largest number of passes on an image."""
        return int(self.passes.max(initial=1))

    def curve(self) -> list[tuple[int, float]]:
        """Return pairs (k, fraction of images that k passes did not fool), for k up to `longest()`.

        The k are whole numbers, evenly spaced on a logarithmic scale.
        """
        most = self.longest()
        spaced = np.geomspace(1, most, 1 + int(np.ceil(PER_DECADE * np.log10(most))))
        counts = np.unique(spaced.round().astype(np.int64))
        return [(int(k), float(1 - (self.fooled & (self.passes <= k)).mean())) for k in counts]


@dataclass(frozen=True)
class Counted:
    """What a defense did on images: its `score`, and its predictions (D,N) behind `score.score`.

    `detected` are the detector scores (N,) of the images purified for it, None for a random
    defense, whose detector has noise of its own, and without a purifier.
    """

    score: Score
    predicted: Classes
    detected: Values | None


def count_score(
    defense: Defense, images: Tensor, labels: Tensor, ids: Tensor, seed: int, role: Role,
    select_draws: int, score_draws: int, batch: int,
) -> Score:  # fmt: skip
    """Count right answers under noise of `role` to score, and under other noise to select.

    A deterministic defense is evaluated once, for both.
    """
    predicted = predict(defense, images, ids, seed, role, score_draws, batch)
    return _scored(predicted, defense, images, labels, ids, seed, select_draws, batch)


def count_with_detector(
    defense: Defense, images: Tensor, labels: Tensor, ids: Tensor, seed: int, role: Role,
    select_draws: int, score_draws: int, batch: int,
) -> Counted:  # fmt: skip
    """Count as `count_score`; no image is purified again for the detector scores."""
    detected = None
    if defense.stochastic or defense.purifier is None:
        predicted = predict(defense, images, ids, seed, role, score_draws, batch)
    else:
        predicted, detected = predict_and_detect(defense, images, batch)
    score = _scored(predicted, defense, images, labels, ids, seed, select_draws, batch)
    return Counted(score, predicted, detected)


def _scored(
    predicted: Classes, defense: Defense, images: Tensor, labels: Tensor, ids: Tensor, seed: int,
    select_draws: int, batch: int,
) -> Score:  # fmt: skip
    draws, right = len(predicted), times(predicted, labels.cpu().numpy())
    if not defense.stochastic:
        return Score(draws, right, right)
    chosen = count_correct(defense, images, labels, ids, seed, "select", select_draws, batch)
    return Score(draws, chosen * draws // select_draws, right)


def count_sets(
    defense: Defense, sets: Mapping[str, Tensor], positions: Tensor, labels: Tensor, ids: Tensor,
    seed: int, select_draws: int, score_draws: int, batch: int,
) -> dict[str, Counted]:  # fmt: skip
    """Count on adversarial sets of the same images, (N,C,H,W) by name.

    The sets take turns: each round asks about every image once, in another set from image to image,
    by their `positions` (N,) in the data. So every set is the first for some of the images. A
    defense that remembers what it was asked has then seen nothing near them, and answers otherwise
    than the attack was answered (`same_answer`). An honest defense answers alike in any order.
    """
    names, rows, values = list(sets), np.arange(len(ids)), None
    draws = score_draws if defense.stochastic else 1
    counted = np.zeros((2, len(sets), len(ids)), dtype=np.int64)
    predicted = np.zeros((draws, len(sets), len(ids)), dtype=np.int64)
    detected = np.zeros((len(sets), len(ids)))
    for turn in range(len(names)):
        which = ((positions + turn) % len(names)).numpy()
        mixed = torch.stack([sets[names[index]][row] for row, index in enumerate(which)])
        one = count_with_detector(
            defense, mixed, labels, ids, seed, "score", select_draws, score_draws, batch
        )
        counted[:, which, rows] = one.score.select, one.score.score
        predicted[:, which, rows], values = one.predicted, one.detected
        if values is not None:
            detected[which, rows] = values
    return {
        name: Counted(
            Score(draws, *counted[:, index]),
            predicted[:, index],
            None if values is None else detected[index],
        )
        for index, name in enumerate(names)
    }


def per_class(
    accuracies: Accuracies, labels: npt.NDArray[np.int64], names: Sequence[str]
) -> dict[str, dict[str, float | int]]:
    """Return accuracy, interval and n of every class that has images, in the order of classes."""
    return {
        name: summarise(accuracies[labels == index])
        for index, name in enumerate(names)
        if (labels == index).any()
    }


def worst(scores: Mapping[str, Score], order: Sequence[str]) -> tuple[list[str], Score]:
    """Return per image the name of its worst set by `select`, and the scores on these sets.

    Of equal sets the first in `order` is taken. `score` of the result is under noise that did not
    select.
    """
    select = np.stack([scores[name].select / scores[name].draws for name in order])
    chosen = select.argmin(axis=0)
    rows = np.arange(select.shape[1])
    draws = max(scores[name].draws for name in order)

    def pick(of: str) -> Counts:
        counts = np.stack([getattr(scores[n], of) * (draws // scores[n].draws) for n in order])
        return np.asarray(counts[chosen, rows], dtype=np.int64)

    return [order[index] for index in chosen], Score(draws, pick("select"), pick("score"))


def worst_of_all(scores: Mapping[str, Score], order: Sequence[str]) -> tuple[list[str], Score]:
    """Return per image the set that carries the headline, and how often the defense is right.

    For a deterministic defense this is `worst`. For a random one it is the smaller of two: `worst`,
    and the one set of lowest accuracy over all images. Both are selected by `select` and scored by
    `score`. Among many equal attacks on noise, the choice per image is partly a choice of luck, and
    may end above what a single attack leaves.
    """
    chosen, per_image = worst(scores, order)
    lowest = min(order, key=lambda name: scores[name].select.mean() / scores[name].draws)
    _, single = worst({lowest: scores[lowest]}, [lowest])
    if single.accuracy().mean() < per_image.accuracy().mean():
        return [lowest] * len(chosen), single
    return chosen, per_image


def worst_of(score: Score, tries: int) -> Accuracies:
    """Return per image the probability that `tries` random draws are all right."""
    tries = min(tries, score.draws)
    ways = comb(score.draws, tries)
    return np.array([comb(int(right), tries) / ways for right in score.score])


def majority_of(score: Score, tries: int) -> Accuracies:
    """Return per image the probability that over half of `tries` random draws are right."""
    tries = min(tries, score.draws)
    ways = comb(score.draws, tries)

    def probability(right: int) -> float:
        wrong = score.draws - right
        needed = range(tries // 2 + 1, tries + 1)
        return sum(comb(right, k) * comb(wrong, tries - k) for k in needed) / ways

    return np.array([probability(int(right)) for right in score.score])
