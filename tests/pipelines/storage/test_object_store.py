"""The store: pushed files come back byte for byte, are uploaded once, and appear whole."""

import http.client
import itertools
import json
import os
import pickle
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cluster import local_cluster
from pydantic import ValidationError

from components.data.shards import DataError
from pipelines.storage import object_store as stores
from pipelines.storage.object_store import File, Listing, Store, StoreError


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """An S3 endpoint with one bucket; the environment of its clients."""
    pytest.importorskip("moto.server")
    with local_cluster.object_store() as environment:
        yield environment


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store of either kind, empty."""
    if request.param == "file":
        return Store(f"file://{tmp_path}/store")
    for name, value in request.getfixturevalue("s3").items():
        monkeypatch.setenv(name, value)
    return Store(f"s3://{local_cluster.BUCKET}/{tmp_path.name}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a folder in it, two equal files and an empty one."""
    made = tmp_path / "made"
    (made / "inner").mkdir(parents=True)
    (made / "a").write_bytes(b"same")
    (made / "inner/b").write_bytes(b"same")
    (made / "inner/c").write_bytes(os.urandom(6 << 20))
    (made / "empty").write_bytes(b"")
    return made


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_folder_comes_back_byte_for_byte(store: Store, folder: Path, tmp_path: Path) -> None:
    listing = store.push(folder)
    there = pickle.loads(pickle.dumps(store))
    again = Listing.model_validate_json(listing.model_dump_json())
    (tmp_path / "back").mkdir()
    (tmp_path / "back/old").write_text("is replaced")
    there.pull(again, tmp_path / "back")
    assert content(tmp_path / "back") == content(folder)


def test_a_file_comes_back_byte_for_byte(store: Store, folder: Path, tmp_path: Path) -> None:
    store.pull(store.push(folder / "a"), tmp_path / "deep/file")
    assert (tmp_path / "deep/file").read_bytes() == b"same"


