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
# One detector score per image (N,).
Values = npt.NDArray[np.float64]


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
    total = torch.zeros(len(ids), dtype=torch.int64, device=device)
    with torch.no_grad():
        for start in range(0, len(ids), batch):
            rows = slice(start, start + batch)
            x, y = images[rows].to(device), labels[rows].to(device)
            noise = Draws(seed, role, ids[rows].to(device))
            for draw in range(draws if defense.stochastic else 1):
                total[rows] += is_right(defense(x, noise.redraw(draw)), y)
    return (total if defense.stochastic else total * draws).cpu().numpy()


@full_precision()
def count_and_detect(
    defense: Defense, images: Tensor, labels: Tensor, batch: int
) -> tuple[Counts, Values]:
    """Return right answers (N,) of a deterministic defense, and its detector scores (N,).

    Every image is purified once: its answer and its score are about the same purified image. Under
    noise they must not be (`evaluation.detection`), so this raises ValueError for a random defense.
    """
    if defense.stochastic:
        raise ValueError("answers and detector scores of a random defense are under other noise")
    device = next(defense.classifier.parameters()).device
    right = torch.zeros(len(images), dtype=torch.int64, device=device)
    scores = torch.zeros(len(images), dtype=torch.float64, device=device)
    with torch.no_grad():
        for start in range(0, len(images), batch):
            rows = slice(start, start + batch)
            x = images[rows].to(device)
            purified = defense.purify(x)
            right[rows] = is_right(defense.classifier(purified), labels[rows].to(device)).long()
            scores[rows] = defense.detector_score(x, None, purified).double()
    return right.cpu().numpy(), scores.cpu().numpy()


def is_right(logits: Tensor, labels: Tensor) -> Tensor:
    """Say which logits (N,K) are right answers; those that are not finite are wrong."""
    return (logits.argmax(1) == labels) & logits.isfinite().all(1)
