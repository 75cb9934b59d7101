"""Carved out of pipelines/timings.py."""

import time

import torch
from torch import Tensor

from components.data.draws import Draws
from components.models.defense import Defense


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
