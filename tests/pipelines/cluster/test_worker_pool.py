"""The workers of a map: they stay, those that die are replaced, and not for ever."""

import os
from pathlib import Path

import pytest

from pipelines.cluster import session, worker_pool
from pipelines.config.resources import Workers


def test_workers_stay_and_those_that_die_are_replaced(tmp_path: Path) -> None:
    tried = tmp_path / "tried"

    def which(device: str) -> int:
        return os.getpid()

    def dies(often: int, device: str) -> int:
        with tried.open("a") as file:
            file.write("x")
        if tried.stat().st_size <= often:
            os._exit(1)
        return often

    share = Workers(workers=2, cpus=1, gpus=0)
    with session.hold(share):
        seen = {
            p
            for _ in "ab"
            for p in worker_pool.map_shards(which, [{}] * 6, share, ignore_progress, print)
        }
        assert 1 <= len(seen) <= 2 and os.getpid() not in seen, "a process for every piece"
        found = worker_pool.map_shards(
            dies, [{"often": worker_pool.MAX_FAILURES}] * 2, share, ignore_progress, print
        )
        assert found == [worker_pool.MAX_FAILURES] * 2
        tried.unlink()
        with pytest.raises(Exception, match="died"):
            worker_pool.map_shards(dies, [{"often": 100}], share, ignore_progress, print)
        assert tried.stat().st_size == 1 + worker_pool.MAX_FAILURES
        # What is left serves on.
        assert len(worker_pool.map_shards(which, [{}] * 3, share, ignore_progress, print)) == 3


def ignore_progress(done: int, total: int) -> None:
    """Hear of pieces."""
