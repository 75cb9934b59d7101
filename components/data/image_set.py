"""Labelled images, in memory and on disk.

All code downstream takes an `ImageSet`: uint8 images, labels and ids in memory. On disk it is a
folder of Parquet shards (`components.data.shards`) with columns `id` (int64, unique over all
splits), `image` (fixed-size binary: uint8, C x H x W) and `label` (int64).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from components.data.shards import (
    DataError,
    read_manifest,
    read_rows,
    shard_name,
    write_manifest,
    write_shard,
)

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class ImageSet:
    """Images (N,C,H,W) uint8, labels (N,) int64, ids (N,) int64, and the names of the classes."""

    images: Tensor
    labels: Tensor
    ids: Tensor
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Tensor) -> "ImageSet":
        return ImageSet(self.images[rows], self.labels[rows], self.ids[rows], self.class_names)

    @property
    def shape(self) -> Shape:
        """Channels, height and width of every image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def pixels(self) -> Tensor:
        """Return the images as float32 (N,C,H,W) in [0,1]."""
        return self.images.float() / 255


def schema(shape: Shape) -> pa.Schema:
    """Return the Parquet schema of images of this shape."""
    size = int(np.prod(shape))
    return pa.schema([("id", pa.int64()), ("image", pa.binary(size)), ("label", pa.int64())])


def write(folder: Path, data: ImageSet, rows_per_part: int) -> None:
    """Write a split as shards of `rows_per_part` rows, and then its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, start in enumerate(range(0, len(data), rows_per_part)):
        rows = torch.arange(start, min(start + rows_per_part, len(data)))
        write_shard(folder / shard_name(index), _table(data[rows]))
    write_manifest(folder, {"shape": list(data.shape), "class_names": list(data.class_names)})


def read(folder: Path, rows: range | None = None) -> ImageSet:
    """Return a split, or those of `rows` that it has, verified against its manifest.

    Only shards that hold some of these rows are read (`shard_rows` has those of every shard).
    Raises DataError if a byte of them has changed, and for a split without images.
    """
    manifest = read_manifest(folder)
    try:
        channels, height, width = manifest["shape"]
        names = tuple(str(name) for name in manifest["class_names"])
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{folder}/manifest.json does not give shape and class_names") from None
    shape = (channels, height, width)
    data = _images(read_rows(folder, schema(shape), rows), shape, names)
    if rows is None and not len(data):
        raise DataError(f"{folder} contains no images")
    if len(data) and (data.labels.min() < 0 or data.labels.max() >= len(names)):
        raise DataError(f"{folder} has labels outside 0..{len(names) - 1}")
    return data


def stratified(labels: npt.NDArray[np.int64], count: int, seed: int) -> npt.NDArray[np.bool_]:
    """Choose `count` rows at random with every class in proportion; return a mask of the chosen.

    Numbers per class are rounded by largest remainder. The result depends only on labels, count and
    seed. Raises ValueError unless `count` lies in 0..N.
    """
    if not 0 <= count <= len(labels):
        raise ValueError(f"cannot choose {count} of {len(labels)} rows")
    classes, sizes = np.unique(labels, return_counts=True)
    quotas = sizes * (count / max(len(labels), 1))
    counts = np.floor(quotas).astype(np.int64)
    for index in np.argsort(-(quotas - counts), kind="stable")[: count - int(counts.sum())]:
        counts[index] += 1
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), dtype=np.bool_)
    for label, number in zip(classes, counts, strict=True):
        chosen[rng.permutation(np.flatnonzero(labels == label))[:number]] = True
    return chosen


def _table(data: ImageSet) -> pa.Table:
    flat = np.ascontiguousarray(data.images.numpy()).reshape(len(data), -1)
    image = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(flat.shape[1]), len(flat), [None, pa.py_buffer(flat)]
    )
    return pa.table(
        [pa.array(data.ids.numpy()), image, pa.array(data.labels.numpy())],
        schema=schema(data.shape),
    )


def _images(table: pa.Table, shape: Shape, class_names: tuple[str, ...]) -> ImageSet:
    flat = fixed_size_column(table, "image", np.dtype(np.uint8))
    return ImageSet(
        torch.from_numpy(flat.reshape(-1, *shape)),
        torch.from_numpy(table["label"].to_numpy().copy()),
        torch.from_numpy(table["id"].to_numpy().copy()),
        class_names,
    )


def fixed_size_column(table: pa.Table, name: str, dtype: "np.dtype[Any]") -> npt.NDArray[Any]:
    """Return a fixed-size binary column as an array (rows, values) of its own memory."""
    width = table.schema.field(name).type.byte_width
    arrays = [
        np.frombuffer(
            chunk.buffers()[1],
            dtype=np.uint8,
            count=len(chunk) * width,
            offset=chunk.offset * width,
        )
        for chunk in table[name].chunks
        if len(chunk)
    ]
    return (
        np.concatenate([np.empty(0, np.uint8), *arrays]).reshape(table.num_rows, width).view(dtype)
    )
