"""Look for what would stop the next `dvc repro`, and change nothing.

Every fault is printed with what to do about it; notes say what runs and what is kept.
"""

import argparse
import fcntl
import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path

from pipelines.config import dvc_lock
from pipelines.errors import ConfigError
from pipelines.layout import CRAFTED, MLFLOW_DB, RUNNING, SPOOL, WORK
from pipelines.tracking import spool

RWLOCK = Path(".dvc/tmp/rwlock")
# What a line on CIFAR-10 writes: states of trainings, and every set beside its copy.
ROOM = 2 * 1024**3


def main(argv: Sequence[str] | None = None) -> int:
    """Print what is found; return 4 where something stands in the way, else 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.parse_args(argv)
    faults = [sentence for check in FAULTS for sentence in check()]
    for sentence in (f"{note}." for check in NOTES for note in check()):
        print(sentence)
    for sentence in faults:
        print(f"wrong: {sentence}.")
    print(f"to put right: {len(faults)}" if faults else "nothing stands in the way")
    return 4 if faults else 0


def _dvc_lock() -> Iterator[str]:
    """Check DVC's record of what was made from what."""
    try:
        whole = all("cmd" in stage for stage in dvc_lock.stages().values())
    except ConfigError:
        whole = False
    if not whole:
        yield dvc_lock.DAMAGED


def _rwlock() -> Iterator[str]:
    """Check DVC's record of the paths that are being read and written."""
    if not RWLOCK.exists():
        return
    try:
        json.loads(RWLOCK.read_text())
    except ValueError:
        yield f"{RWLOCK} is cut short: remove it when no DVC runs here"


def _database() -> Iterator[str]:
    """Check MLflow's database, where it is the one beside the project."""
    if not MLFLOW_DB.exists():
        return
    try:
        with closing(sqlite3.connect(f"file:{MLFLOW_DB}?mode=ro", uri=True, timeout=5)) as opened:
            (result,) = opened.execute("pragma quick_check(1)").fetchone()
    except sqlite3.OperationalError as error:
        # Other errors of this kind are no damage: the next writer rolls back what a killed one
        # left half done.
        if "locked" in str(error):
            yield f"{MLFLOW_DB} is locked: end the process that holds it"
        return
    except sqlite3.DatabaseError as error:
        result = str(error)
    if result != "ok":
        yield (
            f"{MLFLOW_DB} is damaged ({result}): move it away; scores are in reports/, and "
            "`limpid promote --sync` registers the defenses again"
        )


def _disk() -> Iterator[str]:
    """Check the room on the disk."""
    free = shutil.disk_usage(".").free
    if free < ROOM:
        yield f"{free / 1e9:.1f} GB are left on this disk, and a line may need {ROOM / 1e9:.0f}"


def _running() -> Iterator[str]:
    """List the stages that run."""
    for path in sorted(RUNNING.glob("*")):
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                yield f"{path.name} is being run by {file.read() or 'another process'}"


def _kept() -> Iterator[str]:
    """List what interrupted stages left, what waits for MLflow, and crafted shards."""
    for path in sorted(WORK.glob("*")):
        yield f"{path} holds {_megabytes(path)} of a stage, from which it may go on"
    waiting = len(spool.waiting())
    if waiting:
        yield f"{waiting} runs wait for MLflow in {SPOOL}; the next stage delivers them"
    for path in spool.rejected():
        yield f"{path} holds a run that MLflow does not accept; nothing waits for it"
    if CRAFTED.exists():
        yield f"{CRAFTED} holds {_megabytes(CRAFTED)} of crafted shards that may be used again"


def _megabytes(folder: Path) -> str:
    size = 0
    for path in folder.rglob("*"):
        # Another process may be removing it.
        with suppress(FileNotFoundError):
            size += path.stat().st_size if path.is_file() else 0
    return f"{size / 1e6:.1f} MB"


FAULTS: tuple[Callable[[], Iterator[str]], ...] = (_dvc_lock, _rwlock, _database, _disk)
NOTES: tuple[Callable[[], Iterator[str]], ...] = (_running, _kept)
