"""Sources of raw images, one class each in `DataConfig`, and `prepare`, which makes splits of them.

A source reads its files into uint8 arrays of one size and lists the single images that it cannot
use (`Reject`). Whatever makes the whole source unusable is a DataError that names file and row.
"""

import hashlib
import itertools
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from components import plugins
from components.data.image_set import ImageSet, stratified
from components.data.shards import DataError
from components.sources.archives import Cifar10, Cifar100, Kmnist, Mnist
from components.sources.digits import Digits
from components.sources.folder import ImageFolder
from components.sources.parquet import ParquetFiles
from components.sources.raw import Progress, RawData, RawSplit, Reject, SourceConfig, silent

# Plugins add theirs (`components.plugins`).
_Source = Digits | ParquetFiles | ImageFolder | Mnist | Kmnist | Cifar10 | Cifar100

if TYPE_CHECKING:
    DataConfig = Annotated[_Source, Field(discriminator="kind")]
else:
    __getattr__ = plugins.unions(__name__, "datasets", {"DataConfig": (_Source, SourceConfig)})


@dataclass(frozen=True)
class Prepared:
    """The three splits, the images that were left out, and warnings for the user."""

    train: ImageSet
    val: ImageSet
    test: ImageSet
    rejects: tuple[Reject, ...]
    warnings: tuple[str, ...]


def prepare(
    config: SourceConfig, seed: int, scratch: Path, progress: Progress = silent
) -> Prepared:
    """Load a source and cut it into train, val and test; every cut is stratified by class.

    The id of an image is its position in the source, train before test, so ids are unique and
    stable. The splits depend on the source, `config` and `seed` alone. Raises DataError for bad
    data, ValueError for cuts and limits that the data is too small for.
    """
    raw = config.load(scratch, progress)
    _check(raw, config.max_reject_fraction)
    train = _images(raw.train, 0, raw.class_names)
    if raw.test is None:
        train, test = _cut(train, config.test, seed, "test")
    elif config.test:
        raise ValueError(f"test is {config.test}, but the source has its own: it must be 0")
    else:
        test = _images(raw.test, raw.train.seen, raw.class_names)
    train, val = _cut(train, config.val, seed, "val")
    splits = {
        "train": _limit(train, config.train_limit, seed, "train_limit"),
        "val": val,
        "test": _limit(test, config.test_limit, seed, "test_limit"),
    }
    absent = _absent(splits["train"].labels.numpy(), raw.class_names)
    if absent:
        raise ValueError(f"val, test and train_limit leave no image of {absent[0]} in train")
    rejects = raw.train.rejects + (raw.test.rejects if raw.test else ())
    return Prepared(**splits, rejects=rejects, warnings=(*_missing(splits), *_repeated(splits)))


def _check(raw: RawData, max_reject_fraction: float) -> None:
    """Raise DataError unless the source as a whole can be used."""
    splits = {"train": raw.train} | ({"test": raw.test} if raw.test else {})
    for name, split in splits.items():
        if len(split.rejects) > max_reject_fraction * split.seen:
            first = split.rejects[0]
            where = first.file if first.row is None else f"{first.file}, row {first.row}"
            raise DataError(
                f"{len(split.rejects)} of {split.seen} images of {name} cannot be used, more than "
                f"the fraction {max_reject_fraction} allowed; the first, {where}, {first.reason}"
            )
        if not len(split.labels):
            raise DataError(f"{name} has no images")
        wrong = np.flatnonzero((split.labels < 0) | (split.labels >= len(raw.class_names)))
        if len(wrong):
            raise DataError(
                f"{name}, image {split.rows[wrong[0]]}: the label is {split.labels[wrong[0]]}, "
                f"allowed is 0 to {len(raw.class_names) - 1}"
            )
    shapes = {split.images.shape[1:] for split in splits.values()}
    if len(shapes) > 1:
        raise DataError(f"the images of train and test differ in shape: {shapes}")
    absent = _absent(raw.train.labels, raw.class_names)
    if absent:
        raise DataError(f"train has no image of the class {absent[0]}")


def _absent(labels: npt.NDArray[np.int64], class_names: tuple[str, ...]) -> list[str]:
    return [class_names[i] for i in np.setdiff1d(np.arange(len(class_names)), labels)]


def _images(split: RawSplit, first_id: int, class_names: tuple[str, ...]) -> ImageSet:
    return ImageSet(
        torch.from_numpy(np.require(split.images, requirements=["C", "W"])),
        torch.from_numpy(np.require(split.labels, requirements=["C", "W"])),
        torch.from_numpy(split.rows + first_id),
        class_names,
    )


def _choose(data: ImageSet, count: int, seed: int, use: str) -> Tensor:
    """Return a boolean mask (N,) of `count` rows, stratified by class; every `use` has its own."""
    stream = zlib.crc32(f"{seed}/{use}".encode())
    return torch.from_numpy(stratified(data.labels.numpy(), count, stream))


def _cut(data: ImageSet, count: int, seed: int, use: str) -> tuple[ImageSet, ImageSet]:
    """Return a set without `count` of its images, and these."""
    if not 0 < count < len(data):
        raise ValueError(
            f"{use} is {count}, but 1 to {len(data) - 1} of the {len(data)} images of train "
            f"can be cut"
        )
    chosen = _choose(data, count, seed, use)
    return data[~chosen], data[chosen]


def _limit(data: ImageSet, limit: int | None, seed: int, use: str) -> ImageSet:
    if limit is None:
        return data
    if limit > len(data):
        raise ValueError(f"{use} is {limit}, but there are {len(data)} images; null takes all")
    return data[_choose(data, limit, seed, use)]


def _missing(splits: dict[str, ImageSet]) -> list[str]:
    """Name the classes without an image in a split; for train `prepare` has raised already."""
    absent = {name: _absent(s.labels.numpy(), s.class_names) for name, s in splits.items()}
    return [f"{name} has no image of {', '.join(a)}" for name, a in absent.items() if a]


def _repeated(splits: dict[str, ImageSet]) -> list[str]:
    """Name the images that two splits share byte for byte: a fault of the data, which we keep."""
    digests = {
        name: [hashlib.blake2b(image.tobytes()).digest() for image in split.images.numpy()]
        for name, split in splits.items()
    }
    warnings = []
    for one, other in itertools.combinations(splits, 2):
        known = set(digests[one])
        pairs = zip(splits[other].ids.tolist(), digests[other], strict=True)
        ids = [id_ for id_, digest in pairs if digest in known]
        if ids:
            shown = ", ".join(map(str, ids[:5])) + (", ..." if len(ids) > 5 else "")
            warnings.append(
                f"{len(ids)} images of {other} are byte for byte in {one} too (ids {shown})"
            )
    return warnings
