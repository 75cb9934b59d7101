"""Curves of robust accuracy: over the radius, and over what an attack has spent.

What is drawn in the report and written for `dvc plots`; counting is done elsewhere.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from components.evaluation.counting import Effort
from components.probes.statistics import wilson

HUES = 8


@dataclass(frozen=True)
class Line:
    """One curve: points (x, y) and intervals (x, low, high), all in [0,1]; `note` stands with its
    name.
    """

    name: str
    hue: int
    points: list[tuple[float, float]]
    note: str
    spans: list[tuple[float, float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Chart:
    """Curves of shares on common axes; `ticks` are places in [0,1] on the lower one."""

    title: str
    axis: str
    ticks: list[tuple[float, str]]
    lines: list[Line]


def radii(found: Mapping[str, Any]) -> dict[float, dict[str, float | int]]:
    """Return the scores of one entry's probe at multiples of the radius; none if it had none."""
    for finding in found["checks"]["findings"]:
        if finding["name"] == "radius_pays":
            shares = dict(finding["figures"])
            n = int(shares.pop("n"))
            return {
                float(factor): {"accuracy": share, **_interval(share, n), "n": n}
                for factor, share in sorted(shares.items(), key=lambda each: float(each[0]))
            }
    return {}


def over_radius(probes: Mapping[str, Mapping[float, Mapping[str, float | int]]]) -> Chart | None:
    """Draw the probes of all entries, radii evenly spaced; None where there is no probe."""
    if not probes:
        return None
    factors = list(next(iter(probes.values())))
    lines = []
    for index, (name, scores) in enumerate(probes.items()):
        # Side by side, so that intervals at one radius do not hide each other.
        aside = 0.03 * ((index + 0.5) / len(probes) - 0.5)
        at = {factor: place / (len(factors) - 1) for place, factor in enumerate(factors)}
        lines.append(
            Line(
                name=name,
                hue=index,
                points=[(at[factor], float(one["accuracy"])) for factor, one in scores.items()],
                note=f"{100 * scores[1.0]['accuracy']:.0f} % at 1",
                spans=[
                    (at[factor] + aside, float(one["low"]), float(one["high"]))
                    for factor, one in scores.items()
                ],
            )
        )
    ticks = [(place / (len(factors) - 1), f"{factor:g}") for place, factor in enumerate(factors)]
    title = "Accuracy under PGD-20 over the radius"
    return Chart(title, "multiples of the radius", ticks, lines)


def over_passes(name: str, efforts: Mapping[str, Effort], most: int, hues: Sequence[str]) -> Chart:
    """Draw what is left standing of every set of an entry, on an axis from 1 to `most` passes.

    `hues` are the names of sets in the order of their colours.
    """
    width = math.log(max(most, 10))
    lines = [
        Line(
            name=attack,
            hue=hues.index(attack),
            points=[(math.log(k) / width, share) for k, share in effort.curve()],
            note=f"{100 * effort.curve()[-1][1]:.1f} %",
        )
        for attack, effort in efforts.items()
    ]
    ticks = [(math.log(k) / width, f"{k:,}") for k in decades(most)]
    return Chart(f"{name}: images still right", "passes spent on an image", ticks, lines)


def over_rejected(name: str, attacks: Mapping[str, Any], hues: Sequence[str]) -> Chart:
    """Draw the ROC curve of a detector for every set of an entry; `hues` as in `over_passes`."""
    lines = [
        Line(
            name=attack,
            hue=hues.index(attack),
            points=[(float(false), float(true)) for false, true in seen["roc"]],
            note=f"AUC {seen['auc']:.3f}",
        )
        for attack, seen in attacks.items()
    ]
    ticks = [(part / 4, f"{25 * part}") for part in range(5)]
    return Chart(f"{name}: attacked images rejected", "clean images rejected, %", ticks, lines)


def decades(most: int) -> Sequence[int]:
    """Return the powers of ten from 1 to `most`, and at least 10."""
    return [10**power for power in range(max(len(str(most)), 2))]


def longest(efforts: Iterable[Mapping[str, Effort]]) -> int:
    """Return the most passes that any set spent on an image."""
    return max((one.longest() for each in efforts for one in each.values()), default=1)


def _interval(share: float, n: int) -> dict[str, float]:
    low, high = wilson(share, n)
    return {"low": low, "high": high}
