"""Adversarial images that somebody else crafted and stored, read from one Parquet file.

The column `image` holds pixels in the order C, H, W: float32 in [0,1] or uint8, as bytes or as a
list of numbers; or an encoded image, as in `ParquetFiles`. The column `id`, if there is one, says
which test image a row is about.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from components.data.image_set import Shape
from components.data.shards import DataError
from components.sources import pages
from components.sources.images import MAX_BYTES, decode
from components.sources.parquet import BATCH_ROWS, DAMAGE

# What one value may take in a file, unpacked.
VALUE_BYTES = 16


def read_examples(path: Path, shape: Shape, most: int) -> tuple[Tensor | None, Tensor]:
    """Return the ids (N,) int64, None without such a column, and the images (N,C,H,W) float32.

    They have the given shape, and there are at most `most`. Nothing is clipped or rounded. Raises
    DataError for a file that cannot be read, and for images of another shape or number.
    """
    try:
        parquet = pq.ParquetFile(path, page_checksum_verification=True)
        rows, fields = parquet.metadata.num_rows, parquet.schema_arrow
    except DAMAGE as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from None
    if "image" not in fields.names:
        raise DataError(f"{path} has the columns {', '.join(fields.names)}, and none called image")
    if not 0 < rows <= most:
        raise DataError(f"{path} has {rows or 'no'} images, and there are {most} test images")
    known = "id" in fields.names
    if known and not pa.types.is_integer(fields.field("id").type):
        raise DataError(
            f"{path} has a column id of type {fields.field('id').type}; ids are the integers of "
            "the test images: give those, or leave the column out"
        )
    ids, images = list[npt.NDArray[np.int64]](), list[npt.NDArray[np.float32]]()
    try:
        _require_small(path, parquet, VALUE_BYTES * rows * int(np.prod(shape)))
        columns = ["image", "id"] if known else ["image"]
        for batch in parquet.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
            if any(column.null_count for column in batch.columns):
                raise DataError(f"{path} has rows without a value")
            images.append(_pixels(path, batch.column("image"), shape))
            if known:
                ids.append(batch.column("id").to_numpy(zero_copy_only=False).astype(np.int64))
    except DataError:
        raise
    except DAMAGE as error:
        raise DataError(f"{path} is damaged: {error}") from None
    found = torch.from_numpy(np.concatenate(images))
    return (torch.from_numpy(np.concatenate(ids)) if known else None), found


def _require_small(path: Path, parquet: pq.ParquetFile, most: int) -> None:
    """Raise DataError for a file whose images unpack to more bytes than images can have."""
    columns = [parquet.schema.column(index).path for index in range(len(parquet.schema))]
    stored = [name for name in columns if name.partition(".")[0] == "image"]
    unpacked = pages.unpacked_bytes(path, parquet.metadata, stored)
    if unpacked > max(MAX_BYTES, most):
        raise DataError(f"{path} unpacks to {unpacked} bytes, too many for the test images")


def _pixels(path: Path, column: pa.Array, shape: Shape) -> npt.NDArray[np.float32]:
    """Return some rows of the column `image` as (N,C,H,W)."""
    kind, size = column.type, int(np.prod(shape))
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        column = column.field("bytes")
        kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        lengths = set(pc.list_value_length(column).to_pylist())
        values = column.flatten().to_numpy(zero_copy_only=False)
        if lengths != {size} or values.dtype not in (np.uint8, np.float32, np.float64):
            raise DataError(
                f"{path} has lists of {min(lengths)} values {kind.value_type}; images are "
                f"{shape}: {size} values, float32 or uint8"
            )
        return _scaled(values).reshape(-1, *shape)
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    if not (binary or pa.types.is_fixed_size_binary(kind)):
        raise DataError(f"{path} has images of type {kind}; give bytes, or lists of numbers")
    return np.stack([_image(path, content, shape) for content in column.to_pylist()])


def _image(path: Path, content: bytes | None, shape: Shape) -> npt.NDArray[np.float32]:
    """Return one image (C,H,W) of raw pixels, or of an encoded file."""
    content, size = content or b"", int(np.prod(shape))
    decoded = decode(content, shape[0], None)
    if not isinstance(decoded, str):
        if decoded.shape != shape:
            raise DataError(f"{path} has images {decoded.shape}, and the test images are {shape}")
        return _scaled(decoded)
    types = {size: np.uint8, 4 * size: np.float32}
    if len(content) not in types:
        raise DataError(
            f"{path} has an image of {len(content)} bytes, which {decoded}; raw pixels of images "
            f"{shape} are {size} bytes (uint8) or {4 * size} (float32)"
        )
    return _scaled(np.frombuffer(content, types[len(content)]).reshape(shape))


def _scaled(values: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    """Return values in [0,1]; uint8 are levels of 255."""
    scaled: npt.NDArray[np.float32] = values.astype(np.float32)
    return scaled / np.float32(255) if values.dtype == np.uint8 else scaled
