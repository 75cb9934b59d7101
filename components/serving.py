"""What a served defense returns, and the seal by which it is known to be what was registered.

Everything about an image comes from one purification, in full float32 as in scoring. Labels are
unknown here, and nothing is counted. Shapes: N images, C channels, H W, K classes.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.data.draws import Draws, NoiseStream, fresh
from components.data.shards import sha256
from components.models.defense import Defense
from components.models.precision import full_precision
from components.models.purifiers.contract import mean_squared_error


@dataclass(frozen=True)
class Prediction:
    """Purified images (N,C,H,W) in [0,1], their logits (N,K), and two numbers per image (N,).

    `error` is the mean squared change of the pixels. `detector_score` is in the purifier's own
    units; a larger score suggests an attack.
    """

    purified: Tensor
    logits: Tensor
    error: Tensor
    detector_score: Tensor


def seal(parts: Mapping[str, Path], config: Mapping[str, Any]) -> str:
    """Return one sha256 of files and folders by name, and of a config but for its key "seal".

    Of a folder all files count, but those in `__pycache__`, which Python itself writes.
    """
    about = {key: value for key, value in config.items() if key != "seal"}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, part in sorted(parts.items()):
        files = [part] if part.is_file() else sorted(p for p in part.rglob("*") if p.is_file())
        for file in files:
            inner = file.relative_to(part)
            if "__pycache__" not in inner.parts:
                digest.update(f"\n{name} {inner.as_posix()} {sha256(file)}".encode())
    return digest.hexdigest()


@full_precision()
def predict(defense: Defense, x: Tensor, seed: int | None, batch: int) -> Prediction:
    """Purify and classify images (N,C,H,W) in [0,1], `batch` at a time.

    Without a seed, noise is fresh. With a seed, image k gets the noise of id k in role `score`, so
    that equal requests get equal results.
    """
    parts = []
    with torch.no_grad():
        for rows in torch.arange(len(x), device=x.device).split(batch):  # type: ignore[no-untyped-call]
            draws = fresh(len(rows), x.device) if seed is None else Draws(seed, "score", rows)
            parts.append(_predict_batch(defense, x[rows], draws))
    columns = ([getattr(part, field.name) for part in parts] for field in fields(Prediction))
    return Prediction(*(torch.cat(column) for column in columns))


def _predict_batch(defense: Defense, x: Tensor, draws: Draws | NoiseStream) -> Prediction:
    purified = defense.purify(x, draws)
    detector_score = defense.detector_score(x, draws, purified)
    error = mean_squared_error(x, purified)
    return Prediction(purified, defense.classify(purified, draws), error, detector_score)
