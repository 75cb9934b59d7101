"""Look for what stands in the way of the next `dvc repro`, and say what to do; change nothing."""

import argparse
import fcntl
import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipelines.layout import ROOT
from pipelines.tracking import spool

LOCK, RWLOCK, DATABASE = Path("dvc.lock"), Path(".dvc/tmp/rwlock"), Path("mlflow.db")
# A line on CIFAR-10 writes this much: trainings keep states, sets are kept beside their copies.
ROOM = 2 * 1024**3


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 4 where something stands in the way."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.parse_args(argv)
    wrong = [sentence for look in FAULTS for sentence in look()]
    for sentence in (f"{note}." for look in NOTES for note in look()):
        print(sentence)
    for sentence in wrong:
        print(f"wrong: {sentence}.")
    print(f"to put right: {len(wrong)}" if wrong else "nothing stands in the way")
    return 4 if wrong else 0


def _dvc_lock() -> Iterator[str]:
    """DVC's record of what was made from what."""
    if not LOCK.exists():
        return
    try:
        stages = YAML(typ="safe", pure=True).load(LOCK.read_text(encoding="utf-8"))["stages"]
        whole = all(
            "cmd" in stage
            and all("path" in entry for part in ("deps", "outs") for entry in stage.get(part, []))
            for stage in stages.values()
        )
    except (YAMLError, UnicodeDecodeError, TypeError, KeyError, AttributeError):
        whole = False
    if not whole:
        yield (
            f"{LOCK} is cut short or altered: `git checkout {LOCK}`; where it was never "
            "committed, remove it, and DVC takes what it can from its cache"
        )


def _rwlock() -> Iterator[str]:
    """DVC's record of who reads and writes what just now."""
    if not RWLOCK.exists():
        return
    try:
        json.loads(RWLOCK.read_text())
    except ValueError:
        yield f"{RWLOCK} is cut short: remove it when no DVC runs here"


def _database() -> Iterator[str]:
    """MLflow's database, where it is the one beside the project."""
    if not DATABASE.exists():
        return
    try:
        with closing(sqlite3.connect(f"file:{DATABASE}?mode=ro", uri=True, timeout=5)) as known:
            (said,) = known.execute("pragma quick_check(1)").fetchone()
    except sqlite3.OperationalError as error:
        # What a killed writer left half done, the next one takes back; that is no damage.
        if "locked" in str(error):
            yield f"{DATABASE} is locked: end whoever holds it"
        return
    except sqlite3.DatabaseError as error:
        said = str(error)
    if said != "ok":
        yield (
            f"{DATABASE} is damaged ({said}): move it away; scores are in reports/, and "
            "`limpid promote --sync` registers the defenses again"
        )


def _room() -> Iterator[str]:
    """The disk."""
    free = shutil.disk_usage(".").free
    if free < ROOM:
        yield f"{free / 1e9:.1f} GB are left on this disk, and a line may need {ROOM / 1e9:.0f}"


def _running() -> Iterator[str]:
    """Stages that run."""
    for path in sorted((ROOT / "running").glob("*")):
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                yield f"{path.name} is being run by {file.read() or 'another'}"


def _kept() -> Iterator[str]:
    """What waits to be gone on with, and what waits for MLflow."""
    for path in sorted((ROOT / "work").glob("*")):
        yield f"{path} holds {_megabytes(path)} of a stage, from which it may go on"
    untold = len(spool.waiting())
    if untold:
        yield f"{untold} runs wait for MLflow in {ROOT / 'spool'}; the next stage delivers them"
    for path in spool.refused():
        yield f"{path} holds a run that MLflow does not take; nothing waits for it"
    sets = ROOT / "sets"
    if sets.exists():
        yield f"{sets} holds {_megabytes(sets)} of crafted parts that may be used again"


def _megabytes(folder: Path) -> str:
    size = 0
    for path in folder.rglob("*"):
        # Another may be removing it.
        with suppress(FileNotFoundError):
            size += path.stat().st_size if path.is_file() else 0
    return f"{size / 1e6:.1f} MB"


FAULTS: tuple[Callable[[], Iterator[str]], ...] = (_dvc_lock, _rwlock, _database, _room)
NOTES: tuple[Callable[[], Iterator[str]], ...] = (_running, _kept)
