"""How long a defense takes to purify an image."""

import time

import torch
from torch import Tensor

from components.data.draws import Draws
from components.models.defense import Defense
from components.models.precision import full_precision


@full_precision()
def seconds_per_image(defense: Defense, images: Tensor, ids: Tensor) -> float:
    """Return the seconds per image that purifying a batch (N,C,H,W) takes on the second call.

    Zero for a bare classifier. This is wall-clock time, whatever else the machine is doing, in
    full float32 as when defenses are scored.
    """
    if defense.purifier is None:
        return 0.0
    device = next(defense.parameters()).device
    x, draws = images.to(device), Draws(0, "score", ids.to(device))
    with torch.no_grad():
        # The first call for a shape takes longer.
        defense.purify(x, draws)
        began = time.perf_counter()
        # Copying the result to the CPU waits for the accelerator to finish.
        defense.purify(x, draws).cpu()
    return (time.perf_counter() - began) / len(images)
