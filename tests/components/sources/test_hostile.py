"""Files made to exhaust a machine are refused soon and in little memory; measured from outside."""

import gzip
import json
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from project import ROOT
from toys import png

GIGABYTES = 1_500_000_000
# Enough to show in the memory of a process, and quick to make.
MUCH = 400_000_000
READ = """
import json, resource, sys, time
from pathlib import Path
from components.data.shards import DataError
from components.sources.folder import ImageFolder
from components.sources.formats import read_idx, read_tar
from components.sources.parquet import ParquetFiles

def images(of, kind):
    facts = {"val": 1, "test": 0, "train_limit": None, "test_limit": None}
    facts |= {"max_reject_fraction": 0.5, "channels": 3, "size": None, "kind": kind}
    return lambda path: of.model_validate({**facts, "path": str(path)}).load(path)

READERS = {
    "parquet": images(ParquetFiles, "parquet"),
    "image_folder": images(ImageFolder, "image_folder"),
    "tar": lambda path: read_tar(path, ["set/train"]),
    "idx": lambda path: read_idx(path, 1),
}

def peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

start = peak()
for line in sys.stdin:
    name, kind, path = json.loads(line)
    began, outcome = time.process_time(), "read"
    try:
        READERS[kind](Path(path))
    except DataError as error:
        outcome = str(error)
    print(json.dumps([name, [outcome, time.process_time() - began, peak() - start]]))
"""


def write(path: Path, images: pa.Array, **facts: object) -> Path:
    """Write images of class 0 as `train.parquet` into a folder; the file must be small."""
    path.mkdir()
    table = pa.table({"image": images, "label": pa.array([0] * len(images), pa.int8())})
    pq.write_table(table, path / "train.parquet", compression="zstd", store_schema=False, **facts)
    assert (path / "train.parquet").stat().st_size < 300_000
    return path


def repeated(value: bytes, times: int) -> pa.Array:
    """Return an array of one value repeated, which the file holds once."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * times, pa.int32()), pa.array([value]))


def packed_value(path: Path) -> Path:
    return write(path, pa.array([bytes(MUCH)]), use_dictionary=False, write_statistics=False)


def lying_footer(path: Path) -> Path:
    """A packed value under a footer that says it is small."""
    file = packed_value(path) / "train.parquet"
    content = file.read_bytes()
    (length,) = struct.unpack("<I", content[-8:-4])
    pages, footer = content[: -8 - length], content[-8 - length : -8]
    group = pq.read_metadata(file).row_group(0)
    for size in {group.total_byte_size, group.column(0).total_uncompressed_size}:
        assert footer.count(varint(2 * size)) == 1
        footer = footer.replace(varint(2 * size), varint(2 * 5000, len(varint(2 * size))))
    file.write_bytes(pages + footer + content[-8:])
    assert pq.read_metadata(file).row_group(0).total_byte_size == 5000
    return path


def varint(value: int, width: int = 1) -> bytes:
    """Return a number in groups of seven bits, in at least `width` bytes."""
    groups = []
    while value or len(groups) < width:
        groups.append(value & 127)
        value >>= 7
    return bytes([*(group | 128 for group in groups[:-1]), groups[-1]])


def large_value_many_times(path: Path) -> Path:
    return write(path, repeated(bytes(1 << 20), 500))


def picture_many_times(path: Path) -> Path:
    return write(path, repeated(png(np.full((4000, 4000, 3), (255, 0, 0), np.uint8)), 500))


def endless_rows(path: Path) -> Path:
    return write(path, repeated(b"", 5_000_000))


def pictures(path: Path) -> Path:
    (path / "train/red").mkdir(parents=True)
    content = png(np.full((4000, 4000, 3), (255, 0, 0), np.uint8))
    for number in range(5):
        (path / f"train/red/{number}.png").write_bytes(content)
    return path


def picture(side: int) -> Callable[[Path], Path]:
    """A hundred bytes whose header says that they are a picture of `side` x `side` pixels."""

    def make(path: Path) -> Path:
        head = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
        chunks = (head, b"IDAT" + zlib.compress(b""), b"IEND")
        (path / "train/red").mkdir(parents=True)
        (path / "train/red/1.png").write_bytes(
            b"\x89PNG\r\n\x1a\n"
            + b"".join(
                struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
                for chunk in chunks
            )
        )
        return path

    return make


def zeros(path: Path, head: bytes) -> Path:
    """Write a gzip of `head` and gigabytes of zeros, made of one packed million repeated."""
    million = gzip.compress(bytes(1_000_000))
    path.write_bytes(gzip.compress(head) + million * (GIGABYTES // 1_000_000 + 1))
    return path


def tar_of(kind: bytes) -> Callable[[Path], Path]:
    """A tar whose first member, a file or the name of one, is gigabytes of zeros."""

    def make(path: Path) -> Path:
        member = tarfile.TarInfo("set/train")
        member.type, member.size = kind, GIGABYTES
        return zeros(path, member.tobuf(tarfile.GNU_FORMAT))

    return make


def idx(path: Path) -> Path:
    return zeros(path, bytes((0, 0, 8, 1)) + struct.pack(">I", GIGABYTES))


HOSTILE: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "a packed value": ("parquet", packed_value, "unpacks"),
    "a packed value under a lying footer": ("parquet", lying_footer, "unpacks"),
    "a large value many times": ("parquet", large_value_many_times, "no usable image"),
    "a picture many times": ("parquet", picture_many_times, "these are no real images"),
    "rows without end": ("parquet", endless_rows, "unpacks"),
    "pictures of one colour": ("image_folder", pictures, "these are no real images"),
    "a large picture": ("image_folder", picture(9000), "has 9000 x 9000 pixels, over the limit"),
    "a huge picture": ("image_folder", picture(2**31 - 1), "cannot be decoded"),
    "a tar of nothing": ("tar", tar_of(tarfile.REGTYPE), "unpacks to more than"),
    "a tar of a name": ("tar", tar_of(tarfile.GNUTYPE_LONGNAME), "a name of 1500000000 bytes"),
    "a tar of a comment": ("tar", tar_of(tarfile.XHDTYPE), "a name of 1500000000 bytes"),
    "an IDX file of nothing": ("idx", idx, "over the limit"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """The outcome of each file in one process, the seconds it took, the growth of its memory."""
    folder = tmp_path_factory.mktemp("hostile")
    requests = "".join(
        json.dumps([name, kind, str(make(folder / name))]) + "\n"
        for name, (kind, make, _) in HOSTILE.items()
    )
    command = [sys.executable, "-c", READ]
    done = subprocess.run(
        command, input=requests, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bomb_is_refused_soon_and_in_little_memory(name: str, outcomes: dict[str, list]) -> None:
    outcome, seconds, grown = outcomes[name]
    assert HOSTILE[name][2] in outcome
    assert seconds < 2 and grown < 200e6
