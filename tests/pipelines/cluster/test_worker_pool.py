"""Workers of a map: they stay alive, and a task whose worker dies is retried, but not for ever."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from components.data.shards import DataError
from pipelines.cluster import session, worker_pool
from pipelines.config.resources import Workers
from pipelines.errors import Failed

WORKERS = Workers(workers=2, cpus=1, gpus=0)


@pytest.fixture(scope="module", autouse=True)
def _session() -> Iterator[None]:
    """Hold one Ray for all tests of this file. Its workers import no test: they get closures."""
    with session.hold(WORKERS):
        yield


def run(function: Callable[..., Any], tasks: Sequence[dict[str, Any]]) -> list[Any]:
    return worker_pool.map_shards(function, tasks, WORKERS, lambda done, total: None, print)


def processes(tasks: int) -> list[int]:
    """Return the process id of the worker of each task."""

    def process_id(device: str) -> int:
        return os.getpid()

    return run(process_id, [{}] * tasks)


def run_deadly(file: Path, deaths: int, tasks: int) -> list[int]:
    """Run tasks whose first calls kill their workers; every call is noted in a file."""

    def deadly(device: str) -> int:
        with file.open("a") as notes:
            notes.write("x")
        if file.stat().st_size <= deaths:
            os._exit(1)
        return deaths

    return run(deadly, [{}] * tasks)


def test_workers_stay_alive_between_maps() -> None:
    seen = {*processes(6), *processes(6)}
    assert 1 <= len(seen) <= 2 and os.getpid() not in seen, "a process for every task"


def test_results_are_in_the_order_of_the_tasks_and_progress_is_counted() -> None:
    def square(x: int, device: str) -> int:
        return x * x

    progress: list[tuple[int, int]] = []
    tasks = [{"x": x} for x in range(20)]
    found = worker_pool.map_shards(
        square, tasks, WORKERS, lambda *counts: progress.append(counts), print
    )
    assert found == [x * x for x in range(20)]
    assert progress == [(done, 20) for done in range(1, 21)]


def test_a_task_whose_worker_dies_is_retried(tmp_path: Path) -> None:
    deaths = worker_pool.MAX_FAILURES
    assert run_deadly(tmp_path / "calls", deaths, tasks=2) == [deaths] * 2


def test_a_task_that_kills_every_worker_fails_and_the_pool_can_be_used_again(
    tmp_path: Path,
) -> None:
    calls = tmp_path / "calls"
    with pytest.raises(Failed, match="ended its worker process again and again") as raised:
        run_deadly(calls, 100, tasks=1)
    assert raised.value.code == 4
    assert calls.stat().st_size == 1 + worker_pool.MAX_FAILURES
    assert len(processes(3)) == 3


def test_an_error_of_a_task_is_raised_as_it_is_and_not_retried(tmp_path: Path) -> None:
    calls = tmp_path / "calls"

    def damaged(device: str) -> None:
        with calls.open("a") as notes:
            notes.write("x")
        raise DataError("part-00000.parquet was altered")

    with pytest.raises(DataError, match=r"^part-00000\.parquet was altered$") as raised:
        run(damaged, [{}])
    assert type(raised.value) is DataError
    assert calls.stat().st_size == 1
    assert len(processes(3)) == 3


@pytest.mark.parametrize(
    ("ended", "kind"),
    [
        ("Training failed:\nThe actor died unexpectedly before finishing this task.", Failed),
        ("Training failed:\ntorch.OutOfMemoryError: CUDA out of memory", MemoryError),
        ("Training failed:\nZeroDivisionError", RuntimeError),
    ],
)
def test_lost_workers_end_in_a_sentence(ended: str, kind: type[Exception]) -> None:
    assert type(worker_pool.given_up(RuntimeError(ended))) is kind


def test_a_call_has_its_own_number_of_threads() -> None:
    before = torch.get_num_threads()
    assert worker_pool.call(torch.get_num_threads, {}) == 1
    assert worker_pool.call(torch.get_num_threads, {}, 2) == 2
    with pytest.raises(TypeError):
        worker_pool.call(torch.get_num_threads, {"unknown": 1}, 2)
    assert torch.get_num_threads() == before