def test_stored_bytes_are_not_uploaded_again(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    upload = Store._upload
    monkeypatch.setattr(
        Store, "_upload", lambda self, name, file: (sent.append(name), upload(self, name, file))
    )
    store.push(folder)
    assert len(sent) == 3  # Four files, two of them equal.
    store.push(folder)
    assert len(sent) == 3
    (folder / "new").write_text("new")
    store.push(folder)
    assert len(sent) == 4


def test_a_node_downloads_a_file_once(
    store: Store, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = store.push(folder)
    fetch = Store._fetch

    def slow(self: Store, one: File, target: Path) -> None:
        fetch(self, one, target)
        # So that the two equal ones are on their way at once.
        time.sleep(0.2)

    monkeypatch.setattr(Store, "_fetch", slow)
    store.pull(listing, tmp_path / "first", tmp_path / "cache")
    assert content(tmp_path / "first") == content(folder)

    def never(*_: object) -> None:
        raise AssertionError("fetched again")

    monkeypatch.setattr(Store, "_fetch", never)
    store.pull(listing, tmp_path / "second", tmp_path / "cache")
    assert content(tmp_path / "second") == content(folder)


def test_altered_bytes_are_refused_and_replace_nothing(folder: Path, tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/store")
    listing = store.push(folder)
    digest = next(file.sha256 for file in listing.files if file.path == "a")
    (tmp_path / "store/cas" / digest[:2] / digest).write_bytes(b"sane")
    (tmp_path / "back").mkdir()
    (tmp_path / "back/old").write_text("stays")
    with pytest.raises(DataError, match="holds other bytes than its name says"):
        store.pull(listing, tmp_path / "back")
    assert content(tmp_path / "back") == {"old": b"stays"}
    assert [path.name for path in tmp_path.glob(".back*")] == []


def test_a_truncated_upload_is_uploaded_again(folder: Path, tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/store")
    listing = store.push(folder / "inner/c")
    digest = listing.files[0].sha256
    blob = tmp_path / "store/cas" / digest[:2] / digest
    blob.write_bytes(blob.read_bytes()[:1000])
    store.push(folder / "inner/c")
    store.pull(listing, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (folder / "inner/c").read_bytes()


def test_missing_bytes_are_named(store: Store, tmp_path: Path) -> None:
    unknown = {"files": [{"path": "", "size": 1, "sha256": "0" * 64}]}
    with pytest.raises(DataError, match="no longer holds"):
        store.pull(Listing.model_validate_json(json.dumps(unknown)), tmp_path / "x")
    with pytest.raises(DataError, match="is missing"):
        store.push(tmp_path / "nothing")


@pytest.mark.parametrize("path", ["../out", "/etc/passwd", "a/../../b"])
def test_a_listing_cannot_lead_out_of_its_folder(path: str) -> None:
    with pytest.raises(ValidationError, match="leads out"):
        Listing.model_validate_json(
            json.dumps({"files": [{"path": path, "size": 1, "sha256": "0" * 64}]})
        )


def test_named_objects_are_replaced_listed_and_dropped(store: Store) -> None:
    assert store.read("jobs/a/spec.json") is None and store.names("jobs") == []
    store.write("jobs/a/spec.json", b"1")
    store.write("jobs/a/spec.json", b"2")
    store.write("jobs/b", b"3")
    assert store.read("jobs/a/spec.json") == b"2"
    assert store.names("jobs") == ["jobs/a/spec.json", "jobs/b"]
    assert store.names("jobs/a") == ["jobs/a/spec.json"]
    store.drop("jobs/b")
    store.drop("jobs/b")
    assert store.names("jobs") == ["jobs/a/spec.json"]


@pytest.mark.parametrize(
    "uri",
    ["data", "nosuch://x/y", "file://relative/path", "s3://key:secret@b/x", "s3://b/x?region=y"],
)
def test_a_uri_that_names_no_store_is_refused_without_its_key(uri: str) -> None:
    with pytest.raises(ValueError, match="LIMPID_STORAGE"):
        Store(uri).read("x")
    with pytest.raises(ValueError, match=r"^((?!secret).)*$"):
        Store(uri).read("x")


class FailingEndpoint(BaseHTTPRequestHandler):
    """An endpoint that answers `code` to the first `times` requests, then 404."""

    code, times, requests = 500, 0, 0

    def _answer(self) -> None:
        type(self).requests += 1
        failing = self.requests <= self.times
        self.send_response(self.code if failing else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = _answer

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FailingEndpoint]]:
    """Such an endpoint, as that of the store."""
    handler = type("Handler", (FailingEndpoint,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in local_cluster.KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(stores, "BACKOFF_S", (0.1,))
    yield handler
    server.shutdown()


def test_an_endpoint_that_fails_for_a_while_is_retried(failing: type[FailingEndpoint]) -> None:
    failing.times = 35
    assert Store("s3://b/p").read("x") is None
    assert failing.requests > failing.times


def test_an_endpoint_that_keeps_failing_ends_in_a_sentence(failing: type[FailingEndpoint]) -> None:
    failing.times = 10**6
    with pytest.raises(StoreError, match=r"the store s3://b/p does not answer: .*500"):
        Store("s3://b/p").read("x")


def test_a_refusal_is_not_retried(failing: type[FailingEndpoint]) -> None:
    failing.code, failing.times = 403, 10**6
    with pytest.raises(StoreError, match="ACCESS_DENIED"):
        Store("s3://b/p").read("x")
    assert failing.requests == 1


# Headers of one connection, which a proxy does not pass on.
HOP = ("content-length", "transfer-encoding", "connection", "expect")


class Flaky(BaseHTTPRequestHandler):
    """A proxy of an S3 endpoint: 500 to every third request, and one answer that is cut short."""

    protocol_version = "HTTP/1.1"
    endpoint: str
    numbers: Iterator[int]
    cut: threading.Event

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _pass(self) -> None:
        body = self._body()
        if next(self.numbers) % 3 == 0:
            self.send_response(500)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        connection = http.client.HTTPConnection(self.endpoint, timeout=30)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in HOP}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        self.send_response(answer.status)
        size = answer.headers.get("Content-Length", str(len(content)))
        for name, value in answer.headers.items():
            if name.lower() not in HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", size)
        self.end_headers()
        if self.command == "GET" and len(content) > 1 << 20 and not self.cut.is_set():
            self.cut.set()
            content, self.close_connection = content[: len(content) // 2], True
        self.wfile.write(content)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_a_folder_comes_back_over_a_failing_connection(
    s3: dict[str, str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = s3["AWS_ENDPOINT_URL"].removeprefix("http://")
    own = {"endpoint": endpoint, "numbers": itertools.count(), "cut": threading.Event()}
    handler = type("Handler", (Flaky,), own)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(stores, "BACKOFF_S", (0.1,))
    store = Store(f"s3://{local_cluster.BUCKET}/{tmp_path.name}")
    listing = store.push(folder)
    store.pull(listing, tmp_path / "back")
    assert content(tmp_path / "back") == content(folder)
    assert own["cut"].is_set()
    server.shutdown()
