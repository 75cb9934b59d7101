"""What the pages of a Parquet file unpack to, by their own headers.

A reader allocates what the header of a page says, whatever the footer says of all of them: a few
kilobytes can be pages of gigabytes under a footer that speaks of kilobytes. Headers are structs in
Thrift's compact protocol (https://github.com/apache/parquet-format, PageHeader).
"""

from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

import pyarrow.parquet as pq

# The numbers of the two fields that say how large a page is.
UNPACKED, PACKED = 2, 3
# No header nests deeper, and no honest one is longer.
DEPTH, LONGEST = 4, 1 << 20


def unpacked(path: Path, metadata: pq.FileMetaData, columns: Collection[str]) -> int:
    """Return how many bytes all pages of these columns unpack to, by their paths in the schema.

    Raises ValueError for headers that are none.
    """
    total = 0
    with path.open("rb") as file:
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            for column in map(group.column, range(group.num_columns)):
                if column.path_in_schema not in columns:
                    continue
                place = column.data_page_offset
                if column.has_dictionary_page:
                    place = min(place, column.dictionary_page_offset or place)
                end = place + column.total_compressed_size
                while place < end:
                    file.seek(place)
                    header = _struct(file, DEPTH)
                    if min(header.get(PACKED, -1), header.get(UNPACKED, -1)) < 0:
                        raise ValueError(f"the page at byte {place} has no sizes")
                    total += header[UNPACKED]
                    place = file.tell() + header[PACKED]
    return total


def _struct(file: BinaryIO, depth: int) -> dict[int, int]:
    """Return the whole numbers among the fields of a struct, and pass over all others."""
    found: dict[int, int] = {}
    number = 0
    while head := _byte(file):
        number = number + (head >> 4) if head >> 4 else _signed(file)
        match head & 15:
            case 1 | 2:
                pass  # True or false says so by its kind.
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
