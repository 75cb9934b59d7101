"""Charts of robust accuracy over the radius and over passes, and ROC curves, for the report."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from components.evaluation.counting import Effort
from pipelines.tasks.metrics import RadiusPoint, SetDetection

HUES = 8


@dataclass(frozen=True)
class Line:
    """One curve: points (x, y) and intervals (x, low, high), all in [0,1].

    The legend shows `note` beside the name.
    """

    name: str
    hue: int
    points: list[tuple[float, float]]
    note: str
    spans: list[tuple[float, float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Chart:
    """Curves of fractions on common axes; `ticks` are positions in [0,1] on the lower one."""

    title: str
    axis: str
    ticks: list[tuple[float, str]]
    lines: list[Line]


def over_radius(probes: Mapping[str, Sequence[RadiusPoint]]) -> Chart | None:
    """Draw the probes of all entries, radii evenly spaced; None where there is no probe."""
    if not probes:
        return None
    radii = [point.radius for point in next(iter(probes.values()))]
    at = {radius: position / (len(radii) - 1) for position, radius in enumerate(radii)}
    lines = []
    for index, (name, points) in enumerate(probes.items()):
        # Side by side, so that intervals at one radius do not hide each other.
        aside = 0.03 * ((index + 0.5) / len(probes) - 0.5)
        (whole,) = (point for point in points if point.radius == 1)
        lines.append(
            Line(
                name=name,
                hue=index,
                points=[(at[point.radius], point.accuracy) for point in points],
                note=f"{100 * whole.accuracy:.0f} % at 1",
                spans=[(at[point.radius] + aside, point.low, point.high) for point in points],
            )
        )
    ticks = [(position, f"{radius:g}") for radius, position in at.items()]
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
            points=[(math.log(k) / width, right) for k, right in effort.curve()],
            note=f"{100 * effort.curve()[-1][1]:.1f} %",
        )
        for attack, effort in efforts.items()
    ]
    ticks = [(math.log(k) / width, f"{k:,}") for k in decades(most)]
    return Chart(f"{name}: images still right", "passes spent on an image", ticks, lines)


def over_rejected(name: str, attacks: Mapping[str, SetDetection], hues: Sequence[str]) -> Chart:
    """Draw the ROC curve of a detector for every set of an entry; `hues` as in `over_passes`."""
    lines = [
        Line(
            name=attack,
            hue=hues.index(attack),
            points=seen.roc,
            note=f"AUC {seen.auc:.3f}",
        )
        for attack, seen in attacks.items()
    ]
    ticks = [(quarter / 4, f"{25 * quarter}") for quarter in range(5)]
    return Chart(f"{name}: attacked images rejected", "clean images rejected, %", ticks, lines)


def decades(most: int) -> Sequence[int]:
    """Return the powers of ten from 1 to `most`, and at least 10."""
    return [10**power for power in range(max(len(str(most)), 2))]


def longest(efforts: Iterable[Mapping[str, Effort]]) -> int:
    """Return the most passes that any set spent on an image."""
    return max((one.longest() for each in efforts for one in each.values()), default=1)
