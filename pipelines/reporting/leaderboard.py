"""How the trials of a search stand: their ranking with intervals, as a table and as pictures.

Accuracies are of validation images, chosen among many trials: what a winner is worth is measured on
the test images by `dvc repro`, after it was adopted.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from components.checks.scores import not_beaten
from components.data.shards import write_bytes
from pipelines.config.sections import Study
from pipelines.config.search_space import LogUniform, Value

FIGURES = ("robust", "robust_low", "robust_high", "clean", "seconds_per_image")
GREY, BLUE, RED = "#9aa3ad", "#1f6fb4", "#b3261e"


@dataclass(frozen=True)
class Trial:
    """One trial: its values by place, and what was last reported of it, after `epoch` epochs.

    `right` are the shares of right answers under the worst attack (N,), of trials that came to
    their end. `tied` is not worse than the best beyond chance; `front` is bettered by none in
    everything at once.
    """

    name: str
    values: Mapping[str, Value]
    figures: Mapping[str, float]
    epoch: int
    right: Sequence[float] | None
    tied: bool = False
    front: bool = False

    @classmethod
    def of(cls, name: str, values: Mapping[str, Value], report: Mapping[str, Any]) -> "Trial":
        """Return the trial as its last report has it."""
        figures = {key: report[key] for key in FIGURES if key in report}
        return cls(name, values, figures, int(report["epoch"]), report.get("right"))


def rank(trials: Sequence[Trial], study: Study) -> list[Trial]:
    """Return the trials, best first: those that came to their end by robust, then clean accuracy.

    Those that were stopped follow, the longest first. Exact paired tests, after Holm, say which are
    no worse than the best.
    """

    def order(trial: Trial) -> tuple[float, ...]:
        return (
            trial.right is None, -trial.epoch if trial.right is None else 0,
            -trial.figures["robust"], -trial.figures["clean"],
        )  # fmt: skip

    ranked = sorted(trials, key=order)
    ended = {t.name: np.asarray(t.right, np.float64) for t in ranked if t.right is not None}
    if not ended:
        return ranked
    best = next(iter(ended))
    tied = {best, *not_beaten(ended[best], {n: x for n, x in ended.items() if n != best})}
    return [
        replace(
            trial, tied=trial.name in tied, front=study.goal == "pareto" and _front(trial, ranked)
        )
        for trial in ranked
    ]


def table(ranked: Sequence[Trial], study: Study) -> Table:
    """Return the ranking for a terminal."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    shown.add_column("trial", no_wrap=True)
    for place in study.space:
        shown.add_column(place.split(".")[-1], justify="right")
    for title in ("clean", "robust, 95 %", "ms/image", "epochs", ""):
        shown.add_column(title, justify="right", no_wrap=True)
    for trial in ranked:
        best = trial.front if study.goal == "pareto" else trial.tied
        note = "front" if trial.front else "tied for best" if trial.tied else ""
        note = note if trial.right is not None else "unfinished"
        values = [_short(trial.values[place]) for place in study.space]
        shown.add_row(
            trial.name,
            *values,
            *_words(trial),
            str(trial.epoch),
            note,
            style="bold" if best else "",
        )
    return shown


def line(trial: Trial, study: Study) -> str:
    """Return how a trial stands, on one line."""
    values = ", ".join(f"{p.split('.')[-1]} {_short(trial.values[p])}" for p in study.space)
    clean, robust, milliseconds = _words(trial)
    time = f", {milliseconds} ms per image" if milliseconds else ""
    return (
        f"trial {trial.name}: {values}: clean {clean}, robust {robust}{time} (epoch {trial.epoch})"
    )


def draw(out: Path, ranked: Sequence[Trial], study: Study) -> None:
    """Write `parallel.png`, a line per trial over its values, and `pareto.png`, its accuracies."""
    ended = [trial for trial in ranked if trial.right is not None]
    write_bytes(out / "parallel.png", _parallel(ranked, study))
    write_bytes(out / "pareto.png", _scatter(ended))


