"""Parquet files as public hubs hold image datasets: encoded images beside integer labels.

Under `path` lie `train.parquet`, `train-*.parquet` or `train/*.parquet`, and the same for `test` if
there is a test split. The column `image` is a struct with a binary `bytes`, or binary itself;
`label` is an integer. Only these columns are read, in small batches, because a few hundred bytes of
Parquet can unpack to gigabytes.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from components.data.shards import DataError
from components.sources import pages
from components.sources.images import ALL, MAX_BYTES, EncodedSource, SplitBuilder
from components.sources.raw import Progress, RawData, RawSplit, silent

# A dictionary page gives one large value to many rows: few rows at a time bound the memory.
BATCH_ROWS = 8
# Encoded images hardly compress: a file that unpacks to many times its size holds something else.
MAX_RATIO = 50
# No image file is smaller, so a file with more rows than fit repeats them.
SMALLEST = 25
# ValueError, too: names and metadata in a damaged footer need not be UTF-8.
DAMAGE = (OSError, ValueError, pa.ArrowException)


class ParquetFiles(EncodedSource):
    """Images and labels in Parquet files; class names are in their metadata, else 0..K-1."""

    kind: Literal["parquet"]

    def load(self, scratch: Path, progress: Progress = silent) -> RawData:
        """Read the files of `train` and, if there are any, of `test`."""
        root = Path(self.path)
        train_files, test_files = files_of(root, "train"), files_of(root, "test")
        if not train_files:
            raise DataError(
                f"{root} has no train.parquet, train-*.parquet or train/*.parquet to read"
            )
        names = _class_names(train_files + test_files)
        train = SplitBuilder(f"train of {root}", self, None)
        highest = _add_all(train, train_files, len(names) if names else None, root)
        names = names or _number_names(highest, train)
        if not test_files:
            return RawData(train.build(), None, names)
        split = train.build()
        test = SplitBuilder(f"test of {root}", self, train.shape)
        _add_all(test, test_files, len(names), root)
        return RawData(split, test.build(), names)


def read_files(files: list[Path]) -> tuple[RawSplit, tuple[str, ...]]:
    """Read the files of one split, and return its images and the names of the classes."""
    root, names = files[0].parent, _class_names(files)
    split = SplitBuilder(str(root), ParquetFiles(**ALL, kind="parquet", path=str(root)), None)
    highest = _add_all(split, files, len(names) if names else None, root)
    return split.build(), names or _number_names(highest, split)


def files_of(root: Path, split: str) -> list[Path]:
    """Return the files of a split in order; raise DataError unless they are clearly complete."""
    patterns = (f"{split}.parquet", f"{split}-*.parquet", f"{split}/*.parquet")
    found = [sorted(root.glob(pattern)) for pattern in patterns]
    forms = [files for files in found if files]
    if len(forms) > 1:
        raise DataError(f"{root} has both {forms[0][0].name} and {forms[1][0].name}: keep one form")
    files = forms[0] if forms else []
    totals = {int(match[1]) for file in files if (match := re.search(r"-of-(\d+)\.", file.name))}
    if totals and totals != {len(files)}:
        raise DataError(
            f"{root} has {len(files)} files of {split}, but their names say {max(totals)}"
        )
    return files


def _open(file: Path) -> pq.ParquetFile:
    """Return an open Parquet file of the right form; raise DataError otherwise."""
    try:
        parquet = pq.ParquetFile(file, page_checksum_verification=True, buffer_size=1 << 20)
        schema = parquet.schema_arrow
        found = ", ".join(f"{field.name}: {field.type}" for field in schema)
        unpacked = pages.unpacked_bytes(file, parquet.metadata, ("image", "image.bytes", "label"))
    except DAMAGE as error:
        raise DataError(f"{file} cannot be read as Parquet: {error}") from None
    if not (_is_image(schema, "image") and _is_label(schema, "label")):
        raise DataError(
            f"{file} must have the columns image: struct<bytes: binary> or binary, and label: an "
            f"integer; it has {found}"
        )
    packed, rows = file.stat().st_size, parquet.metadata.num_rows
    if unpacked > max(MAX_BYTES, MAX_RATIO * packed) or SMALLEST * rows > MAX_RATIO * packed:
        raise DataError(
            f"{file} unpacks {packed} bytes to {max(unpacked, SMALLEST * rows)} or more: more than "
            f"{MAX_RATIO} times, so it does not hold encoded images"
        )
    return parquet


def _is_image(schema: pa.Schema, name: str) -> bool:
    field = _field(schema, name)
    if field is not None and pa.types.is_struct(field.type):
        field = _field(pa.schema(list(field.type)), "bytes")
    return field is not None and (
        pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)
    )


def _is_label(schema: pa.Schema, name: str) -> bool:
    field = _field(schema, name)
    return field is not None and pa.types.is_integer(field.type)


def _field(schema: pa.Schema, name: str) -> pa.Field | None:
    """Return a column, if it exists exactly once and has no extension type, known or not."""
    index = schema.get_field_index(name)
    if index < 0 or b"ARROW:extension:name" in (schema.field(index).metadata or {}):
        return None
    return schema.field(index)


def _class_names(files: list[Path]) -> tuple[str, ...] | None:
    """Return the class names that all files agree on, or None if no file has any."""
    found = {_declared_names(file) for file in files}
    if len(found) > 1:
        raise DataError(
            f"{files[0].parent}: the files differ in their class names or their order: "
            f"{' and '.join(str(names) for names in found)}"
        )
    return found.pop()


def _declared_names(file: Path) -> tuple[str, ...] | None:
    """Return the class names in a file's metadata, under our own key or that of Hugging Face."""
    metadata: dict[bytes, bytes] = _open(file).schema_arrow.metadata or {}
    if b"label_names" in metadata:
        names: Any = metadata[b"label_names"].decode(errors="replace").split(",")
    else:
        try:
            features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
            names = features["label"]["names"]
        except (ValueError, KeyError, TypeError):
            return None
    if not isinstance(names, list) or not all(names) or len(set(map(str, names))) != len(names):
        raise DataError(f"{file} names its classes {names}, but needs a list of distinct names")
    return tuple(str(name) for name in names)


