"""How long things took: what no metric may depend on, and what people want to know.

`reports/timings.json` holds seconds by stage, and by image of each defense.
"""

import json
import time
from pathlib import Path

from components.data.shards import write_json
from pipelines.storage.locks import lock

TIMINGS = Path("reports/timings.json")


def note(title: str, seconds: float) -> None:
    """Keep what something took; several stages may end at once."""
    with lock("timings"):
        known = json.loads(TIMINGS.read_text()) if TIMINGS.exists() else {}
        known[title] = {"seconds": float(f"{seconds:.4g}"), "ended": int(time.time())}
        write_json(TIMINGS, known)


def known(title: str) -> float | None:
    """Return what something took when it was last done, or None."""
    entries = json.loads(TIMINGS.read_text()) if TIMINGS.exists() else {}
    return float(entries[title]["seconds"]) if title in entries else None
