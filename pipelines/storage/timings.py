"""How long things took, for people: no metric depends on it.

`reports/timings.json` holds seconds by stage, and for one image of each defense.
"""

import json
import time

from components.data.shards import write_json
from pipelines.layout import TIMINGS
from pipelines.storage.locks import lock


def record(title: str, seconds: float) -> None:
    """Keep how long something took; several stages may do so at once."""
    with lock("timings"):
        entries = json.loads(TIMINGS.read_text()) if TIMINGS.exists() else {}
        entries[title] = {"seconds": float(f"{seconds:.4g}"), "ended": int(time.time())}
        write_json(TIMINGS, entries)


def known(title: str) -> float | None:
    """Return how many seconds something took the last time, or None."""
    entries = json.loads(TIMINGS.read_text()) if TIMINGS.exists() else {}
    return float(entries[title]["seconds"]) if title in entries else None