def _number_names(highest: int, train: SplitBuilder) -> tuple[str, ...]:
    """Return the names "0" to the highest label; raise DataError for more classes than images."""
    seen = len(train)
    if highest >= seen:
        raise DataError(f"{train.where} has the label {highest} but only {seen} images in all")
    return tuple(str(number) for number in range(highest + 1))


def _add_all(builder: SplitBuilder, files: list[Path], classes: int | None, root: Path) -> int:
    """Add the images of all files, check labels to be in 0..classes-1; return the highest label."""
    highest = 0
    allowed = "0 or more" if classes is None else f"0 to {classes - 1}"
    for file in files:
        builder.packed += file.stat().st_size
        for row, (content, label) in enumerate(_rows(file)):
            if label is None or label < 0 or (classes is not None and label >= classes):
                raise DataError(f"{file}, row {row}: the label is {label}, allowed is {allowed}")
            if content is None:
                raise DataError(f"{file}, row {row}: the image has no bytes")
            builder.add(content, label, file.relative_to(root).as_posix(), row)
            highest = max(highest, label)
    return highest


def _rows(file: Path) -> Iterator[tuple[bytes | None, int | None]]:
    """Yield image and label of every row; a null, also inside the struct, is None."""
    parquet = _open(file)
    nested = pa.types.is_struct(parquet.schema_arrow.field("image").type)
    columns = ["image.bytes" if nested else "image", "label"]
    row = 0
    try:
        for batch in parquet.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
            images = batch.column("image").to_pylist()
            if nested:
                images = [image and image["bytes"] for image in images]
            yield from zip(images, batch.column("label").to_pylist(), strict=True)
            row += len(batch)
    except DAMAGE as error:
        raise DataError(f"{file} is damaged in or after row {row}: {error}") from None
