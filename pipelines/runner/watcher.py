"""Says why a process died that cannot say so itself: compiled code crashed, or it was killed.

A small forked process waits at the other end of a pipe. A signal that ends the process from within
is written there by `faulthandler`, with the line of Python that was running. The pipe closes with
the process, whatever ended it; `leaves` tells beforehand that it ends by itself.
"""

import faulthandler
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from pipelines.layout import LAST_ERROR

BYE = b"\0"
CRASH = "Fatal Python error: "
VERSIONS = ("limpid", "torch", "numpy", "ray")
# How the kernel counts the processes that it ended for want of memory.
KILLS, KILL = Path("/proc/vmstat"), "oom_kill "
_sender: int | None = None


def watch(command: Sequence[str]) -> None:
    """Start the watcher of this process, which runs the command `limpid ...`; before any thread.

    Nothing is watched where the system has no room for one more process.
    """
    global _sender
    receiver, sender = os.pipe()
    kills = _kills()
    with suppress(OSError):
        if os.fork() == 0:
            _wait(receiver, sender, " ".join(["limpid", *command]), kills)
        _sender = sender
        faulthandler.enable(sender, all_threads=False)
    os.close(receiver)


def leaves() -> None:
    """Tell the watcher that this process ends by itself, and has said or will say why."""
    if _sender is not None:
        with suppress(OSError):
            os.write(_sender, BYE)


def _wait(receiver: int, sender: int, command: str, kills: int) -> NoReturn:
    """Wait for the end of the process that forked this one, and say what it could not say."""
    try:
        os.close(sender)
        # These are meant for the whole group, and the other process answers them.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_IGN)
        with open(receiver, "rb") as pipe:
            words = pipe.read()
        if BYE not in words:
            _say(command, words.decode(errors="replace"), _kills() > kills)
    finally:
        os._exit(0)


def _say(command: str, words: str, short_of_memory: bool) -> None:
    _, crashed, place = words.partition(CRASH)
    if crashed:
        reason = place.partition("\n")[0].lower()
        problem = (
            f"died in compiled code ({reason}); run it again, and if it dies again, report "
            f"{LAST_ERROR}, which holds the place and the versions"
        )
    elif short_of_memory:
        problem = (
            "was killed because this machine ran out of memory; lower batch_size of the training, "
            "or batch, or the number of workers"
        )
    else:
        problem = (
            "was killed from outside; the same command goes on from where it was (a container that "
            "runs out of memory is also killed: then lower batch_size of the training, or batch)"
        )
    sys.stderr.write(f"error: `{command}` {problem}\n")
    sys.stderr.flush()
    if crashed:
        LAST_ERROR.parent.mkdir(exist_ok=True)
        LAST_ERROR.write_text(f"{command}\n{_versions()}\n\n{words}")


def _kills() -> int:
    """Return how many processes the kernel has ended for want of memory; 0 if it does not say."""
    with suppress(OSError, ValueError):
        lines = KILLS.read_text().splitlines()
        return sum(int(line.removeprefix(KILL)) for line in lines if line.startswith(KILL))
    return 0


def _versions() -> str:
    """Return the versions of Python and of the packages with compiled code."""
    from importlib import metadata

    found = [f"Python {sys.version.split()[0]}", sys.platform]
    for name in VERSIONS:
        with suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return ", ".join(found)
