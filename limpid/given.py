"""Adversarial images that a caller has: checked, and stored as one more set of every entry."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from components.attacks import L2, SLACK, Crafted, Linf
from components.attacks.contract import GIVEN, Given
from components.attacks.sets import write_crafted, write_crafted_manifest
from components.data.image_set import ImageSet
from components.data.shards import shard_name
from components.sources.examples import read_examples
from pipelines.errors import ConfigError
from pipelines.tasks.entries import Entry


def read_given(path: Path, every: ImageSet, test: ImageSet) -> Tensor:
    """Return the adversarial images of a file for the test images: (N,C,H,W) float32.

    Its rows have the ids of test images; without any, they are those of `every` image, in order.
    Raises ConfigError where one is missing or belongs to no image.
    """
    ids, images = read_examples(path, every.shape, len(every))
    if ids is None and len(images) < len(every):
        raise ConfigError(
            f"{path} has {len(images)} images and no column id, and there are {len(every)} test "
            "images; give one for each, in their order, or ids"
        )
    ids = every.ids if ids is None else ids
    unknown = int((~torch.isin(ids, every.ids)).sum())
    missing = int((~torch.isin(test.ids, ids)).sum())
    if unknown or missing or len(set(ids.tolist())) < len(ids):
        raise ConfigError(
            f"{path} is about other images: {unknown} of its ids are none of the test images, and "
            f"{missing} of the {len(test)} that are attacked are not in it, or an id is there twice"
        )
    rows = {int(id_): row for row, id_ in enumerate(ids)}
    return images[torch.tensor([rows[int(id_)] for id_ in test.ids])]


def as_given(given: Mapping[str, Tensor], test: ImageSet, threat: Linf | L2) -> dict[str, Tensor]:
    """Return adversarial images by the names of their sets, as float32.

    Raises ConfigError for a name that is none, and for images that are not (N,C,H,W) like the test
    images, not in [0,1], or outside of the ball around them.
    """
    found = {}
    for name, images in given.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ConfigError(f"a set is called {name!r}; letters, digits, - and _ make a name")
        if images.shape != test.images.shape or not images.is_floating_point():
            raise ConfigError(
                f"the set {name} is {images.dtype} of shape {tuple(images.shape)}, and the test "
                f"images are {tuple(test.images.shape)}; give float32 images of this shape"
            )
        found[name] = images = images.detach().cpu().float().contiguous()
        strange = int((~((images >= 0) & (images <= 1)).flatten(1).all(1)).sum())
        if strange:
            raise ConfigError(f"{strange} images of the set {name} have pixels outside of [0,1]")
        far = threat.distance(images, test.pixels())
        outside = int((far > threat.eps + SLACK).sum())
        if outside:
            raise ConfigError(
                f"{outside} of {len(far)} images of the set {name} leave the ball, up to "
                f"{far.max():.6g} away; {threat.label} allows {threat.eps:.6g}, measured as stored"
            )
    return found


def store(folder: Path, images: Tensor, test: ImageSet, batch: int) -> None:
    """Write images as a set of shards of `batch` rows; what nobody knows of them is 0."""
    for index, rows in enumerate(torch.arange(len(test)).split(batch)):  # type: ignore[no-untyped-call]
        no, zero = (
            torch.zeros(len(rows), dtype=torch.bool),
            torch.zeros(len(rows), dtype=torch.int64),
        )
        crafted = Crafted(
            ids=test.ids[rows], labels=test.labels[rows], images=images[rows], success=no,
            iterations=zero, forward=zero, backward=zero, spared=zero, fooled=no, answers=zero,
            margin=zero.float(),
        )  # fmt: skip
        write_crafted(folder / shard_name(index), crafted)
    write_crafted_manifest(folder, test.shape, {"mode": GIVEN})


def with_given(entry: Entry, folders: Mapping[str, Path]) -> Entry:
    """Return an entry that is attacked by the stored sets in some folders, too."""
    named = {f"{GIVEN}/{name}": folder for name, folder in folders.items()}
    return replace(
        entry,
        sets={**entry.sets, **named},
        attacks={**entry.attacks, **dict.fromkeys(named, Given())},
    )
