"""Carved out of pipelines/session.py."""

import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from pipelines.config.resources import Workers
from pipelines.errors import ConfigError
from pipelines.storage import jobs

# How long a cluster may lack the resources a task needs, as when a node has gone.
WAIT, WAIT_S = "LIMPID_WAIT_S", 300.0
LOOK_S = 5.0
# Set where a cluster grows as it is asked: what it has says nothing then of what it can hold.
AUTOSCALES = "LIMPID_AUTOSCALES"


class CapacityWatch:
    """Looks, while something waits for nodes of a cluster, whether they can come to hold it."""

    def __init__(self, share: Workers, workers: int, say: Callable[[str], None]) -> None:
        self.share, self.workers, self.say = share, max(workers, 1), say
        self.lacking_since: float | None = None
        self.given_up = ""
        try:
            self.seconds = float(os.environ.get(WAIT) or WAIT_S)
        except ValueError:
            given = os.environ[WAIT]
            raise ConfigError(f"{WAIT} is {given!r}, and should be a number of seconds") from None

    def check(self) -> None:
        """Raise ConnectionError where nodes have lacked it for long."""
        if self.given_up:
            raise ConnectionError(self.given_up)

    def look(self) -> None:
        """Say what living nodes lack now, if anything."""
        lacking = _lacking(self.share, self.workers, nodes())
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
    share: Workers, workers: int, say: Callable[[str], None]
) -> Iterator[CapacityWatch]:
    """Look now and then, in a job, whose nodes may go; beside what waits: a look may take long."""
    one, stop = CapacityWatch(share, workers, say), threading.Event()

    def watch() -> None:
        while not one.given_up and not stop.wait(LOOK_S):
            # Where the head is away this job ends with it.
            with suppress(Exception):
                one.look()

    if jobs.job():
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield one
    finally:
        stop.set()


def nodes() -> list[dict[str, float]]:
    """Return what every living node has."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _lacking(share: Workers, workers: int, nodes: Collection[Mapping[str, float]]) -> str:
    """Say what nodes lack that could ever hold so many workers at once; nothing where they can."""
    room = sum(
        min(
            int(node.get("CPU", 0) // share.cpus),
            int(node.get("GPU", 0) / share.gpus) if share.gpus else workers,
        )
        for node in nodes
    )
    if room >= workers:
        return ""
    each = f"{share.cpus} CPU" + (f" and {share.gpus:g} GPU" if share.gpus else "")
    has = ", ".join(f"{node.get('CPU', 0):g} CPU {node.get('GPU', 0):g} GPU" for node in nodes)
    return f"{workers} x {each} needed, and there are {len(nodes)} nodes ({has or 'nothing'})"


def require_room(shares: Sequence[Workers], nodes: Collection[Mapping[str, float]]) -> None:
    """Raise ConfigError where nodes of these resources can never hold what is asked for."""
    for share in shares:
        lacking = _lacking(share, max(share.least, 1), nodes)
        if lacking:
            raise ConfigError(f"resources in params.yaml ask for too much: {lacking}")
