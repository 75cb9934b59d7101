"""The trials of a search: their ranking with intervals, and what is shown while it runs.

Accuracies are of validation images, and they choose the best of many trials. Robust accuracy under
a short ladder is an upper bound, and is called one. What the best trial is worth is measured on the
test images by `dvc repro`, after its values were adopted.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich import box
from rich.live import Live
from rich.table import Table

from components.checks.verdicts import unbeaten
from pipelines.config.search_space import Value
from pipelines.config.sections import Study
from pipelines.runner.context import Context
from pipelines.tasks.trial import ROBUST

LOW, HIGH = f"{ROBUST}_low", f"{ROBUST}_high"
FIGURES = (ROBUST, LOW, HIGH, "clean", "seconds_per_image")
Report = Mapping[str, Any]


@dataclass(frozen=True)
class Trial:
    """One trial: its values by key of params.yaml, and its last report, after `epoch` epochs.

    `right` are the fractions of right answers under the worst attack (N,), of trials that ran to
    their end. `tied` is not worse than the best beyond chance; no trial is better than `front` in
    one figure and at least as good in the others.
    """

    name: str
    values: Mapping[str, Value]
    figures: Mapping[str, float]
    epoch: int
    right: Sequence[float] | None
    tied: bool = False
    front: bool = False

    @classmethod
    def of(cls, name: str, values: Mapping[str, Value], report: Report) -> "Trial":
        """Return the trial as its last report describes it."""
        figures = {key: report[key] for key in FIGURES if key in report}
        return cls(name, values, figures, int(report["epoch"]), report.get("right"))


def rank(trials: Sequence[Trial], study: Study) -> list[Trial]:
    """Return the trials, best first: those that ran to their end by robust, then clean accuracy.

    Those that were stopped follow, the longest first. Exact paired tests, after Holm, say which are
    no worse than the best.
    """

    def order(trial: Trial) -> tuple[float, ...]:
        return (
            trial.right is None, -trial.epoch if trial.right is None else 0,
            -trial.figures[ROBUST], -trial.figures["clean"],
        )  # fmt: skip

    ranked = sorted(trials, key=order)
    ended = {t.name: np.asarray(t.right, np.float64) for t in ranked if t.right is not None}
    if not ended:
        return ranked
    best = next(iter(ended))
    tied = {best, *unbeaten(ended[best], {n: x for n, x in ended.items() if n != best})}
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
    for key in study.space:
        shown.add_column(key.split(".")[-1], justify="right")
    for title in ("clean", "robust (upper bound), 95 %", "ms/image", "epochs", ""):
        shown.add_column(title, justify="right", no_wrap=True)
    for trial in ranked:
        best = trial.front if study.goal == "pareto" else trial.tied
        note = "front" if trial.front else "tied for best" if trial.tied else ""
        note = note if trial.right is not None else "unfinished"
        values = [_short(trial.values[key]) for key in study.space]
        shown.add_row(
            trial.name,
            *values,
            *_numbers(trial),
            str(trial.epoch),
            note,
            style="bold" if best else "",
        )
    return shown


def line(trial: Trial, study: Study) -> str:
    """Return the values and figures of a trial on one line."""
    values = ", ".join(f"{key.split('.')[-1]} {_short(trial.values[key])}" for key in study.space)
    clean, robust, milliseconds = _numbers(trial)
    time = f", {milliseconds} ms per image" if milliseconds else ""
    found = f"clean {clean}, robust at most {robust}{time}"
    return f"trial {trial.name}: {values}: {found} (epoch {trial.epoch})"


class SearchMonitor:
    """Shows and logs a running search: a live table on a terminal, else a line a report.

    `read` returns every trial with its reports, one an epoch. Callbacks of the search could not do
    this: they would be stored with it, and restored without their threads.
    """

    def __init__(
        self, study: Study, context: Context,
        read: Callable[[], Iterable[tuple[Trial, Sequence[Report]]]],
    ) -> None:  # fmt: skip
        self.study, self.context, self.read = study, context, read
        self.seen: dict[str, int] = {}
        self.live: Live | None = None

    def __enter__(self) -> "SearchMonitor":
        if sys.stdout.isatty():
            self.live = Live(refresh_per_second=2)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def trials(self) -> list[Trial]:
        """Return every trial that has reported, as its last report describes it."""
        return [trial for trial, _ in self.read()]

    def update(self) -> None:
        """Show and log the reports that are new."""
        news = False
        for trial, reports in self.read():
            for report in reports[self.seen.get(trial.name, 0) :]:
                news = True
                figures = {name: float(report[name]) for name in FIGURES if name in report}
                self.context.metrics.nested(trial.name, trial.values, figures, int(report["epoch"]))
                if self.live is None:
                    self.context.progress.say(line(trial, self.study))
            self.seen[trial.name] = len(reports)
        if self.live and news:
            self.live.update(table(rank(self.trials(), self.study), self.study))


def _front(trial: Trial, trials: Sequence[Trial]) -> bool:
    if trial.right is None:
        return False
    own = _gains(trial)
    others = [_gains(other) for other in trials if other.right is not None]
    return not any((other >= own).all() and (other > own).any() for other in others)


def _gains(trial: Trial) -> Any:
    figures = trial.figures
    return np.array([figures[ROBUST], figures["clean"], -figures["seconds_per_image"]])


def _numbers(trial: Trial) -> tuple[str, str, str]:
    """Return clean accuracy, robust accuracy with its interval, and ms per image, as text."""
    figures = trial.figures
    robust = f"{100 * figures[ROBUST]:.1f}"
    if LOW in figures:
        robust += f" ({100 * figures[LOW]:.1f}-{100 * figures[HIGH]:.1f})"
    seconds = figures.get("seconds_per_image")
    time = "" if seconds is None else f"{1000 * seconds:.3g}"
    return f"{100 * figures['clean']:.1f}", robust, time


def _short(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
