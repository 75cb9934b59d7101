"""The events of a job are repeated once, whether they arrive by log, by result, or by both."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from pipelines.cluster.job_events import Emitter, Listener
from pipelines.storage import timings


class Recorder:
    """Progress and metric logger that keep their calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def advance(
        self, done: int, total: int, unit: str, note: Mapping[str, float] | None = None
    ) -> None:
        self.calls.append(("advance", done, total, unit, note))

    def say(self, line: str) -> None:
        self.calls.append(("say", line))

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        self.calls.append(("log", metrics, step))

    def nested(
        self, name: str, params: Mapping[str, Any], metrics: Mapping[str, float], step: int
    ) -> None:
        self.calls.append(("nested", name, params, metrics, step))


CALLS: list[tuple[Any, ...]] = [
    ("say", "a line\nof two"),
    ("advance", 1, 3, "epochs", {"loss": 0.1}),
    ("log", {"loss": 0.1}, 0),
    ("nested", "trial", {"rate": 0.1}, {"robust": 0.5}, 2),
]


@pytest.fixture
def job(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], list[list[Any]]]:
    """The log of a job and the events of its result, as the driver receives them."""
    emitter = Emitter()
    emitter.say("a line\nof two")
    emitter.advance(1, 3, "epochs", {"loss": 0.1})
    print("something that a library prints")
    emitter.log({"loss": 0.1}, 0)
    emitter.nested("trial", {"rate": 0.1}, {"robust": 0.5}, 2)
    return capsys.readouterr().out.splitlines(), json.loads(json.dumps(emitter.events))


@pytest.mark.parametrize("arrived", [0, 1, 3, 5])
def test_the_result_completes_a_log_that_was_cut_off(
    job: tuple[list[str], list[list[Any]]], arrived: int
) -> None:
    log, events = job
    recorder, other = Recorder(), []
    listener = Listener(recorder, recorder, other.append)
    for line in log[:arrived]:
        listener.line(line)
    # A driver that returns reads the log from its start.
    for line in log[:arrived]:
        listener.line(line)
    listener.all(events)
    assert recorder.calls == CALLS
    assert set(other) <= {"something that a library prints"}


def test_a_gap_in_the_log_is_filled_in_order(job: tuple[list[str], list[list[Any]]]) -> None:
    log, events = job
    recorder = Recorder()
    listener = Listener(recorder, recorder, lambda line: None)
    for line in (log[0], log[-1]):
        listener.line(line)
    assert recorder.calls == CALLS[:1]
    listener.all(events)
    assert recorder.calls == CALLS


def test_times_of_a_job_are_recorded_by_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: dict[str, float] = {}
    monkeypatch.setattr(timings, "record", recorded.__setitem__)
    emitter = Emitter()
    emitter.record_time("one image of koo", 0.25)
    Listener(Recorder(), Recorder(), print).all(emitter.events)
    assert recorded == {"one image of koo": 0.25}
