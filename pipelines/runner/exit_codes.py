"""How a process ends: 0, 2 parameters, 3 data, 4 infrastructure, 5 sanity, 130 interrupted."""

import os
import signal
import sys
import threading
import time
import traceback
from typing import NoReturn

from components.data.shards import DataError
from components.plugins import PluginError
from components.training import Diverged
from pipelines import PARENT
from pipelines.errors import ConfigError, Failed, Interrupted
from pipelines.layout import LAST_ERROR
from pipelines.runner import watcher
from pipelines.runner.console import without_credentials

INTERRUPTED = "interrupted; the same command goes on from where it was"
# In this order: the first kind that fits decides.
CODES: tuple[tuple[type[BaseException], int], ...] = (
    (ConfigError, 2), (DataError, 3), (Diverged, 5), (PluginError, 4), (ValueError, 2),
)  # fmt: skip
_interrupted = threading.Event()
# A stuck process ends before the next one of its name stops waiting for it (`locks.ENDING_S`).
# Within this time it can still stop its job.
STUCK_S = 18


def report(error: BaseException) -> int:
    """Print the sentence for an error; return its exit code."""
    code, sentence = outcome(error)
    print(f"error: {sentence}", file=sys.stderr)
    return code


def outcome(error: BaseException) -> tuple[int, str]:
    """Return the exit code for an error, and one sentence for a person.

    An unforeseen error leaves its traceback in a file.
    """
    # Ray's compiled code turns our interruption into an exception of its own, and while Ray starts
    # it has a handler of its own for SIGTERM.
    by_ray = isinstance(error, SystemExit) and error.code == signal.SIGTERM
    if isinstance(error, Interrupted | KeyboardInterrupt) or by_ray or _interrupted.is_set():
        return 130, INTERRUPTED
    text = without_credentials(str(error))
    for kind, code in CODES:
        if isinstance(error, kind):
            return code, text
    if isinstance(error, Failed):
        return error.code, text
    if isinstance(error, OSError | MemoryError):
        return 4, f"{type(error).__name__}: {text}"
    first = (text.strip().splitlines() or [""])[0][:300]
    return 4, f"{type(error).__name__}: {first} ({_keep(error)})"


def _keep(error: BaseException) -> str:
    """Write the traceback of an error to a file; return the words that name the file."""
    trace = without_credentials("".join(traceback.format_exception(error)))
    try:
        LAST_ERROR.parent.mkdir(exist_ok=True)
        LAST_ERROR.write_text(trace)
    except OSError as reason:
        return f"its traceback is lost: {reason}"
    return f"all of it in {LAST_ERROR}"


def interruptible() -> None:
    """Make Ctrl-C and SIGTERM raise `Interrupted`, once; a second one ends the process at once.

    Under DVC the death of DVC does the same: else the stage would go on, and write beside the next
    one. If compiled code never returns to Python, a thread ends the process.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    signal.set_wakeup_fd(sender)
    threading.Thread(target=_end_if_stuck, args=(receiver,), daemon=True).start()
    if "DVC_STAGE" in os.environ:
        threading.Thread(target=_end_with_parent, args=(PARENT,), daemon=True).start()


def leave(code: int) -> NoReturn:
    """End this process at once.

    Everything is written by then, and the regular end of torch, Ray and MLflow takes a second.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    watcher.leaves()
    os._exit(code)


def _interrupt(signum: int, frame: object) -> NoReturn:
    _interrupted.set()
    watcher.leaves()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise Interrupted


def _end_if_stuck(receiver: int) -> None:
    """Wait for a signal; end the process if it still runs some seconds later."""
    while os.read(receiver, 1)[0] not in (signal.SIGINT, signal.SIGTERM):
        pass
    time.sleep(STUCK_S)
    watcher.leaves()
    # `print` could wait for a lock that the stuck code holds.
    os.write(2, f"error: {INTERRUPTED}\n".encode())
    os._exit(130)


def _end_with_parent(parent: int) -> None:
    """Interrupt this process when its parent has died."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
