"""What a cluster has room for: refuse what it can never hold, and wait for nodes that are gone."""

import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from pipelines.config.resources import Workers
from pipelines.errors import ConfigError
from pipelines.storage import jobs

# For how long a cluster may lack the resources of a task, as when a node is gone.
WAIT, WAIT_S = "LIMPID_WAIT_S", 300.0
CHECK_EVERY_S = 5.0
# Set for a cluster that adds nodes on demand: its present nodes do not limit what it can hold.
AUTOSCALES = "LIMPID_AUTOSCALES"


class CapacityWatch:
    """Checks, while something waits for a cluster, whether its nodes could hold the workers."""

    def __init__(self, workers: Workers, count: int, say: Callable[[str], None]) -> None:
        """Watch for room for `count` of the workers; ConfigError for a wrong LIMPID_WAIT_S."""
        self.workers, self.count, self.say = workers, max(count, 1), say
        self.lacking_since: float | None = None
        self.given_up = ""
        try:
            self.seconds = float(os.environ.get(WAIT) or WAIT_S)
        except ValueError:
            given = os.environ[WAIT]
            raise ConfigError(f"{WAIT} is {given!r}, and should be a number of seconds") from None

    def raise_if_given_up(self) -> None:
        """Raise ConnectionError where the cluster has lacked nodes for too long."""
        if self.given_up:
            raise ConnectionError(self.given_up)

    def check(self) -> None:
        """Say what the living nodes lack now, or give up where they have lacked it for long."""
        lacking = _lacking(self.workers, self.count, nodes())
        if not lacking:
            self.lacking_since = None
            return
        now = time.monotonic()
        self.lacking_since = self.lacking_since or now
        waited = now - self.lacking_since
        if waited > self.seconds and AUTOSCALES not in os.environ:
            self.given_up = f"gave up after {waited:.0f} s: {lacking}"
        else:
            self.say(f"waiting for a node: {lacking} ({waited:.0f} s)")


@contextmanager
def watch_capacity(
    workers: Workers, count: int, say: Callable[[str], None]
) -> Iterator[CapacityWatch]:
    """In a job, check every few seconds for room for `count` of the workers.

    In a thread of its own, because one check may take long. Outside of a job nothing is checked.
    """
    watch, stop = CapacityWatch(workers, count, say), threading.Event()

    def keep_checking() -> None:
        while not watch.given_up and not stop.wait(CHECK_EVERY_S):
            # The head of the cluster may not answer. If it is gone, this job ends with it.
            with suppress(Exception):
                watch.check()

    if jobs.job():
        threading.Thread(target=keep_checking, daemon=True).start()
    try:
        yield watch
    finally:
        stop.set()


def nodes() -> list[dict[str, float]]:
    """Return the resources of every living node."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def gpus_of(nodes: Collection[Mapping[str, float]]) -> int:
    """Return how many whole GPUs nodes with these resources have."""
    return int(sum(node.get("GPU", 0) for node in nodes))


def _lacking(workers: Workers, count: int, nodes: Collection[Mapping[str, float]]) -> str:
    """Describe why the nodes cannot hold so many workers at once; return "" where they can."""
    room = sum(
        min(
            int(node.get("CPU", 0) // workers.cpus),
            int(node.get("GPU", 0) / workers.gpus_each) if workers.gpus_each else count,
        )
        for node in nodes
    )
    if room >= count:
        return ""
    each = f"{workers.cpus} CPU" + (f" and {workers.gpus_each:g} GPU" if workers.gpus_each else "")
    has = ", ".join(f"{node.get('CPU', 0):g} CPU {node.get('GPU', 0):g} GPU" for node in nodes)
    return f"{count} x {each} needed, and there are {len(nodes)} nodes ({has or 'nothing'})"


def require_room(wanted: Sequence[Workers], nodes: Collection[Mapping[str, float]]) -> None:
    """Raise ConfigError where nodes with these resources can never hold the workers."""
    for workers in wanted:
        lacking = _lacking(workers, max(workers.least, 1), nodes)
        if lacking:
            raise ConfigError(f"resources in params.yaml ask for too much: {lacking}")
