"""The Ray that a stage works on: one of its own, or that of the cluster whose job it is.

By default a stage with workers starts an embedded Ray (`ray.init(address="local")`), which no other
Ray on the machine is part of, without dashboard; in a job it joins the cluster that runs the job,
which may come to have too little for it. A job whose stage maps has joined before (`ahead`).
"""

import logging
import math
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from pipelines import place
from pipelines.mistakes import ConfigError
from pipelines.resources import Share, TrainShare

# What is kept for as long as a Ray is held, by what it is for.
kept: dict[Any, Any] = {}
# Whether a Ray was joined that nobody holds yet.
_ahead = False
# How long a cluster may lack the resources a task needs, as when a node has gone.
WAIT, WAIT_S = "LIMPID_WAIT_S", 300.0
LOOK_S = 5.0
# Set where a cluster grows as it is asked: what it has says nothing then of what it can hold.
AUTOSCALES = "LIMPID_AUTOSCALES"
# What a session sets, and sets back.
SET = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_OVERRIDE_JOB_RUNTIME_ENV")
# What the workers of a job must know of their surroundings; keys and tokens are the nodes' own.
CARRIED = (
    place.JOB, place.STORAGE, place.SCRATCH, "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION",
    "OMP_WAIT_POLICY", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", AUTOSCALES, WAIT,
)  # fmt: skip


@contextmanager
def hold(*shares: Share) -> Iterator[None]:
    """Hold a Ray with room for some shares: that of the job, or an embedded one started for it.

    None is started for no worker, nor inside a Ray worker, as in a trial of a search: there the Ray
    that is there serves. ConfigError where this machine or cluster can never hold a share.
    """
    global _ahead
    if held() or not (place.job() or any(share.most for share in shares)):
        yield
        return
    joined, _ahead = _ahead, False
    # Ray puts a handler of its own on SIGTERM, which would end the stage without a word.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    variables = {name: os.environ.get(name) for name in SET}
    try:
        try:
            with quiet():
                if place.job():
                    if not joined:
                        _join()
                    if AUTOSCALES not in os.environ:
                        require_room(shares, nodes())
                else:
                    _embed(shares)
        finally:
            for number, handler in handlers.items():
                # Where it was interrupted meanwhile, the next time ends it at once.
                if signal.getsignal(number) is not signal.SIG_DFL:
                    signal.signal(number, handler)
        yield
    finally:
        _end()
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def held() -> bool:
    """Whether a Ray is held here. Who never imported it has none, and is spared the import."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized()) and not _ahead


def join_ahead() -> None:
    """Join the Ray whose job this is, for who holds it first."""
    global _ahead
    _join()
    _ahead = True


def _join() -> None:
    """Join the Ray whose job this is."""
    import ray

    variables = {name: os.environ[name] for name in CARRIED if name in os.environ}
    # Else Ray takes it for a conflict that the job has some of them already.
    os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"
    ray.init(log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": variables})


def _embed(shares: Sequence[Share]) -> None:
    import ray
    import torch

    # A token of its own, known to this process and its children alone: left to itself, Ray takes
    # that of a cluster, or writes one that others may read into the home of its user.
    os.environ.pop("RAY_AUTH_MODE", None)
    os.environ["RAY_AUTH_TOKEN"] = _token()
    found = torch.cuda.device_count()
    waits = any(isinstance(share, TrainShare) for share in shares)
    for share in shares:
        if max(share.least, 1) * share.gpus > found:
            raise ConfigError(
                f"resources in params.yaml ask for {max(share.least, 1)} workers with "
                f"{share.gpus:g} GPU each, and this machine has {found}; gpus: 0 works on the CPU"
            )
    _reaper()
    ray.init(
        address="local",
        # Workers beyond the CPUs there are take turns; Ray Train and Tune have one that only waits.
        num_cpus=sum(share.most * share.cpus for share in shares) + waits,
        num_gpus=min(math.ceil(sum(share.most * share.gpus for share in shares)), found),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def _end() -> None:
    """Shut Ray down; its autoscaler, which scales nothing here, would take a second to hear it."""
    import ray

    kept.clear()
    for process in psutil.Process().children():
        with suppress(psutil.Error):
            if any(word.endswith("autoscaler/_private/monitor.py") for word in process.cmdline()):
                process.kill()
    ray.shutdown()


@cache
def _reaper() -> subprocess.Popen[bytes]:
    """Start what ends the rest of Ray, should this process be killed, with all its group or not."""
    now = datetime.now().strftime("session_%Y-%m-%d_%H-%M-%S")  # As Ray begins its folders' names.
    return subprocess.Popen(
        [sys.executable, "-P", Path(__file__).with_name("reaper.py"), str(os.getpid()), now],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip


@cache
def _token() -> str:
    """Return the token of this process's Ray, one for all its sessions: Ray keeps the first."""
    return secrets.token_hex(32)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what Ray logs of itself; what goes wrong still reaches the caller as an exception."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def apart(function: Callable[[], Any], meanwhile: Callable[[], None] = lambda: None) -> Any:
    """Call in a thread: in the main one Ray Train and Tune would take over Ctrl-C, and exit with 0.

    `meanwhile` is called again and again in this one.
    """
    results: list[Any] = []
    failures: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
        meanwhile()
    if failures:
        raise failures[0]
    return results[0]


class Patience:
    """Looks, while something waits for nodes of a cluster, whether they can come to hold it."""

    def __init__(self, share: Share, workers: int, say: Callable[[str], None]) -> None:
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
def patience(share: Share, workers: int, say: Callable[[str], None]) -> Iterator[Patience]:
    """Look now and then, in a job, whose nodes may go; beside what waits: a look may take long."""
    one, stop = Patience(share, workers, say), threading.Event()

    def watch() -> None:
        while not one.given_up and not stop.wait(LOOK_S):
            # Where the head is away this job ends with it.
            with suppress(Exception):
                one.look()

    if place.job():
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield one
    finally:
        stop.set()


def nodes() -> list[dict[str, float]]:
    """Return what every living node has."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _lacking(share: Share, workers: int, nodes: Collection[Mapping[str, float]]) -> str:
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


def require_room(shares: Sequence[Share], nodes: Collection[Mapping[str, float]]) -> None:
    """Raise ConfigError where nodes of these resources can never hold what is asked for."""
    for share in shares:
        lacking = _lacking(share, max(share.least, 1), nodes)
        if lacking:
            raise ConfigError(f"resources in params.yaml ask for too much: {lacking}")
