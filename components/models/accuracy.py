"""The count behind every accuracy: how often a defense is right on an image.

It lies here because training, probes and evaluation all need it.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from components.data.draws import Draws, Role
from components.models.defense import Defense
from components.models.precision import full_precision

Counts = npt.NDArray[np.int64]


@full_precision()
def count_correct(
    defense: Defense, images: Tensor, labels: Tensor, ids: Tensor, seed: int, role: Role,
    draws: int, batch: int,
) -> Counts:  # fmt: skip
    """Return per image (N,) how many of `draws` predictions under noise of role `role` are right.

    A deterministic defense predicts once, and that prediction counts for all draws. Logits that are
    not finite count as wrong. The images are moved to the classifier's device batch by batch. In
    full float32 (`full_precision`).
    """
    device = next(defense.classifier.parameters()).device
    total = torch.zeros(len(ids), dtype=torch.int64)
    with torch.no_grad():
        for start in range(0, len(ids), batch):
            rows = slice(start, start + batch)
            x, y = images[rows].to(device), labels[rows].to(device)
            noise = Draws(seed, role, ids[rows].to(device))
            for draw in range(draws if defense.stochastic else 1):
                logits = defense(x, noise.redraw(draw))
                right = (logits.argmax(1) == y) & logits.isfinite().all(1)
                total[rows] += right.cpu()
    return (total if defense.stochastic else total * draws).numpy()
