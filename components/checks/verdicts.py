"""What a defense is worth beside no defense, controls and adversarial training.

Accuracies are per image (N,), under the worst examples of each entry: 0 or 1 of a deterministic
defense, fractions of the draws of a random one.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import lcm, sqrt
from typing import Literal

import numpy as np
import numpy.typing as npt

from components.attacks.contract import WRITTEN_ATTACKS
from components.models.defense import STAND_INS
from components.probes.contract import SIGNIFICANT, Accuracies
from components.probes.statistics import holm, wilson

Standing = Literal[
    "above", "below", "not told apart", "no better than a control", "broken", "no comparison",
    "not measured",
]  # fmt: skip
# The quantile of the normal distribution for a two-sided interval of 99 %: such an interval and a
# test at SIGNIFICANT hardly ever contradict each other.
Z99 = 2.5758293035489004
# The finest unit in which accuracies are compared: one part of so many.
FINEST = 10_000
# Rungs that are written for one defense, as `WRITTEN_ATTACKS` are: they differentiate what this
# defense needs, or hold its noise still.
WRITTEN_RUNGS = (*STAND_INS, "fixed_noise")


@dataclass(frozen=True)
class Difference:
    """Accuracy of a defense less that of `baseline`, its 99 % interval, and a two-sided p-value."""

    baseline: str
    mean: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Verdict:
    """How a defense stands, and the comparison with adversarial training if there was any.

    `broken`: not better than no defense. `no better than a control`: than at least one.
    `above`, `below`, `not told apart`: from adversarial training. `no comparison`: there is no
    adversarial training that beats no defense. `not measured`: a failed check makes one of the two
    accuracies an upper bound, which does not say which one is higher; or the classifier behind the
    defense was not scored alone. `rivals` are those that the defense does not beat, or the baseline
    it is compared with; without a comparison, the baselines whose adversarial training does not.
    """

    standing: Standing
    rivals: tuple[str, ...]
    difference: Difference | None


def higher(one: Accuracies, other: Accuracies) -> float:
    """Return the p-value of the hypothesis that `one` is right no more often than `other`.

    This is the one-sided exact randomisation test on the sum of the paired differences (Fisher
    1935, Pitman 1937): under the hypothesis both signs of each difference are equally likely. It
    is right for fractions, where a sign test is not: many small gains do not outweigh a few large
    losses. Where all accuracies are 0 or 1 it is McNemar's exact test.
    """
    differences = _whole(one - other)
    gained = int(differences[differences > 0].sum())
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    most = int((sizes * counts).sum())
    # The sum over the images whose sign is positive lies in 0..most. Its distribution is the
    # inverse Fourier transform of a product over the sizes; 2^k points are enough for no overlap.
    points = 1 << most.bit_length()
    frequencies = 2 * np.pi * np.arange(points // 2 + 1) / points
    transform = np.exp(-0.5j * frequencies * most)
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        transform *= np.cos(0.5 * frequencies * size) ** count
    chances = np.fft.irfft(transform, points) if points > 1 else np.ones(1)
    return float(np.clip(chances[gained : most + 1].sum(), 0.0, 1.0))


def difference(one: Accuracies, other: Accuracies, z: float = Z99) -> tuple[float, float, float]:
    """Return the mean of `one` less `other` and its paired interval, all in [-1,1].

    `z` is the quantile of the normal distribution: by default the interval is one of 99 %.

    The interval is Newcombe's method 10 (Statistics in Medicine 17, 1998, pp. 2635-2650): squared
    distances of each mean to its own Wilson limits, joined by the correlation of the pairs with
    its continuity correction. For fractions the covariance of the pairs takes the place of that of
    zeros and ones. The variance of a fraction is at most that of zeros and ones of the same mean,
    so there the interval is wider than it need be.
    """
    n, first, second = len(one), float(one.mean()), float(other.mean())
    covariance = float((one * other).mean()) - first * second
    corrected = max(covariance - 1 / (2 * n), min(covariance, 0.0))
    spread = sqrt(first * (1 - first) * second * (1 - second))
    correlation = corrected / spread if spread > 0 else 0.0
    (low_1, high_1), (low_2, high_2) = wilson(first, n, z), wilson(second, n, z)
    down = _joined(first - low_1, high_2 - second, correlation)
    up = _joined(high_1 - first, second - low_2, correlation)
    mean = first - second
    return mean, mean - down, mean + up


def unbeaten(right: Accuracies, rivals: Mapping[str, Accuracies]) -> dict[str, tuple[float, float]]:
    """Return the rivals that `right` does not beat, with (difference of means, p-value by Holm)."""
    values = holm([higher(right, rival) for rival in rivals.values()])
    return {
        name: (float(right.mean() - rival.mean()), p)
        for (name, rival), p in zip(rivals.items(), values, strict=True)
        if p >= SIGNIFICANT
    }


def verdict(
    right: Accuracies, bound: bool, lost: Collection[str], undefended: Mapping[str, Accuracies],
    controls: Collection[str], trained: Mapping[str, tuple[Accuracies, bool]],
) -> Verdict:  # fmt: skip
    """Say how a defense stands beside the other entries.

    `lost` are the entries that it does not beat, `undefended` the bare classifier behind it,
    `controls` the purifiers without training in front of the same. `trained` maps classifiers with
    adversarial training to (accuracies, bound); the most accurate is compared, of those that beat
    the undefended one, and that one itself where it is among them: training that changed nothing
    is no yardstick. `bound` says that a failed check makes an accuracy an upper bound.
    """
    hardened = {
        name: one
        for name, (one, _) in trained.items()
        if undefended
        and all(
            name == behind or higher(one, bare) < SIGNIFICANT for behind, bare in undefended.items()
        )
    }
    compared = _difference(right, hardened)
    broken = tuple(name for name in lost if name in undefended)
    if broken:
        return Verdict("broken", broken, compared)
    weak = tuple(name for name in lost if name in controls)
    if weak:
        return Verdict("no better than a control", weak, compared)
    if not undefended or (bound and compared is None):
        return Verdict("not measured", (), None)
    if compared is None:
        return Verdict("no comparison", tuple(trained), None)
    # A lower accuracy that is an upper bound, or a higher one above an upper bound, stays so.
    standing: Standing
    if compared.p >= SIGNIFICANT:
        standing, doubtful = "not told apart", bound or trained[compared.baseline][1]
    elif compared.mean > 0:
        standing, doubtful = "above", bound
    else:
        standing, doubtful = "below", trained[compared.baseline][1]
    return Verdict("not measured" if doubtful else standing, (compared.baseline,), compared)


def written_for(kinds: Mapping[str, str]) -> list[str]:
    """Return the attacks that were written for a defense, of its sets rung/attack with their kinds.

    These are rungs and kinds of attacks: stand-ins, fixed noise, attacks that know its detector.
    """
    rungs = {name.partition("/")[0] for name in kinds}
    return [
        *(rung for rung in WRITTEN_RUNGS if rung in rungs),
        *(kind for kind in WRITTEN_ATTACKS if kind in kinds.values()),
    ]


def _difference(right: Accuracies, trained: Mapping[str, Accuracies]) -> Difference | None:
    """Compare with the most accurate of `trained`; None where there is none."""
    if not trained:
        return None
    best = max(trained, key=lambda one: float(trained[one].mean()))
    mean, low, high = difference(right, trained[best])
    p = min(1.0, 2 * min(higher(right, trained[best]), higher(trained[best], right)))
    return Difference(best, mean, low, high, p)


def _whole(differences: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Return differences of fractions as whole numbers, in units of their common denominator.

    Where that is beyond `FINEST`, as for 1009 draws beside 32, they are rounded to that unit. Equal
    sizes of either sign round alike, so the test of the rounded differences is exact, too.
    """
    values = np.unique(differences)
    fractions = [Fraction(value).limit_denominator(FINEST) for value in values.tolist()]
    scale = min(lcm(*(fraction.denominator for fraction in fractions)), FINEST)
    whole: npt.NDArray[np.int64] = np.rint(differences * scale).astype(np.int64)
    return whole


def _joined(one: float, other: float, correlation: float) -> float:
    return sqrt(max(0.0, one**2 - 2 * correlation * one * other + other**2))
