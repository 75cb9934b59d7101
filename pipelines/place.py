"""The folder beside the data where work in progress lies, and locks among the processes in it."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(".limpid")


@contextlib.contextmanager
def lock(name: str) -> Iterator[None]:
    """Hold a lock of this name among the processes that work in this folder."""
    ROOT.mkdir(exist_ok=True)
    with (ROOT / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
