"""Read IDX files, tars and pickles that may be hostile: in memory, within limits of size.

Nothing is extracted to disk. Pickles are read by an unpickler that allows arrays and plain values
only.
"""

import gzip
import io
import math
import pickle
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from components.data.shards import DataError

# The largest archive read here unpacks to 187 MB; what claims more than this is no such archive.
MAX_UNPACKED = 200_000_000
# Extended headers of a tar, such as long names: Python reads them whole, however long they are.
NAMES = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip
MAX_NAME = 1 << 16

Bytes = npt.NDArray[np.uint8]


def read_idx(path: Path, rank: int) -> Bytes:
    """Return a gzipped IDX file of unsigned bytes as an array of `rank` axes."""
    try:
        with gzip.open(path) as file:
            header = file.read(4 + 4 * rank)
            if header[:4] != bytes((0, 0, 8, rank)) or len(header) < 4 + 4 * rank:
                raise DataError(f"{path} is not an IDX file of bytes with {rank} axes")
            shape = np.frombuffer(header, ">u4", offset=4).tolist()
            size = math.prod(shape)
            if size > MAX_UNPACKED:
                raise DataError(f"{path} claims {size} bytes, over the limit of {MAX_UNPACKED}")
            content = bytearray(file.read(size + 1))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked: {error}") from None
    if len(content) != size:
        raise DataError(f"{path} does not hold the {size} bytes that its header announces")
    return np.frombuffer(content, np.uint8).reshape(shape)


def read_tar(path: Path, wanted: Sequence[str]) -> dict[str, bytes]:
    """Return the wanted members of a gzipped tar, in memory.

    Raises DataError if the archive is damaged, lacks a member, unpacks to too much, or has members
    that no data set needs: links, devices, absolute paths, paths through `..`.
    """
    members: dict[str, bytes] = {}
    total = 0
    try:
        with tarfile.open(path, "r:gz", tarinfo=_Member) as tar:
            for member in tar:
                if not _is_safe(member):
                    raise DataError(f"{path} has the member {member.name}, which is not safe")
                total += member.size
                if total > MAX_UNPACKED:
                    raise DataError(f"{path} unpacks to more than {MAX_UNPACKED} bytes")
                file = tar.extractfile(member) if member.name in wanted else None
                if file is not None:
                    members[member.name] = file.read()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{path} cannot be unpacked: {error}") from None
    missing = sorted(set(wanted) - set(members))
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}")
    return members


class _Member(tarfile.TarInfo):
    """A member of a tar; one with a name longer than any real file has is not read."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in NAMES and self.size > MAX_NAME:
            raise tarfile.ReadError(f"a member has a name of {self.size} bytes")
        found: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]
        return found


def _is_safe(member: tarfile.TarInfo) -> bool:
    path = PurePosixPath(member.name)
    plain = member.isfile() or member.isdir()
    return plain and not path.is_absolute() and ".." not in path.parts


def _empty_array(*ignored: object) -> Bytes:
    """Stand in for numpy's `_reconstruct`, whose arguments could ask for any amount of memory."""
    return np.empty(0, np.uint8)


class _ArrayUnpickler(pickle.Unpickler):
    """Knows the three names that a pickled array refers to, and refuses every other."""

    allowed: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): _empty_array,
        ("numpy._core.multiarray", "_reconstruct"): _empty_array,
        ("numpy", "ndarray"): "ndarray",
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed name; raise UnpicklingError for any other."""
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed")
        return self.allowed[module, name]


def unpickle(content: bytes, where: str) -> dict[Any, Any]:
    """Return a pickled dict of lists, numbers, text and arrays; raise DataError for all else.

    `where` names the file in the error.
    """
    try:
        value = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    # A damaged pickle may raise nearly any exception; the cause is always the file.
    except Exception as error:
        raise DataError(f"{where} cannot be read as plain data: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{where} holds a {type(value).__name__} instead of a dict")
    return value
