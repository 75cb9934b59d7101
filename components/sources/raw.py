"""The contract of a source: its settings, the images that it reads, and those that it rejects."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from components.config import Config

Progress = Callable[[str, int, int], None]
"""Called with the name of a download, the bytes so far and the total."""


def silent(name: str, done: int, total: int) -> None:
    """Ignore progress."""


@dataclass(frozen=True)
class Reject:
    """One image that was left out: its file, its row in the file (or None), and the reason."""

    file: str
    row: int | None
    reason: str


@dataclass(frozen=True)
class RawSplit:
    """One split of a source: images (N,C,H,W) uint8, labels (N,) int64.

    `rows` (N,) int64 is the position of each image in the source, rejects counted, so that
    repairing one image does not move the others.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    rejects: tuple[Reject, ...]

    @property
    def seen(self) -> int:
        """The number of images in the source, rejected ones included."""
        return len(self.labels) + len(self.rejects)


def complete(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> RawSplit:
    """Return a split without rejects."""
    return RawSplit(images, labels, np.arange(len(labels)), ())


@dataclass(frozen=True)
class RawData:
    """The splits of a source; `test` is None if it has no test split of its own."""

    train: RawSplit
    test: RawSplit | None
    class_names: tuple[str, ...]


class SourceConfig(Config):
    """The settings of every source.

    `val` images are cut from train, and so are `test` images if the source has no test split of its
    own (else `test` is 0). The limits keep a subset stratified by class (null: all). A greater
    fraction of unusable images than `max_reject_fraction` is an error.
    """

    val: Annotated[int, Field(ge=1)]
    test: Annotated[int, Field(ge=0)]
    train_limit: Annotated[int, Field(ge=1)] | None
    test_limit: Annotated[int, Field(ge=1)] | None
    max_reject_fraction: Annotated[float, Field(ge=0, le=1)]

    def load(self, scratch: Path, progress: Progress = silent) -> RawData:
        """Read the source; `scratch` is a folder for downloads that outlives the run.

        Raises DataError for a source that cannot be used, ConnectionError if a download fails.
        """
        raise NotImplementedError
