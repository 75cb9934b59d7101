"""Carved out of pipelines/place.py."""

import contextlib
import fcntl
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from pipelines.layout import ROOT

# How long a stage waits for another of its name that is ending, and how often it looks.
ENDING_S, LOOK_S = 20.0, 0.25


@contextlib.contextmanager
def lock(name: str, folder: Path = ROOT) -> Iterator[None]:
    """Hold a lock of this name among the processes that work in this folder."""
    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def alone(label: str) -> Iterator[None]:
    """Be the only one here that runs a stage; BlockingIOError, naming the other, where it stays.

    Who dies lets go by that. Another that is just ending is waited for.
    """
    folder = ROOT / "running"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / label).open("a+") as file:
        for _ in range(int(ENDING_S / LOOK_S)):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(LOOK_S)
        else:
            file.seek(0)
            raise BlockingIOError(f"{label} is being run already, by {file.read() or 'another'}")
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield
