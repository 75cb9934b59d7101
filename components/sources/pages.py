"""The unpacked size of a Parquet file, by the headers of its pages.

A reader allocates the size in the header of each page, whatever the footer says: a file of
kilobytes can hold pages of gigabytes under a footer that speaks of kilobytes. Headers are structs
in Thrift's compact protocol (https://github.com/apache/parquet-format, PageHeader).
"""

from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

import pyarrow.parquet as pq

# The ids of the two fields of a header that hold the sizes of its page.
UNPACKED, PACKED = 2, 3
# No header nests deeper, and no real one has longer text.
DEPTH, LONGEST = 4, 1 << 20


def unpacked_bytes(path: Path, metadata: pq.FileMetaData, columns: Collection[str]) -> int:
    """Return how many bytes all pages of some columns, named by their paths, unpack to.

    Raises ValueError for a header that cannot be read.
    """
    total = 0
    with path.open("rb") as file:
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            for column in map(group.column, range(group.num_columns)):
                if column.path_in_schema not in columns:
                    continue
                position = column.data_page_offset
                if column.has_dictionary_page:
                    position = min(position, column.dictionary_page_offset or position)
                end = position + column.total_compressed_size
                while position < end:
                    file.seek(position)
                    header = _struct(file, DEPTH)
                    if min(header.get(PACKED, -1), header.get(UNPACKED, -1)) < 0:
                        raise ValueError(f"the page at byte {position} has no sizes")
                    total += header[UNPACKED]
                    position = file.tell() + header[PACKED]
    return total


def _struct(file: BinaryIO, depth: int) -> dict[int, int]:
    """Return the whole numbers among the fields of a struct by their ids; skip all others."""
    found: dict[int, int] = {}
    number = 0
    while head := _byte(file):
        number = number + (head >> 4) if head >> 4 else _signed(file)
        match head & 15:
            case 1 | 2:
                pass  # A boolean has its value in its type, and no bytes.
            case 4 | 5 | 6:
                found[number] = _signed(file)
            case 8:
                length = _varint(file)
                if length > LONGEST:
                    raise ValueError(f"the header of a page holds {length} bytes of text")
                file.seek(length, 1)
            case 12 if depth:
                _struct(file, depth - 1)
            case kind:
                raise ValueError(f"the header of a page has a field of kind {kind}")
    return found


def _signed(file: BinaryIO) -> int:
    value = _varint(file)
    return value >> 1 ^ -(value & 1)


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = _byte(file)
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise ValueError("the header of a page has a number without end")


def _byte(file: BinaryIO) -> int:
    one = file.read(1)
    if not one:
        raise ValueError("the file ends within the header of a page")
    return one[0]
