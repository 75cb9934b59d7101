"""The Ray session of a stage: an embedded Ray, or the cluster that runs the job of the stage.

By default a stage with workers starts an embedded Ray (`ray.init(address="local")`), which shares
nothing with other Rays on the machine and has no dashboard. In a job the stage joins the cluster.
"""

import logging
import math
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from pipelines.cluster.capacity import AUTOSCALES, WAIT, gpus_of, nodes, require_room
from pipelines.config.resources import TrainingWorkers, Workers
from pipelines.errors import ConfigError
from pipelines.storage import jobs

# Objects that live as long as the session that is held, by key.
kept: dict[Any, Any] = {}
# Environment variables that a session sets, and restores when it ends.
CHANGED = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_OVERRIDE_JOB_RUNTIME_ENV")
# Environment variables that the workers of a job receive. Keys and tokens never travel: each node
# has its own.
CARRIED = (
    jobs.JOB, jobs.STORAGE, jobs.SCRATCH, "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION",
    "OMP_WAIT_POLICY", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", AUTOSCALES, WAIT,
)  # fmt: skip


@contextmanager
def hold(*wanted: Workers) -> Iterator[None]:
    """Hold a Ray session with room for these workers: join that of the job, or start one.

    Starts none where no worker is wanted, nor inside a Ray worker (such as a trial of a search),
    which has a session already. Raises ConfigError where this machine or cluster can never hold
    the workers.
    """
    if not (held() or jobs.job()):
        require_gpus(*wanted)
    if held() or not (jobs.job() or any(workers.most for workers in wanted)):
        yield
        return
    # Ray installs its own handler of SIGTERM, which would end the stage without a message.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    variables = {name: os.environ.get(name) for name in CHANGED}
    try:
        try:
            with quiet():
                if jobs.job():
                    _join()
                    if AUTOSCALES not in os.environ:
                        require_room(wanted, nodes())
                else:
                    _embed(wanted)
        finally:
            for number, handler in handlers.items():
                # The default is there after an interruption: the next one ends the process at once.
                if signal.getsignal(number) is not signal.SIG_DFL:
                    signal.signal(number, handler)
        yield
    finally:
        kept.clear()
        _shut_down()
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def held() -> bool:
    """Return whether this process has a Ray session, without importing Ray for it."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def gpus() -> int:
    """Return how many GPUs this machine has or, in a job, the living nodes of its cluster."""
    if jobs.job():
        with hold():
            return gpus_of(nodes())
    import torch

    return torch.cuda.device_count()


def require_gpus(*wanted: Workers) -> None:
    """Raise ConfigError where this machine has too few GPUs for the workers."""
    for workers in wanted:
        least = max(workers.least, 1)
        if workers.gpus_each and least * workers.gpus_each > (found := gpus()):
            raise ConfigError(
                f"resources in params.yaml ask for {least} workers with {workers.gpus_each:g} GPU "
                f"each, and this machine has {found}; gpus: 0 works on the CPU, and auto on either"
            )


def _join() -> None:
    """Join the cluster that runs this job."""
    import ray

    variables = {name: os.environ[name] for name in CARRIED if name in os.environ}
    # The job has some of these variables already, which Ray would report as a conflict.
    os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"
    ray.init(log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": variables})


def _embed(wanted: tuple[Workers, ...]) -> None:
    """Start a Ray of this process, with room for the workers."""
    import ray
    import torch

    # A token that only this process and its children know. By default Ray would use the token of a
    # cluster, or write a new one, readable for others, to the user's home.
    os.environ.pop("RAY_AUTH_MODE", None)
    os.environ["RAY_AUTH_TOKEN"] = _token()
    _start_reaper()
    # Ray Train and Tune run a coordinator, which takes a CPU of its own and only waits.
    coordinators = any(isinstance(workers, TrainingWorkers) for workers in wanted)
    ray.init(
        address="local",
        # The machine may have fewer CPUs: then the workers take turns.
        num_cpus=sum(workers.most * workers.cpus for workers in wanted) + coordinators,
        num_gpus=min(
            math.ceil(sum(workers.most * workers.gpus_each for workers in wanted)),
            torch.cuda.device_count(),
        ),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def _shut_down() -> None:
    """Shut Ray down, also where its start was interrupted and no session is held yet."""
    import ray

    ray.shutdown()


@cache
def _start_reaper() -> subprocess.Popen[bytes]:
    """Start the process that ends what is left of the embedded Ray if this process is killed.

    It has its own session, so it survives when the whole process group is killed.
    """
    now = datetime.now().strftime("session_%Y-%m-%d_%H-%M-%S")  # How Ray begins a folder's name.
    return subprocess.Popen(
        [sys.executable, "-P", Path(__file__).with_name("reaper.py"), str(os.getpid()), now],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip


@cache
def _token() -> str:
    """Return the token of this process, the same for all its sessions: Ray keeps the first."""
    return secrets.token_hex(32)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Ray's log messages; its exceptions still reach the caller."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def run_in_thread(function: Callable[[], Any], meanwhile: Callable[[], None] = lambda: None) -> Any:
    """Call a function in a thread; return its result or raise its exception.

    Ray must not run in the main thread: Ray Train and Tune would take over Ctrl-C and exit with 0,
    and waiting for a result would swallow it. The main thread calls `meanwhile` every 0.1 s.
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
