"""Progress and metrics of a stage, sent from its job to the machine that waits for it.

In a job the `Emitter` turns every call into a numbered event, which travels in the log of the job
and, should the log be lost, in its result. The `Listener` on the other side repeats each call once.
"""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from pipelines.storage import timings
from pipelines.storage.jobs import Event

# The start of every event in a log; no other line starts like it.
MARK = "@limpid "
# Lines of a log that are not repeated: the failure, which is reported at the end, and Ray's own.
DROPPED = ("error: ", "Running entrypoint for job")


class Progress(Protocol):
    """The display of progress."""

    def advance(
        self, done: int, total: int, unit: str, note: Mapping[str, float] | None = None
    ) -> None:
        """Show that `done` of `total` units are done; `note` holds the latest figures."""

    def say(self, line: str) -> None:
        """Print one line that stays."""


class MetricLogger(Protocol):
    """The log of metrics."""

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log metrics at a step (an epoch)."""

    def nested(
        self, name: str, params: Mapping[str, Any], metrics: Mapping[str, float], step: int
    ) -> None:
        """Log metrics of a part of this stage, such as a trial, in a run of its own."""


class Emitter:
    """Progress and metric logger of a stage in a job: every call becomes an event."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        # Several threads emit: each event needs a number and a line of its own.
        self.lock = threading.Lock()

    def advance(
        self, done: int, total: int, unit: str, note: Mapping[str, float] | None = None
    ) -> None:
        """Emit that `done` of `total` units are done."""
        self._emit("advance", done, total, unit, dict(note or {}))

    def say(self, line: str) -> None:
        """Emit a line."""
        self._emit("say", line)

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Emit metrics."""
        self._emit("log", dict(metrics), step)

    def nested(
        self, name: str, params: Mapping[str, Any], metrics: Mapping[str, float], step: int
    ) -> None:
        """Emit metrics of a part of this stage."""
        self._emit("nested", name, dict(params), dict(metrics), step)

    def record_time(self, title: str, seconds: float) -> None:
        """Emit how long something took."""
        self._emit("took", title, seconds)

    def _emit(self, *event: Any) -> None:
        with self.lock:
            self.events.append(list(event))
            print(f"{MARK}{json.dumps([len(self.events), *event])}\n", end="", flush=True)


class Listener:
    """Repeats the events of a job, in order and each once, however often they are received."""

    def __init__(
        self, progress: Progress, metrics: MetricLogger, other: Callable[[str], None]
    ) -> None:
        """`other` receives every line of a log that is no event."""
        self.progress, self.metrics, self.other = progress, metrics, other
        self.received = 0

    def line(self, text: str) -> None:
        """Take one line of the log of a job."""
        if text.startswith(MARK):
            number, *event = json.loads(text.removeprefix(MARK))
            self._repeat(number, event)
        elif text.strip() and not text.startswith(DROPPED):
            self.other(text)

    def all(self, events: Sequence[Event]) -> None:
        """Take all events of a job, from its result."""
        for number, event in enumerate(events, 1):
            self._repeat(number, event)

    def _repeat(self, number: int, event: Event) -> None:
        if number != self.received + 1:
            return
        self.received = number
        match event:
            case ["advance", done, total, unit, note]:
                self.progress.advance(done, total, unit, note)
            case ["say", line]:
                self.progress.say(line)
            case ["log", metrics, step]:
                self.metrics.log(metrics, step)
            case ["nested", name, params, metrics, step]:
                self.metrics.nested(name, params, metrics, step)
            case ["took", title, seconds]:
                timings.record(title, seconds)
