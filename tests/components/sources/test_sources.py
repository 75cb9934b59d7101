"""Every source fulfils the contract; archives arrive complete or not at all."""

import gzip
import hashlib
import io
import os
import struct
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import TypeAdapter
from toys import png, random_bytes, same_images

from components.data import image_set
from components.data.shards import DataError
from components.plugins import members
from components.sources import DataConfig, prepare
from components.sources.downloads import Archive, fetch
from components.sources.raw import SourceConfig, silent

COMMON = {"val": 20, "test": 0, "train_limit": None, "test_limit": None, "max_reject_fraction": 0.0}


class Host(ThreadingHTTPServer):
    """A host on loopback; the first folder of a url names the manner in which it serves `files`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str | None]] = []

    def url(self, manner: str, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{manner}/{name}"

    def archive(self, name: str, content: bytes, *manners: str) -> Archive:
        """Publish a file and return its entry."""
        self.files[name] = content
        urls = tuple(self.url(manner, name) for manner in manners or ("good",))
        md5 = hashlib.md5(content).hexdigest()
        return Archive(name, urls, md5, len(content), schemes=("http",))


class Handler(BaseHTTPRequestHandler):
    server: Host

    def log_message(self, *ignored: object) -> None:
        pass

    def do_GET(self) -> None:
        manner, name = self.path.strip("/").split("/")
        content, wanted = self.server.files[name], self.headers.get("Range")
        again = manner in (seen for seen, _ in self.server.requests)
        self.server.requests.append((manner, wanted))
        start = int(wanted[len("bytes=") : -1]) if wanted and manner != "forgetful" else 0
        span = f"bytes {start}-{len(content) - 1}/{len(content)}"
        headers = {"Content-Range": span} if start else {}
        status, body = 206 if start else 200, content[start:]
        match manner:
            case "missing":
                self.send_error(404)
            case "redirect":
                self.respond(302, b"", {"Location": self.server.url("good", name)})
            case "leave":
                self.respond(302, b"", {"Location": "ftp://127.0.0.1/" + name})
            case "html":
                self.respond(200, b"<html>Please sign in</html>", {"Content-Type": "text/html"})
            case "altered":
                self.respond(status, body[:-1] + bytes([body[-1] ^ 1]), headers)
            case "long":
                self.respond(200, content + b"more", {"Content-Length": ""})
            case "shifted" if start:
                self.respond(206, content, {"Content-Range": span.replace(str(start), "0", 1)})
            case "cut" | "forgetful" | "shifted" if not again:
                self.respond(status, body, headers, sent=len(content) // 2)
            case _:
                self.respond(status, body, headers)

    def respond(
        self, status: int, body: bytes, headers: dict[str, str], sent: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:sent])


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def idx(array: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(header + array.tobytes())


def idx_archives(host: Host) -> tuple[Archive, ...]:
    """Publish 100 + 30 images in the format of MNIST."""
    return tuple(
        host.archive(f"{split}-{part}.gz", idx(array))
        for seed, (split, count) in enumerate((("train", 100), ("t10k", 30)))
        for part, array in (
            ("images", random_bytes(count, (28, 28), seed)),
            ("labels", (np.arange(count) % 10).astype(np.uint8)),
        )
    )


def python2_batch(images: np.ndarray, key: str, labels: list[int]) -> bytes:
    """Pickle a batch, opcode by opcode, as Python 2 and its numpy did: strings are bytes."""

    def text(value: str) -> bytes:
        return b"U" + bytes([len(value)]) + value.encode()

    shape = b"".join(b"J" + struct.pack("<i", side) for side in images.shape)
    dtype = b"cnumpy\ndtype\n" + text("u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + text("|") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text("b")
    array += b"\x87R(K\x01" + shape + b"\x86" + dtype + b"\x89T"
    array += struct.pack("<i", images.nbytes) + images.tobytes() + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text("data") + array + text(key) + numbers + b"u."


def python2_names(key: str, names: list[str]) -> bytes:
    texts = b"".join(b"U" + bytes([len(name)]) + name.encode() for name in names)
    return b"\x80\x02}U" + bytes([len(key)]) + key.encode() + b"](" + texts + b"es."


def cifar_archives(host: Host, cls: Any, classes: int) -> tuple[Archive, ...]:
    """Publish a tar in the format of CIFAR with three images per class and batch."""
    labels = list(range(classes)) * 3
    members = {
        name: python2_batch(random_bytes(len(labels), (3072,), seed), cls.label_key, labels)
        for seed, name in enumerate((*cls.train, cls.held_out))
    }
    members[cls.meta] = python2_names(cls.names_key, [f"thing {i}" for i in range(classes)])
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return (host.archive("cifar.tar.gz", buffer.getvalue()),)


def parquet_folder(folder: Path) -> Path:
    folder.mkdir()
    for seed, (split, count) in enumerate((("train", 60), ("test", 24))):
        files = [png(image) for image in random_bytes(count, (6, 5, 3), seed)]
        images = [{"bytes": file, "path": f"{i}.png"} for i, file in enumerate(files)]
        table = pa.table({"image": images, "label": [i % 3 for i in range(count)]})
        table = table.replace_schema_metadata({"label_names": "a,b,c"})
        pq.write_table(table, folder / f"{split}.parquet")
    return folder


def image_folder(folder: Path) -> Path:
    for seed, (split, count) in enumerate((("train", 20), ("test", 8))):
        for number, name in enumerate(("cat", "dog", "eel")):
            (folder / split / name).mkdir(parents=True)
            for i, image in enumerate(random_bytes(count, (6, 5, 3), 3 * seed + number)):
                (folder / split / name / f"{i}.png").write_bytes(png(image))
    return folder


def small_source(
    kind: str, folder: Path, host: Host, monkeypatch: pytest.MonkeyPatch
) -> SourceConfig:
    """Return the config of a small source of this kind, in the format of the real one."""
    facts: dict[str, Any] = {"kind": kind, **COMMON}
    if kind == "digits":
        facts["test"] = 300
    elif kind in ("parquet", "image_folder"):
        build = parquet_folder if kind == "parquet" else image_folder
        facts |= {"path": str(build(folder / "source")), "channels": 3, "size": None}
    else:
        cls: Any = members(DataConfig)[kind]
        facts["mirror"] = None
        classes = {"cifar10": 10, "cifar100": 100}.get(kind)
        made = cifar_archives(host, cls, classes) if classes else idx_archives(host)
        monkeypatch.setattr(cls, "archives", made)
    config: SourceConfig = TypeAdapter(DataConfig).validate_python(facts)
    return config


@pytest.mark.parametrize("kind", members(DataConfig))
def test_every_source_fulfils_the_contract(
    kind: str, tmp_path: Path, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_source(kind, tmp_path, host, monkeypatch)
    prepared = prepare(config, 0, tmp_path / "scratch")
    splits = (prepared.train, prepared.val, prepared.test)
    ids = torch.cat([split.ids for split in splits])
    raw = config.load(tmp_path / "scratch")
    held_out = raw.test.seen if raw.test else 0
    assert sorted(ids.tolist()) == list(range(raw.train.seen + held_out))
    assert len(prepared.val) == 20 and len(prepared.test) == (held_out or config.test)
    source = np.concatenate([split.images for split in (raw.train, raw.test) if split])
    labels = np.concatenate([split.labels for split in (raw.train, raw.test) if split])
    for number, split in enumerate(splits):
        assert split.images.dtype == torch.uint8 and split.shape == source.shape[1:]
        assert np.array_equal(split.images.numpy(), source[split.ids.numpy()])
        assert np.array_equal(split.labels.numpy(), labels[split.ids.numpy()])
        assert split.labels.dtype == split.ids.dtype == torch.int64
        image_set.write(tmp_path / str(number), split, 64)
        assert torch.equal(image_set.read(tmp_path / str(number)).images, split.images)
    assert len(set(raw.class_names)) == len(set(prepared.train.labels.tolist()))
    assert prepared.rejects == ()
    again = prepare(config, 0, tmp_path / "scratch")
    assert all(map(same_images, splits, (again.train, again.val, again.test)))
    assert not same_images(prepared.val, prepare(config, 1, tmp_path / "scratch").val)


@pytest.mark.parametrize("kind", ["mnist", "cifar10"])
def test_a_mirror_needs_no_network(
    kind: str, tmp_path: Path, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_source(kind, tmp_path, host, monkeypatch)
    online = config.load(tmp_path / "scratch")
    count = len(host.requests)
    mirror = tmp_path / "scratch" / kind
    offline = type(config).model_validate({**config.model_dump(), "mirror": str(mirror)})
    assert np.array_equal(offline.load(tmp_path / "other").train.images, online.train.images)
    assert len(host.requests) == count and not (tmp_path / "other").exists()
    archive = next(iter(mirror.iterdir()))
    archive.write_bytes(archive.read_bytes()[:-1] + b"!")
    with pytest.raises(DataError, match=f"{archive.name} is not the published archive: its md5"):
        offline.load(tmp_path / "other")
    archive.unlink()
    with pytest.raises(DataError, match=f"has no {archive.name}"):
        offline.load(tmp_path / "other")


CONTENT = bytes(range(256)) * 400


@pytest.mark.parametrize(
    "manners",
    [("good",), ("redirect",), ("cut",), ("forgetful",), ("shifted", "good"), ("missing", "good"),
     ("html", "good"), ("altered", "good"), ("cut", "altered", "good"), ("leave", "good")],
)  # fmt: skip
def test_a_download_arrives_complete(host: Host, tmp_path: Path, manners: tuple[str, ...]) -> None:
    archive = host.archive("a.gz", CONTENT, *manners)
    reported: list[tuple[str, int, int]] = []
    path = fetch(archive, tmp_path, lambda *fact: reported.append(fact))
    assert path.read_bytes() == CONTENT and list(tmp_path.iterdir()) == [path]
    assert reported[-1] == ("a.gz", len(CONTENT), len(CONTENT))
    count = len(host.requests)
    assert fetch(archive, tmp_path, silent) == path and len(host.requests) == count


@pytest.mark.parametrize(
    ("manner", "error", "reason"),
    [
        ("altered", DataError, "its md5 is"),
        ("long", DataError, "sends more than"),
        ("missing", ConnectionError, "404"),
        ("html", ConnectionError, "sign-in"),
        ("leave", ConnectionError, "refused to go to ftp"),
    ],
)
def test_a_failed_download_leaves_no_file(
    host: Host, tmp_path: Path, manner: str, error: type[Exception], reason: str
) -> None:
    archive = host.archive("a.gz", CONTENT, manner)
    with pytest.raises(error, match=reason) as caught:
        fetch(archive, tmp_path, silent)
    assert "mirror" in str(caught.value) and archive.urls[0] in str(caught.value)
    assert not (tmp_path / "a.gz").exists()


def test_an_interrupted_download_is_resumed(host: Host, tmp_path: Path) -> None:
    half = len(CONTENT) // 2
    fetch(host.archive("a.gz", CONTENT, "cut"), tmp_path, silent)
    assert host.requests == [("cut", None), ("cut", f"bytes={half}-")]


def test_a_part_left_by_a_killed_process_is_resumed_or_replaced(host: Host, tmp_path: Path) -> None:
    archive = host.archive("a.gz", CONTENT)
    for left in (CONTENT[:1000], CONTENT, b"x" * 1000, CONTENT + b"x", b"x" * len(CONTENT)):
        (tmp_path / "a.gz.part").write_bytes(left)
        path = fetch(archive, tmp_path, silent)
        assert path.read_bytes() == CONTENT
        path.write_bytes(b"damaged")
    assert host.requests[0] == ("good", "bytes=1000-")


def test_plain_http_and_wrong_lengths_are_refused(host: Host, tmp_path: Path) -> None:
    archive = host.archive("a.gz", CONTENT)
    with pytest.raises(ConnectionError, match="only https"):
        fetch(replace(archive, schemes=("https",)), tmp_path, silent)
    with pytest.raises(DataError, match="offers 102400 bytes instead of 5"):
        fetch(replace(archive, bytes=5), tmp_path, silent)
    assert not (tmp_path / "a.gz").exists()


def test_without_a_network_the_error_says_what_to_do(tmp_path: Path) -> None:
    archive = Archive("a.gz", ("http://127.0.0.1:9/a.gz",), "", 5, schemes=("http",))
    with pytest.raises(ConnectionError, match="Without a network, set `mirror`"):
        fetch(archive, tmp_path, silent)


def test_real_mnist_is_read() -> None:
    root = os.environ.get("LIMPID_TEST_DATA")
    if not root:
        pytest.skip("LIMPID_TEST_DATA does not name a folder with data/mnist")
    facts = {"kind": "parquet", "path": f"{root}/data/mnist", "channels": 1, "size": None}
    config = TypeAdapter(DataConfig).validate_python({**facts, **COMMON, "val": 5000})
    made = prepare(config, 0, Path("unused"))
    assert [len(s) for s in (made.train, made.val, made.test)] == [55000, 5000, 10000]
    assert made.train.shape == (1, 28, 28) and made.train.class_names == tuple("0123456789")
    assert made.rejects == () and made.train.pixels().mean() == pytest.approx(0.1307, abs=1e-3)
