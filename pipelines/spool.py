"""What MLflow was not told: events of runs, kept in files until a later stage delivers them."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from components.shards import write_bytes
from pipelines.place import ROOT, lock

Event = dict[str, Any]


def now() -> int:
    """Return the time of an event, in ms."""
    return int(time.time() * 1000)


def waiting() -> list[Path]:
    """Return the files of runs that MLflow was not told of, oldest first."""
    return sorted((ROOT / "spool").glob("*.jsonl"))


def keep(events: Sequence[Event]) -> None:
    """Keep the events of a run."""
    path = ROOT / "spool" / f"{events[0]['time']}-{os.getpid()}.jsonl"
    write_bytes(path, "".join(json.dumps(event) + "\n" for event in events).encode())


def taken() -> Iterator[list[Event]]:
    """Yield what is kept, run by run; a run's file goes when the next one is asked for."""
    with lock("spool"):
        for path in waiting():
            yield [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            path.unlink()
