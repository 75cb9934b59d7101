"""Archives are read in memory; unsafe members and pickles of more than plain data are refused."""

import gzip
import io
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from toys import Evil

from components.data.shards import DataError
from components.sources import formats
from components.sources.formats import read_idx, read_tar, unpickle


def write_idx(path: Path, header: bytes, content: bytes) -> Path:
    path.write_bytes(gzip.compress(header + content))
    return path


def test_an_idx_file_is_read(tmp_path: Path) -> None:
    header = bytes((0, 0, 8, 3)) + struct.pack(">3I", 2, 3, 4)
    array = read_idx(write_idx(tmp_path / "a.gz", header, bytes(range(24))), 3)
    assert np.array_equal(array, np.arange(24).reshape(2, 3, 4)) and array.dtype == np.uint8


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        (bytes((0, 0, 13, 1)) + struct.pack(">I", 4), 4, "not an IDX file"),
        (bytes((0, 0, 8, 2)) + struct.pack(">2I", 2, 2), 4, "not an IDX file"),
        (b"\0\0", 0, "not an IDX file"),
        (bytes((0, 0, 8, 1)) + struct.pack(">I", 4), 3, "does not hold the 4 bytes"),
        (bytes((0, 0, 8, 1)) + struct.pack(">I", 4), 5, "does not hold the 4 bytes"),
        (bytes((0, 0, 8, 1)) + struct.pack(">I", 2**32 - 1), 5, "over the limit"),
    ],
)
def test_a_wrong_idx_file_is_refused(
    tmp_path: Path, header: bytes, size: int, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_idx(write_idx(tmp_path / "a.gz", header, bytes(size)), 1)


def test_a_damaged_gzip_is_refused(tmp_path: Path) -> None:
    header = bytes((0, 0, 8, 1)) + struct.pack(">I", 4)
    path = write_idx(tmp_path / "a.gz", header, bytes(4))
    for content in (b"", b"text", path.read_bytes()[:-6], path.read_bytes()[:15] + b"\xff" * 20):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.gz"):
            read_idx(path, 1)


def write_tar(path: Path, *members: tuple[str, bytes, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, len(content), "/etc/passwd"
            tar.addfile(member, io.BytesIO(content))
    return path


GOOD = ("set/train", tarfile.REGTYPE, b"content")


def test_only_wanted_members_are_read(tmp_path: Path) -> None:
    other = ("set/readme", tarfile.REGTYPE, b"text")
    folder = ("set", tarfile.DIRTYPE, b"")
    path = write_tar(tmp_path / "a.tar.gz", folder, GOOD, other)
    assert read_tar(path, ["set/train"]) == {"set/train": b"content"}
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(DataError, match="lacks set/test"):
        read_tar(path, ["set/train", "set/test"])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../escape", tarfile.REGTYPE),
        ("set/../../escape", tarfile.REGTYPE),
        ("/absolute", tarfile.REGTYPE),
        ("link", tarfile.SYMTYPE),
        ("set/train", tarfile.LNKTYPE),
        ("device", tarfile.CHRTYPE),
        ("pipe", tarfile.FIFOTYPE),
    ],
)
def test_unsafe_members_are_refused(tmp_path: Path, name: str, kind: bytes) -> None:
    path = write_tar(tmp_path / "a.tar.gz", GOOD, (name, kind, b""))
    with pytest.raises(DataError, match=f"member {name}, which is not safe"):
        read_tar(path, ["set/train"])


def test_a_tar_that_unpacks_to_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tar(tmp_path / "a.tar.gz", GOOD, ("zeros", tarfile.REGTYPE, bytes(10_000)))
    monkeypatch.setattr(formats, "MAX_UNPACKED", 10_000)
    with pytest.raises(DataError, match="unpacks to more than 10000 bytes"):
        read_tar(path, ["set/train"])


def test_a_truncated_tar_is_refused(tmp_path: Path) -> None:
    random = np.random.default_rng(0).bytes(50_000)
    path = write_tar(tmp_path / "a.tar.gz", ("set/train", tarfile.REGTYPE, random))
    path.write_bytes(path.read_bytes()[:30_000])
    with pytest.raises(DataError, match="cannot be unpacked"):
        read_tar(path, ["set/train"])


@pytest.mark.parametrize("protocol", [3, 4])
def test_plain_data_is_unpickled(protocol: int) -> None:
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    content = pickle.dumps({"data": array, "labels": [1, 2], "name": "a"}, protocol)
    value = unpickle(content, "a file")
    assert np.array_equal(value["data"], array)
    assert value["labels"] == [1, 2] and value["name"] == "a"


def test_a_pickle_that_calls_functions_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for evil in (
        Evil(os.system, f"touch {marker}"),
        Evil(eval, f"open({str(marker)!r}, 'w')"),
        Evil(open, str(marker), "w"),
        Evil(np.load, str(marker)),
        Evil(bytearray, 10**12),
        Evil(getattr, "text", "upper"),
    ):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            with pytest.raises(DataError, match="a file cannot be read as plain data: it asks"):
                unpickle(pickle.dumps({"data": evil}, protocol), "a file")
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"text", b"\x80\x02}", pickle.dumps([1])])
def test_content_that_is_no_pickled_dict_is_refused(content: bytes) -> None:
    with pytest.raises(DataError, match="a file"):
        unpickle(content, "a file")
