"""The contract of a source: what it reads, and what it could not use."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from components.config import Config

Progress = Callable[[str, int, int], None]
"""Told the name of a download, and its bytes so far and in all."""


def silent(name: str, done: int, total: int) -> None:
    """Report progress to nobody."""


@dataclass(frozen=True)
class Reject:
    """One image that was left out: the file, the row in it (or None), and why."""

    file: str
    row: int | None
    reason: str


@dataclass(frozen=True)
class RawSplit:
    """One split as a source has it: images (N,C,H,W) uint8, labels (N,) int64.

    `rows` (N,) int64 is where each image stands in the source, rejects counted, so that mending
    one image leaves the place of all others as it was.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    rejects: tuple[Reject, ...]

    @property
    def seen(self) -> int:
        """How many images were looked at, the rejected ones included."""
        return len(self.labels) + len(self.rejects)


def complete(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> RawSplit:
    """Return a split of which nothing was rejected."""
    return RawSplit(images, labels, np.arange(len(labels)), ())


@dataclass(frozen=True)
class RawData:
    """What a source holds. `test` is None where the source has no test split of its own."""

    train: RawSplit
    test: RawSplit | None
    class_names: tuple[str, ...]


class SourceConfig(Config):
    """What every source needs to be told.

    `test` is the number of test images to cut from train where the source has none of its own
    (0 otherwise); `val` is cut from train; the limits take a fair subset (null: all) of what is
    there; more than `max_reject_fraction` unreadable images is fatal.
    """

    val: Annotated[int, Field(ge=1)]
    test: Annotated[int, Field(ge=0)]
    train_limit: Annotated[int, Field(ge=1)] | None
    test_limit: Annotated[int, Field(ge=1)] | None
    max_reject_fraction: Annotated[float, Field(ge=0, le=1)]

    def load(self, scratch: Path, progress: Progress = silent) -> RawData:
        """Read the source; `scratch` is a folder that outlives the run, for downloads.

        Raises DataError for a source that must not be used, ConnectionError where it cannot be
        had.
        """
        raise NotImplementedError
