"""File locks between the processes that work in one project; the kernel frees those of the dead."""

import contextlib
import fcntl
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from pipelines.layout import ROOT, RUNNING

# How long a stage waits for another of its name to end, and the time between two tries.
ENDING_S, RETRY_S = 20.0, 0.25


@contextlib.contextmanager
def lock(name: str, folder: Path = ROOT) -> Iterator[None]:
    """Hold the lock of this name in a folder; wait for it as long as it takes."""
    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def stage_lock(label: str) -> Iterator[None]:
    """Keep other processes from running this stage here.

    One that is ending is waited for; BlockingIOError names one that does not end. The lock is
    released when its process dies.
    """
    RUNNING.mkdir(parents=True, exist_ok=True)
    with (RUNNING / label).open("a+") as file:
        for _ in range(int(ENDING_S / RETRY_S)):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(RETRY_S)
        else:
            file.seek(0)
            holder = file.read() or "another process"
            raise BlockingIOError(f"{label} is being run already, by {holder}")
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield
