"""Intervals and exact paired tests; the unit is always the image."""

from collections.abc import Sequence
from math import comb, sqrt

import numpy as np
import numpy.typing as npt

from components.models.accuracy import Counts
from components.probes.contract import Accuracies

Z95 = 1.959963984540054


def wilson(accuracy: float, n: int, z: float = Z95) -> tuple[float, float]:
    """Return the Wilson interval of an accuracy on n independent images (Wilson 1927).

    `z` is the quantile of the normal distribution: by default the interval is one of 95 %.
    """
    if n == 0:
        return 0.0, 1.0
    centre = accuracy + z**2 / (2 * n)
    half = z * sqrt(accuracy * (1 - accuracy) / n + z**2 / (4 * n * n))
    scale = 1 + z**2 / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def summarise(accuracies: Accuracies) -> dict[str, float | int]:
    """Return mean accuracy, Wilson interval (n = images, never images x draws) and n."""
    mean, n = float(accuracies.mean()) if len(accuracies) else 0.0, len(accuracies)
    low, high = wilson(mean, n)
    return {"accuracy": mean, "low": low, "high": high, "n": n}


def more_fooled(suspect: Accuracies, reference: Accuracies) -> float:
    """Return the p-value of the hypothesis that `suspect` fools no more images than `reference`.

    Both are accuracies per image (N,). This is the one-sided exact sign test over the images where
    they differ (McNemar's test where all accuracies are 0 or 1).
    """
    lower = int(np.count_nonzero(suspect < reference))
    higher = int(np.count_nonzero(suspect > reference))
    # Quotients of whole numbers are rounded once: exact to the last bit, however small p is.
    return _subsets(lower + higher, higher) / (1 << lower + higher)


def _subsets(n: int, most: int) -> int:
    """Return how many subsets of n things have at most `most` elements."""
    if most > n // 2:
        return (1 << n) - _subsets(n, n - most - 1)
    total, ways = 0, 1
    for size in range(most + 1):
        total += ways
        # Of C(n, size) to C(n, size + 1): far quicker than computing each anew.
        ways = ways * (n - size) // (size + 1)
    return total


def shares_differ(few: Counts, of: int, many: Counts, of_many: int) -> float:
    """Return the two-sided p-value that two rates of right answers are the same for every image.

    Image i was answered right `few[i]` times of `of`, and `many[i]` times of `of_many`, by
    independent draws. Given their sum, `few[i]` is hypergeometric if the rates are equal, so the
    sum over all images has an exact distribution: the convolution over images.
    """
    distribution = np.ones(1)
    totals, images = np.unique(few + many, return_counts=True)
    for total, count in zip(totals.tolist(), images.tolist(), strict=True):
        one = _hypergeometric(of, of_many, total)
        distribution = np.convolve(distribution, _power(one, count))
    seen = int(few.sum())
    return min(1.0, 2 * float(min(distribution[: seen + 1].sum(), distribution[seen:].sum())))


def _hypergeometric(of: int, rest: int, total: int) -> npt.NDArray[np.float64]:
    """Return the chances that k = 0..`of` of `total` right answers fall among the first `of`."""
    ways = comb(of + rest, total)
    return np.array(
        [comb(of, k) * comb(rest, total - k) / ways if k <= total else 0.0 for k in range(of + 1)]
    )


def _power(one: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.float64]:
    """Return the distribution of the sum of `count` independent variables, by squaring."""
    whole = np.ones(1)
    while count:
        if count & 1:
            whole = np.convolve(whole, one)
        one = np.convolve(one, one)
        count >>= 1
    return whole


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number (Holm 1979), in the order given."""
    adjusted, running = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        running = max(running, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = running
    return adjusted
