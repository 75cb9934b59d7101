"""Adversarial sets on disk: Parquet shards with a manifest (`components.data.shards`).

Columns: `id`, `label`, `image` (fixed-size binary: float32, C x H x W), and the other fields of
`Crafted` by their names. Images are stored in float32: rounded to bytes they could leave the ball
or stop fooling. The manifest says what was attacked, how, and with which attack.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from components.attacks import Crafted
from components.data.image_set import Shape, fixed_size_column
from components.data.shards import (
    read_manifest,
    read_rows,
    shard_rows,
    write_manifest,
    write_shard,
)

# What else is known of every image, with the type that it is stored in.
FACTS = {
    "success": pa.bool_(), "iterations": pa.int64(), "forward": pa.int64(), "backward": pa.int64(),
    "spared": pa.int64(), "fooled": pa.bool_(), "answers": pa.int64(), "margin": pa.float32(),
}  # fmt: skip


def schema(shape: Shape) -> pa.Schema:
    """Return the Parquet schema of adversarial images of this shape."""
    size = 4 * int(np.prod(shape))
    columns = [("id", pa.int64()), ("label", pa.int64()), ("image", pa.binary(size))]
    return pa.schema([*columns, *FACTS.items()])


def write_crafted(path: Path, crafted: Crafted) -> None:
    """Write one shard of a set."""
    flat = np.ascontiguousarray(crafted.images.numpy()).reshape(len(crafted.ids), -1)
    channels, height, width = crafted.images.shape[1:]
    image = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(4 * flat.shape[1]), len(flat), [None, pa.py_buffer(flat)]
    )
    columns = [crafted.ids, crafted.labels, image]
    columns += [getattr(crafted, name) for name in FACTS]
    arrays = [c if isinstance(c, pa.Array) else pa.array(c.numpy()) for c in columns]
    write_shard(path, pa.table(arrays, schema=schema((channels, height, width))))


def write_crafted_manifest(folder: Path, shape: Shape, facts: Mapping[str, Any]) -> None:
    """Finish a set: write the manifest over its shards, with `facts` about how it was made."""
    write_manifest(folder, {"shape": list(shape), **facts})


def read_crafted(folder: Path, rows: range | None = None) -> Crafted:
    """Return a set, or those of `rows` that it has, verified against its manifest.

    Only shards that hold some of these rows are read. Raises DataError if a byte of them has
    changed.
    """
    channels, height, width = read_manifest(folder)["shape"]
    shape = (channels, height, width)
    table = read_rows(folder, schema(shape), rows)
    flat = fixed_size_column(table, "image", np.dtype(np.float32))

    def column(name: str) -> Tensor:
        return torch.from_numpy(table[name].to_numpy().copy())

    return Crafted(
        ids=column("id"),
        labels=column("label"),
        images=torch.from_numpy(flat.reshape(-1, *shape)),
        **{name: column(name) for name in FACTS},
    )


def crafted_shards(folder: Path) -> Iterator[Crafted]:
    """Yield a set shard by shard, each verified as by `read_crafted`."""
    for rows in shard_rows(folder):
        yield read_crafted(folder, rows)


def joined(parts: Sequence[Crafted]) -> Crafted:
    """Return several parts of one set as one."""
    names = [field.name for field in fields(Crafted)]
    return Crafted(*(torch.cat([getattr(part, name) for part in parts]) for name in names))
