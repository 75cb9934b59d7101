"""The Ray that a stage works on: one of its own, or that of the cluster whose job it is.

By default a stage with workers starts an embedded Ray (`ray.init(address="local")`), which no other
Ray on the machine is part of, without dashboard; in a job it joins the cluster that runs the job,
which may come to have too little for it.
"""

import logging
import math
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from pipelines.cluster.capacity import AUTOSCALES, WAIT, nodes, require_room
from pipelines.config.resources import TrainingWorkers, Workers
from pipelines.errors import ConfigError
from pipelines.storage import jobs

# What is kept for as long as a Ray is held, by what it is for.
kept: dict[Any, Any] = {}
# What a session sets, and sets back.
SET = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_OVERRIDE_JOB_RUNTIME_ENV")
# What the workers of a job must know of their surroundings; keys and tokens are the nodes' own.
CARRIED = (
    jobs.JOB, jobs.STORAGE, jobs.SCRATCH, "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION",
    "OMP_WAIT_POLICY", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", AUTOSCALES, WAIT,
)  # fmt: skip


@contextmanager
def hold(*shares: Workers) -> Iterator[None]:
    """Hold a Ray with room for some shares: that of the job, or an embedded one started for it.

    None is started for no worker, nor inside a Ray worker, as in a trial of a search: there the Ray
    that is there serves. ConfigError where this machine or cluster can never hold a share.
    """
    if held() or not (jobs.job() or any(share.most for share in shares)):
        yield
        return
    # Ray puts a handler of its own on SIGTERM, which would end the stage without a word.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    variables = {name: os.environ.get(name) for name in SET}
    try:
        try:
            with quiet():
                if jobs.job():
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
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def _join() -> None:
    """Join the Ray whose job this is."""
    import ray

    variables = {name: os.environ[name] for name in CARRIED if name in os.environ}
    # Else Ray takes it for a conflict that the job has some of them already.
    os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"
    ray.init(log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": variables})


def _embed(shares: Sequence[Workers]) -> None:
    import ray
    import torch

    # A token of its own, known to this process and its children alone: left to itself, Ray takes
    # that of a cluster, or writes one that others may read into the home of its user.
    os.environ.pop("RAY_AUTH_MODE", None)
    os.environ["RAY_AUTH_TOKEN"] = _token()
    found = torch.cuda.device_count()
    waits = any(isinstance(share, TrainingWorkers) for share in shares)
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


def run_in_thread(function: Callable[[], Any], meanwhile: Callable[[], None] = lambda: None) -> Any:
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
