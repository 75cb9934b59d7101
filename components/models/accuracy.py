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
# Predicted classes by draw and image (D,N), UNREADABLE where the logits are not finite.
Classes = npt.NDArray[np.int64]
UNREADABLE = -1


@full_precision()
def predict(
    defense: Defense, images: Tensor, ids: Tensor, seed: int, role: Role, draws: int, batch: int
) -> Classes:
    """Return `draws` predictions (D,N) under noise of role `role`; a deterministic defense has one.

    The images are moved to the classifier's device batch by batch. In full float32
    (`full_precision`).
    """
    device = next(defense.classifier.parameters()).device
    draws = draws if defense.stochastic else 1
    classes = torch.empty(draws, len(ids), dtype=torch.int64, device=device)
    with torch.no_grad():
        for start in range(0, len(ids), batch):
            rows = slice(start, start + batch)
            x, noise = images[rows].to(device), Draws(seed, role, ids[rows].to(device))
            for draw in range(draws):
                classes[draw, rows] = _predicted(defense(x, noise.redraw(draw)))
    return classes.cpu().numpy()


@full_precision()
def predict_and_detect(defense: Defense, images: Tensor, batch: int) -> tuple[Classes, Values]:
    """Return predictions (1,N) of a deterministic defense, and its detector scores (N,).

    Every image is purified once: its answer and its score are about the same purified image. Under
    noise they must not be (`evaluation.detection`), so this raises ValueError for a random defense.
    """
    if defense.stochastic:
        raise ValueError("answers and detector scores of a random defense are under other noise")
    device = next(defense.classifier.parameters()).device
    classes = torch.empty(1, len(images), dtype=torch.int64, device=device)
    scores = torch.zeros(len(images), dtype=torch.float64, device=device)
    with torch.no_grad():
        for start in range(0, len(images), batch):
            rows = slice(start, start + batch)
            x = images[rows].to(device)
            purified = defense.purify(x)
            classes[0, rows] = _predicted(defense.classify(purified))
            scores[rows] = defense.detector_score(x, None, purified).double()
    return classes.cpu().numpy(), scores.cpu().numpy()


def times(predicted: Classes, wanted: npt.NDArray[np.int64]) -> Counts:
    """Return how many predictions (D,N) of every image (N,) are its `wanted` class (N,).

    What is UNREADABLE agrees with nothing, nor with its like.
    """
    agreed: Counts = ((predicted == wanted) & (predicted != UNREADABLE)).sum(0, dtype=np.int64)
    return agreed


def count_correct(
    defense: Defense, images: Tensor, labels: Tensor, ids: Tensor, seed: int, role: Role,
    draws: int, batch: int,
) -> Counts:  # fmt: skip
    """Return per image (N,) how many of `draws` predictions under noise of role `role` are right.

    A deterministic defense predicts once, and that prediction counts for all draws. Logits that are
    not finite count as wrong.
    """
    predicted = predict(defense, images, ids, seed, role, draws, batch)
    return times(predicted, labels.cpu().numpy()) * (draws // len(predicted))


def is_right(logits: Tensor, labels: Tensor) -> Tensor:
    """Say which logits (N,K) are right answers; those that are not finite are wrong."""
    return _predicted(logits) == labels


def _predicted(logits: Tensor) -> Tensor:
    return torch.where(logits.isfinite().all(1), logits.argmax(1), UNREADABLE)
