"""What a job says is heard once, whether it comes by the log, by the result, or by both."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from pipelines.cluster.job_events import Emitter, Listener
from pipelines.storage import timings


class Ears:
    """Progress and book that remember what they are told."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    def advance(
        self, done: int, total: int, unit: str, note: Mapping[str, float] | None = None
    ) -> None:
        self.heard.append(("advance", done, total, unit, note))

    def say(self, line: str) -> None:
        self.heard.append(("say", line))

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        self.heard.append(("log", metrics, step))

    def nested(
        self, name: str, params: Mapping[str, Any], metrics: Mapping[str, float], step: int
    ) -> None:
        self.heard.append(("nested", name, params, metrics, step))


SAID: list[tuple[Any, ...]] = [
    ("say", "a line\nof two"),
    ("advance", 1, 3, "epochs", {"loss": 0.1}),
    ("log", {"loss": 0.1}, 0),
    ("nested", "trial", {"rate": 0.1}, {"robust": 0.5}, 2),
]


@pytest.fixture
def job(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], list[list[Any]]]:
    """The log of a job and the events of its result, as they arrive at the driver."""
    emitter = Emitter()
    emitter.say("a line\nof two")
    emitter.advance(1, 3, "epochs", {"loss": 0.1})
    print("something that a library prints")
    emitter.log({"loss": 0.1}, 0)
    emitter.nested("trial", {"rate": 0.1}, {"robust": 0.5}, 2)
    return capsys.readouterr().out.splitlines(), json.loads(json.dumps(emitter.events))


@pytest.mark.parametrize("arrived", [0, 1, 3, 5])
def test_what_the_log_lost_the_result_has(
    job: tuple[list[str], list[list[Any]]], arrived: int
) -> None:
    log, events = job
    ears, other = Ears(), []
    listener = Listener(ears, ears, other.append)
    for line in log[:arrived]:
        listener.line(line)
    # A driver that comes back hears all of it again.
    for line in log[:arrived]:
        listener.line(line)
    listener.all(events)
    assert ears.heard == SAID
    assert set(other) <= {"something that a library prints"}


def test_a_gap_in_the_log_is_filled_in_order(job: tuple[list[str], list[list[Any]]]) -> None:
    log, events = job
    ears = Ears()
    listener = Listener(ears, ears, lambda line: None)
    for line in (log[0], log[-1]):
        listener.line(line)
    assert ears.heard == SAID[:1]
    listener.all(events)
    assert ears.heard == SAID


def test_times_are_kept_here(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, float] = {}
    monkeypatch.setattr(timings, "note", kept.__setitem__)
    emitter = Emitter()
    emitter.took("one image of koo", 0.25)
    Listener(Ears(), Ears(), print).all(emitter.events)
    assert kept == {"one image of koo": 0.25}
