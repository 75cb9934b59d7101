"""Fetch published archives over https; resumed, and not in place before the checksum agrees."""

import hashlib
import os
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

from components.data.shards import DataError
from components.sources.raw import Progress

ROUNDS = 3
TIMEOUT_S = 30.0
CHUNK = 1 << 20


@dataclass(frozen=True)
class Archive:
    """A published file: its name, the hosts that have it, its md5 and its length in bytes.

    `schemes` are those that a url and its redirects may have; only tests use http.
    """

    name: str
    urls: tuple[str, ...]
    md5: str
    bytes: int
    schemes: tuple[str, ...] = ("https",)


def fetch(archive: Archive, folder: Path, progress: Progress) -> Path:
    """Return the path of the archive in `folder`; download it unless it is there and complete.

    All hosts are tried in turn, `ROUNDS` times; one that sent wrong bytes is not tried again. An
    interrupted transfer stays in `<name>.part` and is resumed. Raises DataError if a host sent
    wrong bytes and none the right ones, ConnectionError if no host could be reached.
    """
    final = folder / archive.name
    if final.exists() and mismatch(archive, final) is None:
        return final
    folder.mkdir(parents=True, exist_ok=True)
    part = final.with_name(final.name + ".part")
    failures: dict[str, Exception] = {}
    for url in archive.urls * ROUNDS:
        if isinstance(failures.get(url), DataError):
            continue
        try:
            _download(archive, url, part, progress)
        except (OSError, HTTPException, DataError) as error:
            failures[url] = error
        else:
            os.replace(part, final)
            return final
    kind = DataError if any(isinstance(e, DataError) for e in failures.values()) else None
    reasons = "; ".join(f"{url}: {error}" for url, error in failures.items())
    raise (kind or ConnectionError)(
        f"{archive.name} could not be downloaded ({reasons}). Without a network, set `mirror` to "
        f"a folder that holds it."
    )


def local(archive: Archive, mirror: Path) -> Path:
    """Return the path of an archive in the user's folder `mirror`, after verifying it."""
    path = mirror / archive.name
    if not path.is_file():
        raise DataError(f"the mirror {mirror} has no {archive.name}; get it from {archive.urls[0]}")
    wrong = mismatch(archive, path)
    if wrong:
        raise DataError(f"{path} is not the published archive: {wrong}")
    return path


def mismatch(archive: Archive, path: Path) -> str | None:
    """Return how a file differs from the published archive, or None if it does not."""
    size = path.stat().st_size
    if size != archive.bytes:
        return f"it has {size} bytes instead of {archive.bytes}"
    with path.open("rb") as file:
        # The publishers give md5. It finds damage; https makes sure of the host.
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    return None if found == archive.md5 else f"its md5 is {found} instead of {archive.md5}"


def _download(archive: Archive, url: str, part: Path, progress: Progress) -> None:
    """Complete `part` from one host and verify it; a file of wrong bytes is removed."""
    if part.exists() and part.stat().st_size > archive.bytes:
        part.unlink()
    start = part.stat().st_size if part.exists() else 0
    if start < archive.bytes:
        with _request(archive, url, start) as response:
            start = start if _continues(response, start, archive) else 0
            with part.open("ab" if start else "wb") as file:
                _copy(archive, response, file, start, progress)
                file.flush()
                os.fsync(file.fileno())
    wrong = mismatch(archive, part)
    if wrong:
        part.unlink()
        # The wrong bytes may be from another host: then this one is tried again from the start.
        raise ConnectionError(f"resumed, but {wrong}") if start else DataError(wrong)


def _request(archive: Archive, url: str, start: int) -> HTTPResponse:
    """Open a url from byte `start` on; redirects are followed to allowed schemes only."""
    _check_scheme(url, archive)
    headers = {"User-Agent": "limpid"} | ({"Range": f"bytes={start}-"} if start else {})
    opener = urllib.request.build_opener(_Redirects(archive))
    response: HTTPResponse = opener.open(
        urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S
    )
    return response


def _continues(response: HTTPResponse, start: int, archive: Archive) -> bool:
    """Return whether the response resumes at byte `start`; raise if it is not the archive."""
    kind = response.headers.get_content_type()
    if kind == "text/html":
        raise ConnectionError("the answer is a web page; does this network ask for a sign-in?")
    resumed = response.status == 206
    if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        raise ConnectionError(f"asked for bytes from {start}, but it sent others")
    length = response.headers.get("Content-Length")
    expected = archive.bytes - (start if resumed else 0)
    if length is not None and length != str(expected):
        raise DataError(f"it offers {length} bytes instead of {expected}")
    return resumed


def _copy(
    archive: Archive, response: HTTPResponse, file: Any, done: int, progress: Progress
) -> None:
    """Write the response to `file`; raise ConnectionError if it ends too early."""
    while done < archive.bytes:
        chunk = response.read1(min(CHUNK, archive.bytes - done))
        if not chunk:
            raise ConnectionError(f"the connection ended after {done} of {archive.bytes} bytes")
        file.write(chunk)
        done += len(chunk)
        progress(archive.name, done, archive.bytes)
    if response.read(1):
        raise DataError(f"it sends more than the {archive.bytes} bytes that were published")


def _check_scheme(url: str, archive: Archive) -> None:
    if urllib.parse.urlsplit(url).scheme not in archive.schemes:
        raise ConnectionError(f"refused to go to {url}: only {', '.join(archive.schemes)}")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to allowed schemes only, so that no redirect leaves https."""

    def __init__(self, archive: Archive) -> None:
        self.archive = archive

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        _check_scheme(newurl, self.archive)
        return super().redirect_request(req, fp, code, msg, headers, newurl)
