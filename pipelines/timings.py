"""How long things took: what no metric may depend on, and what people want to know.

`reports/timings.json` holds seconds by stage, and by image of each defense.
"""

import json
import time
from pathlib import Path

import torch
from torch import Tensor

from components.defense import Defense
from components.draws import Draws
from components.shards import write_json
from pipelines.place import lock

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


def seconds_per_image(defense: Defense, images: Tensor, ids: Tensor) -> float:
    """Return how long cleaning one of these images (N,C,H,W) takes as one batch, the second time.

    Zero for a bare classifier. By the clock of this machine, with what else it does just then.
    """
    if defense.purifier is None:
        return 0.0
    device = next(defense.parameters()).device
    x, draws = images.to(device), Draws(0, "score", ids.to(device))
    with torch.no_grad():
        # The first time of a shape is longer.
        defense.purify(x, draws)
        began = time.perf_counter()
        # Bringing the result home waits for an accelerator.
        defense.purify(x, draws).cpu()
    return (time.perf_counter() - began) / len(images)
