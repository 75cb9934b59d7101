"""Events of runs that MLflow has not received, kept in files until a later stage delivers them."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from components.data.shards import write_bytes
from pipelines.layout import SPOOL
from pipelines.storage.locks import lock

Event = dict[str, Any]


def now() -> int:
    """Return the time of an event, in ms."""
    return int(time.time() * 1000)


def write(events: Sequence[Event]) -> None:
    """Keep the events of a run."""
    path = SPOOL / f"{events[0]['time']}-{os.getpid()}.jsonl"
    write_bytes(path, "".join(json.dumps(event) + "\n" for event in events).encode())


def read(path: Path) -> list[Event]:
    """Return the events of a run; ValueError where they are damaged or of an older version."""
    events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not events or "id" not in events[0]:
        raise ValueError(f"{path} does not begin with a run")
    return events


def waiting() -> list[Path]:
    """Return the files of runs that were not delivered, oldest first."""
    return sorted(SPOOL.glob("*.jsonl"))


def drain() -> Iterator[Path]:
    """Yield every waiting file, and remove it when the next one is asked for.

    The caller may `reject` a file instead. One process drains at a time.
    """
    with lock("spool"):
        for path in waiting():
            yield path
            path.unlink(missing_ok=True)


def reject(path: Path) -> None:
    """Put aside a file that can never be delivered, so that it does not block later ones."""
    path.rename(path.with_suffix(".refused"))


def rejected() -> list[Path]:
    """Return the files that were put aside."""
    return sorted(SPOOL.glob("*.refused"))
