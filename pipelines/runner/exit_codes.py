"""How a process ends: 0, 2 parameters, 3 data, 4 infrastructure, 5 sanity, 130 interrupted."""

import os
import signal
import sys
import threading
import time
import traceback
from typing import NoReturn

from components.data.shards import DataError
from components.training.loop import Diverged
from pipelines import PARENT
from pipelines.errors import ConfigError, Failed, Interrupted
from pipelines.layout import ROOT
from pipelines.runner.console import without_keys

STOPPED = threading.Event()
# Before who waits for it gives up (`place.ENDING_S`). Who is still stopping a job loses nothing.
STUCK_S = 18
INTERRUPTED = "interrupted; the same command goes on from where it was"


def outcome(error: BaseException) -> tuple[int, str]:
    """Return the exit code that fits an error, and one sentence for a person.

    What nobody foresaw leaves its traceback in a file.
    """
    # Ray's compiled code turns our interruption into an exception of its own, and while Ray starts
    # it has a handler of its own on SIGTERM.
    by_ray = isinstance(error, SystemExit) and error.code == signal.SIGTERM
    if isinstance(error, Interrupted | KeyboardInterrupt) or by_ray or STOPPED.is_set():
        return 130, INTERRUPTED
    text = without_keys(str(error))
    kinds: tuple[tuple[type[BaseException], int], ...] = (
        (ConfigError, 2), (DataError, 3), (Diverged, 5), (ValueError, 2),
    )  # fmt: skip
    for kind, code in kinds:
        if isinstance(error, kind):
            return code, text
    if isinstance(error, Failed):
        return error.code, text
    if isinstance(error, OSError | MemoryError):
        return 4, f"{type(error).__name__}: {text}"
    ROOT.mkdir(exist_ok=True)
    kept = ROOT / "last_error.txt"
    kept.write_text(without_keys("".join(traceback.format_exception(error))))
    first = (text.strip().splitlines() or [""])[0][:300]
    return 4, f"{type(error).__name__}: {first} (all of it in {kept})"


def interruptible() -> None:
    """Let Ctrl-C and SIGTERM raise `Interrupted`, once; a second one ends at once.

    Under DVC the death of DVC does so too: else the stage would go on, with nobody to take what it
    makes, beside the next one. Compiled code that never comes back to hear it is ended with all.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told)
    threading.Thread(target=_insist, args=(heard,), daemon=True).start()
    if "DVC_STAGE" in os.environ:
        threading.Thread(target=_outlive_nobody, args=(PARENT,), daemon=True).start()


def leave(code: int) -> NoReturn:
    """End this process.

    At once: everything is written by then, and taking torch, Ray and MLflow apart would cost every
    stage a second.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _interrupt(signum: int, frame: object) -> NoReturn:
    STOPPED.set()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise Interrupted


def _insist(heard: int) -> None:
    while os.read(heard, 1)[0] not in (signal.SIGINT, signal.SIGTERM):
        pass
    time.sleep(STUCK_S)
    # Not by `print`, which may wait for what is stuck.
    os.write(2, f"error: {INTERRUPTED}\n".encode())
    os._exit(130)


def _outlive_nobody(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
