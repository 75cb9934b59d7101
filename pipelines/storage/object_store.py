"""A content-addressed store over `pyarrow.fs`, which many machines reach.

`cas/<aa>/<sha256>` holds every pushed file once. A `Listing` names the files of which a file or
folder is made. Pulled bytes are verified before they appear. Named objects (`read`, `write`) are
small and may be written again; a reader finds the old or the new one, never half of one.

A store is any URI that `pyarrow.fs` opens: `s3://bucket/limpid`, `gs://...`, `file:///mnt/shared`.
"""

import contextlib
import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
from pydantic import AfterValidator, Field

from components.config import Config
from components.data.shards import DataError, sha256, write_bytes

T = TypeVar("T")
# The pauses between tries when an endpoint answers with an error; pyarrow retries by itself too.
BACKOFF_S = (1.0, 2.0, 4.0, 8.0)
GIVE_UP_S = 60.0
CHUNK, MAX_PARALLEL = 1 << 22, 8
# A wrong name, a missing permission, an unknown bucket: another try gets the same answer.
FINAL = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY", "SIGNATURE", "HTTP status: 403")


def inside(path: str) -> str:
    """Return the relative path as it is; ValueError for one that leads out of its folder."""
    parts = PurePosixPath(path).parts
    if path.startswith("/") or ".." in parts:
        raise ValueError(f"{path!r} leads out of its folder")
    return path


class File(Config):
    """One file of a listing: its path below the root ("" for a file alone), and its bytes."""

    path: Annotated[str, AfterValidator(inside)]
    size: int
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Listing(Config):
    """The files of which a file or folder is made."""

    files: tuple[File, ...]


class StoreError(OSError):
    """The store cannot be reached, or refuses: the same command may succeed later."""


