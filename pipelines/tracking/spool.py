"""What MLflow was not told: events of runs, kept in files until a later stage delivers them."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from components.data.shards import write_bytes
from pipelines.layout import ROOT
from pipelines.storage.locks import lock

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


def taken() -> Iterator[Path]:
    """Yield the files of what is kept; each goes, or is refused, before the next is asked for."""
    with lock("spool"):
        for path in waiting():
            yield path
            path.unlink(missing_ok=True)


def events_in(path: Path) -> list[Event]:
    """Read the events of a run; ValueError where they are damaged, or of an older version."""
    events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not events or "id" not in events[0]:
        raise ValueError(f"{path} begins with no run")
    return events


def refuse(path: Path) -> None:
    """Put aside what can never be delivered, so that it stands in nobody's way."""
    path.rename(path.with_suffix(".refused"))


def refused() -> list[Path]:
    """Return the files that were put aside."""
    return sorted((ROOT / "spool").glob("*.refused"))
