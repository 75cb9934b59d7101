"""What a stage may use beside its parameters and folders."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.cluster import session, worker_pool
from pipelines.cluster.job_events import MetricLogger, Progress
from pipelines.config.resources import Resources


@dataclass
class Context:
    """Who listens, what may be used, and where work in progress lies."""

    watch: Progress
    tracker: MetricLogger
    resources: Resources
    work: Path
    took: Callable[[str, float], None]

    def epoch(self, total: int) -> Callable[[int, Mapping[str, float]], None]:
        """Return what to call at the end of every epoch of `total`: shows and logs it."""

        def seen(index: int, metrics: Mapping[str, float]) -> None:
            self.watch.advance(index + 1, total, "epochs", metrics)
            self.tracker.log(metrics, index)

        return seen

    def session(self) -> AbstractContextManager[None]:
        """Hold a Ray over several maps."""
        return session.hold(self.resources.shards)

    def map(self, function: Callable[..., Any], tasks: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Call a function that has a name on Ray, for every task; return the results in order."""

        def shown(done: int, total: int) -> None:
            self.watch.advance(done, total, "pieces")

        return worker_pool.map_shards(function, tasks, self.resources.shards, shown, self.watch.say)
