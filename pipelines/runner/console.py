"""What a person sees while a stage runs: what is running, how far it is, how long it will take."""

import re
import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

LINE_EVERY_S = 10.0
# Of a URL what stands before its host: a user and a password, or a key.
ASKER = re.compile(r"(?<=://)[^/\s]+@")


def without_keys(text: str) -> str:
    """Return a text whose URLs name nobody and no password."""
    return ASKER.sub("", text)


def refuse(message: str, code: int = 2) -> int:
    """Say in one sentence what is wrong, and return the exit code: a user's mistake is 2."""
    print(f"error: {without_keys(message)}", file=sys.stderr)
    return code


def show(table: Table) -> None:
    """Print a table as wide as it is: in a narrower one digits would be cut off."""
    console = Console(highlight=False)
    room = console.options.update(max_width=1000)
    console.width = max(console.width, Measurement.get(console, room, table).maximum)
    console.print(table)


class Watch:
    """The progress of one stage: a live bar on a terminal, a line now and then elsewhere."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.console = Console(stderr=False, highlight=False)
        self.started = time.monotonic()
        self.spoken = self.started
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        if sys.stdout.isatty():
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
                transient=True,
            )

    def advance(
        self, done: int, total: int, unit: str, note: Mapping[str, float] | None = None
    ) -> None:
        """Say that `done` of `total` units are done; `note` are the latest figures."""
        figures = "  ".join(f"{name} {value:.4g}" for name, value in (note or {}).items())
        if self.bar is not None:
            if self.task is None:
                self.bar.start()
                self.task = self.bar.add_task(self.title, total=total, unit=unit, note="")
            self.bar.update(self.task, completed=done, total=total, unit=unit, note=figures)
            return
        now = time.monotonic()
        if now - self.spoken >= LINE_EVERY_S:
            self.spoken = now
            left = (now - self.started) * (total - done) / max(done, 1)
            self.console.print(
                f"{self.title}: {done}/{total} {unit}, about {left:.0f} s left  {figures}"
            )

    def say(self, line: str) -> None:
        """Print one line that stays."""
        self.console.print(without_keys(line))

    def close(self) -> float:
        """End the display; return the seconds since it began."""
        if self.bar is not None:
            self.bar.stop()
        return time.monotonic() - self.started
