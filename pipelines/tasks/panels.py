"""Pictures of a defense at work: what an attack changed, and what the purifier made of it.

Panels hold pictures and the answers to them; the report lays them out. They are made in the worker
that scores the defense, from the same bytes and under the same noise.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from components.data.draws import Draws
from components.data.image_set import ImageSet
from components.models.defense import Defense
from components.models.precision import full_precision

# Side of a picture on the page in CSS pixels, approximately: magnification is a whole number.
TILE_PX = 76

# The caption of each picture, and whether its answer is right (None: it is no answer).
Captions = list[tuple[str, bool | None]]


@dataclass(frozen=True)
class Panel:
    """Pictures of one set, all in one PNG (`sprite`, a data URI): `rows` of len(labels) each.

    `side` is width and height of a picture on the page, `labels` are true classes.
    """

    sprite: str
    side: tuple[int, int]
    labels: list[str]
    rows: dict[str, Captions]


@full_precision()
def render(
    defense: Defense, images: ImageSet, sets: Mapping[str, Tensor], seed: int, batch: int
) -> dict[str, Panel]:
    """Return a panel for every set (S,C,H,W) crafted from `images`; none if there are no images.

    A caption is the answer of the bare classifier to that picture: under a purified picture it is
    the answer of the defense. All noise is that of the first draw of role `score`, in full float32
    as when images are scored.
    """
    if not sets or not len(images):
        return {}
    clean = images.pixels()
    purified = _purified(defense, images, list(sets.values()), seed, batch)
    answers = _answers(defense, clean, images, seed)
    height, width = images.shape[1:]
    scale = max(1, round(TILE_PX / max(height, width)))
    panels = {}
    for (name, attacked), restored in zip(sets.items(), purified, strict=True):
        change = (attacked - clean).abs()
        gain = max(1, math.floor(1 / max(float(change.max()), 1e-6)))
        rows = {"clean": answers, "adversarial": _answers(defense, attacked, images, seed)}
        pictures = [clean, attacked]
        if defense.purifier is not None:
            rows["purified"] = _answers(defense, restored, images, seed)
            pictures.append(restored)
        lengths: Captions = [(f"L2 {float(one.norm()):.2f}", None) for one in change]
        panels[name] = Panel(
            sprite=_sprite([*pictures, gain * change]),
            side=(scale * width, scale * height),
            labels=[images.class_names[int(label)] for label in images.labels],
            rows={**rows, f"|difference|, {gain} times": lengths},
        )
    return panels


def enlarged(panel: Panel) -> bytes:
    """Return the pictures of a panel as a PNG of the size in which the page shows them."""
    small = Image.open(io.BytesIO(base64.b64decode(panel.sprite.partition(",")[2])))
    width, height = len(panel.labels) * panel.side[0], len(panel.rows) * panel.side[1]
    file = io.BytesIO()
    small.resize((width, height), Image.Resampling.NEAREST).save(file, "PNG", optimize=True)
    return file.getvalue()


def _purified(
    defense: Defense, images: ImageSet, sets: Sequence[Tensor], seed: int, batch: int
) -> Sequence[Tensor]:
    """Purify all sets together: to an iterating purifier, more images cost little more time."""
    device = next(defense.classifier.parameters()).device
    attacked, ids = torch.cat(list(sets)), images.ids.repeat(len(sets))
    batches = []
    with torch.no_grad():
        for start in range(0, len(attacked), batch):
            rows = slice(start, start + batch)
            draws = Draws(seed, "score", ids[rows].to(device))
            batches.append(defense.purify(attacked[rows].to(device), draws).cpu())
    return torch.cat(batches).chunk(len(sets))


def _answers(defense: Defense, x: Tensor, images: ImageSet, seed: int) -> Captions:
    """Return the bare classifier's answer to every picture, and whether it is right."""
    device = next(defense.classifier.parameters()).device
    draws = Draws(seed, "score", images.ids.to(device))
    with torch.no_grad():
        confidence, answers = defense.classify(x.to(device), draws).softmax(1).max(1)
    return [
        (f"{images.class_names[int(answer)]} ({100 * float(sure):.0f} %)", bool(answer == label))
        for answer, sure, label in zip(answers.cpu(), confidence.cpu(), images.labels, strict=True)
    ]


def _sprite(rows: Sequence[Tensor]) -> str:
    """Return a PNG of rows of images (S,C,H,W) in [0,1], as a data URI."""
    whole = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    pixels = (whole.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