def _front(trial: Trial, trials: Sequence[Trial]) -> bool:
    if trial.right is None:
        return False
    mine = _gains(trial)
    others = [_gains(other) for other in trials if other.right is not None]
    return not any((other >= mine).all() and (other > mine).any() for other in others)


def _gains(trial: Trial) -> Any:
    figures = trial.figures
    return np.array([figures["robust"], figures["clean"], -figures["seconds_per_image"]])


def _words(trial: Trial) -> tuple[str, str, str]:
    figures = trial.figures
    robust = f"{100 * figures['robust']:.1f}"
    if "robust_low" in figures:
        robust += f" ({100 * figures['robust_low']:.1f}-{100 * figures['robust_high']:.1f})"
    seconds = figures.get("seconds_per_image")
    time = "" if seconds is None else f"{1000 * seconds:.3g}"
    return f"{100 * figures['clean']:.1f}", robust, time


def _short(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _parallel(trials: Sequence[Trial], study: Study) -> bytes:
    """Draw every trial as a line over its values, coloured by robust accuracy.

    Dashed are those that were stopped, whose accuracy is that of an earlier epoch.
    """
    figure, axes = _canvas(2.2 * (len(study.space) + 1), 4)
    columns: dict[str, list[Any]] = {
        place: [trial.values[place] for trial in trials] for place in study.space
    }
    heights = [_heights(columns[p], isinstance(d, LogUniform)) for p, d in study.space.items()]
    robust = [trial.figures["robust"] for trial in trials]
    heights.append(_heights(robust, False))
    from matplotlib import colormaps

    for index, trial in enumerate(trials):
        colour, style = colormaps["viridis"](heights[-1][index]), "-" if trial.right else "--"
        axes.plot([column[index] for column in heights], style, color=colour, linewidth=1.6)
    titles = [*(place.split(".")[-1] for place in study.space), "robust accuracy"]
    for at, values in enumerate([*columns.values(), robust]):
        axes.axvline(at, color=GREY, linewidth=0.8)
        numbers = [v for v in values if isinstance(v, int | float)]
        for end, height in ((min, -0.06), (max, 1.03)):
            text = _short(end(numbers)) if numbers else ""
            axes.text(at, height, text, ha="center", fontsize=8, color="#444")
    axes.set_xticks(range(len(titles)), titles)
    axes.set_yticks([])
    axes.set_ylim(-0.1, 1.1)
    return _png(figure)


def _heights(values: Sequence[Any], logarithmic: bool) -> list[float]:
    """Return values between 0 and 1 on their axis; words in the order of their first use."""
    if not all(isinstance(value, int | float) for value in values):
        known = list(dict.fromkeys(values))
        values = [known.index(value) for value in values]
    numbers = np.log(values) if logarithmic else np.asarray(values, np.float64)
    span = float(np.ptp(numbers))
    return [float(x) for x in ((numbers - numbers.min()) / span if span else numbers * 0 + 0.5)]


def _scatter(trials: Sequence[Trial]) -> bytes:
    """Draw clean against robust accuracy with intervals; time is the size of a point."""
    figure, axes = _canvas(6, 4.5)
    slowest = max(trial.figures["seconds_per_image"] for trial in trials) or 1.0
    for trial in trials:
        found = trial.figures
        colour = RED if trial.front else BLUE if trial.tied else GREY
        clean, robust = 100 * found["clean"], 100 * found["robust"]
        axes.plot(
            [clean, clean], [100 * found["robust_low"], 100 * found["robust_high"]],
            color=colour, alpha=0.3,
        )  # fmt: skip
        size = 20 + 120 * found["seconds_per_image"] / slowest
        axes.scatter(clean, robust, s=size, color=colour, alpha=0.8, linewidths=0)
        axes.annotate(trial.name.rpartition("_")[2], (clean, robust), fontsize=7)
    axes.set_xlabel("clean accuracy, validation images, %")
    axes.set_ylabel("robust accuracy, validation images, %, and 95 % interval")
    axes.set_title("red: the front; blue: no worse than the best; size: time per image", fontsize=8)
    return _png(figure)


def _canvas(width: float, height: float) -> tuple[Any, Any]:
    # Not pyplot, which keeps figures in a global list and may want a screen.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    return buffer.getvalue()
