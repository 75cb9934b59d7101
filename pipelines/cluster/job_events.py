"""What a stage says while it runs: to the screen and to MLflow, or from a job to who waits for it.

A job knows neither: it `emit`s every word as an event, which travels with its log and, should that
be lost, with its result; `Listener` says it again on the side of the driver, each word once.
"""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from pipelines.storage import timings
from pipelines.storage.jobs import Event

# Before every event in a log: no other line begins like it.
MARK = "@limpid "
# What a log says of a job, and what is said again when it has ended.
OWN = ("error: ", "Running entrypoint for job")


class Progress(Protocol):
    """Who shows progress."""

    def advance(
        self, done: int, total: int, unit: str, note: Mapping[str, float] | None = None
    ) -> None:
        """Say that `done` of `total` units are done; `note` are the latest figures."""

    def say(self, line: str) -> None:
        """Print one line that stays."""


class MetricLogger(Protocol):
    """Who keeps figures."""

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log figures at a step (an epoch)."""

    def nested(
        self, name: str, params: Mapping[str, Any], metrics: Mapping[str, float], step: int
    ) -> None:
        """Log figures of a part of this stage in a run of its own."""


class Emitter:
    """Progress and book of a stage in a job: all that is said becomes an event."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        # Threads speak too: each event has one number, and one line.
        self.lock = threading.Lock()

    def advance(
        self, done: int, total: int, unit: str, note: Mapping[str, float] | None = None
    ) -> None:
        """Say that `done` of `total` units are done."""
        self._emit("advance", done, total, unit, dict(note or {}))

    def say(self, line: str) -> None:
        """Say a line."""
        self._emit("say", line)

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Say figures."""
        self._emit("log", dict(metrics), step)

    def nested(
        self, name: str, params: Mapping[str, Any], metrics: Mapping[str, float], step: int
    ) -> None:
        """Say figures of a part."""
        self._emit("nested", name, dict(params), dict(metrics), step)

    def took(self, title: str, seconds: float) -> None:
        """Say how long something took."""
        self._emit("took", title, seconds)

    def _emit(self, *event: Any) -> None:
        with self.lock:
            self.events.append(list(event))
            print(f"{MARK}{json.dumps([len(self.events), *event])}\n", end="", flush=True)


class Listener:
    """Says again what a job said; what comes twice is said once."""

    def __init__(self, screen: Progress, book: MetricLogger, other: Callable[[str], None]) -> None:
        """`other` is told every line of a log that is no event."""
        self.screen, self.book, self.other = screen, book, other
        self.heard = 0

    def line(self, text: str) -> None:
        """Hear one line of the log of a job."""
        if text.startswith(MARK):
            number, *event = json.loads(text.removeprefix(MARK))
            self._hear(number, event)
        elif text.strip() and not text.startswith(OWN):
            self.other(text)

    def all(self, events: Sequence[Event]) -> None:
        """Hear everything that was said, from a result."""
        for number, event in enumerate(events, 1):
            self._hear(number, event)

    def _hear(self, number: int, event: Event) -> None:
        if number != self.heard + 1:
            return
        self.heard = number
        match event:
            case ["advance", done, total, unit, note]:
                self.screen.advance(done, total, unit, note)
            case ["say", line]:
                self.screen.say(line)
            case ["log", metrics, step]:
                self.book.log(metrics, step)
            case ["nested", name, params, metrics, step]:
                self.book.nested(name, params, metrics, step)
            case ["took", title, seconds]:
                timings.note(title, seconds)
