"""Carved out of components/evaluation.py."""

from collections.abc import Sequence
from math import comb, sqrt

import numpy as np
import numpy.typing as npt

Z95 = 1.959963984540054


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return the Wilson 95 % interval of a share among n independent images (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    centre = share + Z95**2 / (2 * n)
    half = Z95 * sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n))
    scale = 1 + Z95**2 / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def summarise(shares: npt.NDArray[np.float64]) -> dict[str, float | int]:
    """Return accuracy, Wilson interval (n = images, never images x draws) and n."""
    share, n = float(shares.mean()) if len(shares) else 0.0, len(shares)
    low, high = wilson(share, n)
    return {"accuracy": share, "low": low, "high": high, "n": n}


def more_fooled(suspect: npt.NDArray[np.float64], reference: npt.NDArray[np.float64]) -> float:
    """Return the p-value that `suspect` fools images `reference` does not, beyond chance.

    Both are shares correct per image (N,); the one-sided exact sign test over the images where
    they differ (McNemar's test where shares are 0 or 1).
    """
    fewer = int((suspect < reference).sum())
    more = int((suspect > reference).sum())
    if fewer + more == 0:
        return 1.0
    n = fewer + more
    ways = sum(comb(n, k) for k in range(fewer, n + 1))
    return float(ways / 2**n)


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number (Holm 1979), in the order given."""
    adjusted, running = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        running = max(running, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = running
    return adjusted
