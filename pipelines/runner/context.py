"""What a stage may use besides its parameters and folders."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.cluster import session, worker_pool
from pipelines.cluster.job_events import MetricLogger, Progress
from pipelines.config.resources import Resources
from pipelines.layout import CRAFTED


@dataclass
class Context:
    """Where a stage reports its progress and metrics, what it may use, and its folders.

    `work` is for what it continues, `crafted` for shards that other calls may use again. `threads`
    are those of torch where tasks run in this process.
    """

    progress: Progress
    metrics: MetricLogger
    resources: Resources
    work: Path
    record_time: Callable[[str, float], None]
    crafted: Path = CRAFTED
    threads: int = 1

    def epoch(self, total: int) -> Callable[[int, Mapping[str, float]], None]:
        """Return a callback for the end of each of `total` epochs: it shows and logs the epoch."""

        def seen(index: int, metrics: Mapping[str, float]) -> None:
            self.progress.advance(index + 1, total, "epochs", metrics)
            self.metrics.log(metrics, index)

        return seen

    def session(self) -> AbstractContextManager[None]:
        """Hold one Ray session over several calls of `map`, so that its workers stay alive."""
        return session.hold(self.resources.shards)

    def map(self, function: Callable[..., Any], tasks: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Call an importable function for every task on Ray; return the results in order."""

        def shown(done: int, total: int) -> None:
            self.progress.advance(done, total, "tasks")

        return worker_pool.map_shards(
            function, tasks, self.resources.shards, shown, self.progress.say, self.threads
        )
