"""What a person sees on the terminal: progress and tables."""

import re
import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

LINE_EVERY_S = 10.0
# What stands before the host of a URL: a user and a password, or a key.
CREDENTIALS = re.compile(r"(?<=://)[^/\s]+@")


def without_credentials(text: str) -> str:
    """Return the text without the user names, passwords and keys of its URLs."""
    return CREDENTIALS.sub("", text)


def show(table: Table) -> None:
    """Print a table in its full width: a narrower one would lose digits."""
    console = Console(highlight=False)
    unlimited = console.options.update(max_width=1000)
    console.width = max(console.width, Measurement.get(console, unlimited, table).maximum)
    console.print(table)


class ConsoleProgress:
    """The progress of one stage: a live bar on a terminal, else a line every few seconds."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.console = Console(stderr=False, highlight=False)
        self.started = self.last_line = time.monotonic()
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
        """Show that `done` of `total` units are done; `note` holds the latest figures."""
        figures = "  ".join(f"{name} {value:.4g}" for name, value in (note or {}).items())
        if self.bar is not None:
            if self.task is None:
                self.bar.start()
                self.task = self.bar.add_task(self.title, total=total, unit=unit, note="")
            self.bar.update(self.task, completed=done, total=total, unit=unit, note=figures)
            return
        now = time.monotonic()
        if now - self.last_line >= LINE_EVERY_S:
            self.last_line = now
            left = (now - self.started) * (total - done) / max(done, 1)
            self._print(f"{self.title}: {done}/{total} {unit}, about {left:.0f} s left  {figures}")

    def say(self, line: str) -> None:
        """Print one line that stays."""
        self._print(without_credentials(line))

    def close(self) -> float:
        """End the display; return the seconds since it began."""
        if self.bar is not None:
            self.bar.stop()
        return time.monotonic() - self.started

    def _print(self, line: str) -> None:
        # Brackets are no markup, and a line stays whole where no terminal gives it a width.
        self.console.print(line, markup=False, soft_wrap=True)