class Store:
    """A store by its URI; its client is opened where it is used, so that a store can be pickled."""

    def __init__(self, uri: str) -> None:
        """Raise ValueError for a URI that cannot name a store."""
        self.uri = uri.rstrip("/")
        self._abandoned = threading.Event()
        if "@" in urlsplit(self.uri).netloc:
            raise ValueError(
                "LIMPID_STORAGE holds a key, which everybody who may list jobs could read; give "
                "the nodes a role, or their keys in their own environment"
            )
        if "://" not in self.uri or "?" in self.uri:
            raise ValueError(
                f"LIMPID_STORAGE is {uri!r}; a URI without options is needed, as "
                "s3://bucket/limpid (AWS_ENDPOINT_URL names another endpoint)"
            )

    def __reduce__(self) -> tuple[type["Store"], tuple[str]]:
        return Store, (self.uri,)

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        try:
            files, root = pafs.FileSystem.from_uri(self.uri)
        except (pa.ArrowInvalid, ValueError) as error:
            raise ValueError(f"LIMPID_STORAGE is {self.uri!r}: {error}") from None
        return files, root

    def push(self, path: Path) -> Listing:
        """Store a file or a folder; only bytes that the store lacks are uploaded."""
        found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        if not found and not path.is_dir():
            raise DataError(f"{path} is missing: the stage that makes it has not run")
        listed = [
            File(
                path="" if file == path else file.relative_to(path).as_posix(),
                size=file.stat().st_size, sha256=sha256(file),
            )
            for file in found
        ]  # fmt: skip
        blobs = {_blob(one.sha256): (one, file) for one, file in zip(listed, found, strict=True)}
        stored = self._sizes(list(blobs))
        new = {n: file for n, (one, file) in blobs.items() if stored.get(n) != one.size}
        with self._in_parallel() as parallel_map:
            list(parallel_map(lambda n: self._retry(partial(self._upload, n, new[n])), new))
        return Listing(files=tuple(listed))

    def pull(self, listing: Listing, path: Path, cache: Path | None = None) -> None:
        """Download the files of a listing to `path`, all of them or none.

        With `cache`, a folder on the same disk, every file is downloaded once and linked into
        place, and must not be written to. Raises DataError for bytes that are not those of the
        listing or are gone, StoreError where the store does not answer.
        """
        part = path.with_name(f".{path.name}.{os.getpid()}.pulled")
        remove(part)
        try:
            if all(one.path for one in listing.files):
                part.mkdir(parents=True)

            def place(one: File) -> None:
                target = part / one.path if one.path else part
                target.parent.mkdir(parents=True, exist_ok=True)
                if cache is None:
                    self._fetch(one, target)
                else:
                    _link(self._cached(one, cache), target)

            with self._in_parallel() as parallel_map:
                list(parallel_map(place, listing.files))
            remove(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            part.replace(path)
        finally:
            remove(part)

    def read(self, name: str) -> bytes | None:
        """Return a named object, or None where there is none."""
        files, root = self._opened

        def get() -> bytes | None:
            try:
                with files.open_input_file(f"{root}/{name}") as stream:
                    content: bytes = stream.read()
                    return content
            except FileNotFoundError:
                return None

        return self._retry(get)

    def write(self, name: str, content: bytes) -> None:
        """Store a named object, in place of the one that has this name."""
        files, root = self._opened
        if isinstance(files, pafs.LocalFileSystem):
            self._retry(lambda: write_bytes(Path(root, name), content))
            return

        def put() -> None:
            # The object appears when the stream is closed, all of it at once.
            with files.open_output_stream(f"{root}/{name}") as stream:
                stream.write(content)

        self._retry(put)

    def names(self, folder: str) -> list[str]:
        """Return the names of all objects below a folder, in order."""
        files, root = self._opened
        chosen = pafs.FileSelector(f"{root}/{folder}", allow_not_found=True, recursive=True)
        found = self._retry(lambda: files.get_file_info(chosen))
        start = len(root) + 1
        whole = [i for i in found if i.type == pafs.FileType.File and not _unfinished(i.base_name)]
        return sorted(info.path[start:] for info in whole)

    def drop(self, name: str) -> None:
        """Forget a named object."""
        files, root = self._opened
        with contextlib.suppress(FileNotFoundError):
            self._retry(lambda: files.delete_file(f"{root}/{name}"))

    def _sizes(self, names: list[str]) -> dict[str, int]:
        """Return the sizes of those objects that the store has."""
        files, root = self._opened
        found = self._retry(lambda: files.get_file_info([f"{root}/{name}" for name in names]))
        pairs = zip(names, found, strict=True)
        return {name: info.size for name, info in pairs if info.type == pafs.FileType.File}

    def _upload(self, name: str, file: Path) -> None:
        files, root = self._opened
        path = f"{root}/{name}"
        if isinstance(files, pafs.LocalFileSystem):
            target = Path(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f".{target.name}.{os.getpid()}.tmp")
            try:
                shutil.copyfile(file, part)
                part.replace(target)
            finally:
                part.unlink(missing_ok=True)
            return
        with file.open("rb") as source, files.open_output_stream(path) as sink:
            self._copy(source, sink)

    def _cached(self, one: File, cache: Path) -> Path:
        kept = cache / one.sha256[:2] / one.sha256
        if not kept.is_file() or kept.stat().st_size != one.size:
            # Two files of a listing may have the same bytes, and are fetched at the same time.
            part = kept.with_name(f".{kept.name}.{os.getpid()}.{threading.get_ident()}")
            part.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._fetch(one, part)
                part.replace(kept)
            finally:
                part.unlink(missing_ok=True)
        os.utime(kept)
        return kept

    def _fetch(self, one: File, target: Path) -> None:
        files, root = self._opened
        path = f"{root}/{_blob(one.sha256)}"

        def get() -> None:
            with files.open_input_stream(path) as source, target.open("wb") as sink:
                self._copy(source, sink)

        try:
            self._retry(get)
        except FileNotFoundError:
            raise DataError(f"{self.uri} no longer holds {one.path or target.name}") from None
        if sha256(target) != one.sha256:
            raise DataError(
                f"{self.uri}/{_blob(one.sha256)} holds other bytes than its name says: delete it, "
                "then run the stage that made it again"
            )

    @contextlib.contextmanager
    def _in_parallel(self) -> Iterator[Callable[..., Any]]:
        """Yield a `map` that makes its calls in a few threads."""
        pool = ThreadPoolExecutor(max_workers=MAX_PARALLEL)
        try:
            yield pool.map
        except BaseException as error:
            # An interruption does not wait for transfers that are on their way.
            if not isinstance(error, Exception):
                self._abandoned.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _copy(self, source: Any, sink: Any) -> None:
        while chunk := source.read(CHUNK):
            if self._abandoned.is_set():
                raise StoreError(f"a transfer with {self.uri} was interrupted")
            sink.write(chunk)

    def _retry(self, action: Callable[[], T]) -> T:
        """Call `action`, again where the endpoint fails; StoreError when it fails for long."""
        began = time.monotonic()
        for pause in (*BACKOFF_S, None):
            try:
                return action()
            except FileNotFoundError:
                raise
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                    raise
                late = time.monotonic() - began > GIVE_UP_S
                final = any(word in str(error) for word in FINAL)
                if pause is None or late or final or self._abandoned.wait(pause):
                    first = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
                    raise StoreError(f"the store {self.uri} does not answer: {first}") from None
        raise AssertionError


def _blob(digest: str) -> str:
    return f"cas/{digest[:2]}/{digest}"


def _unfinished(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # Another disk, or one that has no links.
        shutil.copyfile(source, target)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
