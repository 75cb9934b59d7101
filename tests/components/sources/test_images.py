"""Every kind of image has one conversion; what is no image is rejected with a reason."""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile
from pydantic import ValidationError

from components.data.shards import DataError
from components.sources.folder import ImageFolder
from components.sources.images import Pixels, decode
from components.sources.raw import RawData

COMMON = {"val": 1, "test": 0, "train_limit": None, "test_limit": None, "max_reject_fraction": 0.5}


def encode(image: Image.Image, kind: str = "PNG", **facts: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **facts)
    return buffer.getvalue()


def raw_png(width: int, height: int, depth: int, colour: int, rows: bytes, *more: bytes) -> bytes:
    """Return a PNG written chunk by chunk, for what Pillow does not write."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = (b"IHDR" + head, *more, b"IDAT" + zlib.compress(rows), b"IEND")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in chunks
    )


def decoded(content: bytes, channels: int, size: tuple[int, int] | None = None) -> Pixels:
    pixels = decode(content, channels, size)
    assert not isinstance(pixels, str), pixels
    return pixels


def test_grey_and_colour_are_exact() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    content = encode(Image.fromarray(grey))
    assert np.array_equal(decoded(content, 1), grey[None])
    assert np.array_equal(decoded(content, 3), np.stack([grey] * 3))
    colour = np.random.default_rng(0).integers(256, size=(5, 7, 3), dtype=np.uint8)
    for kind in ("PNG", "BMP"):
        content = encode(Image.fromarray(colour), kind)
        assert np.array_equal(decoded(content, 3), colour.transpose(2, 0, 1))
    content = encode(Image.fromarray(colour), "WEBP", lossless=True)
    assert np.array_equal(decoded(content, 3), colour.transpose(2, 0, 1))
    luma = colour @ np.array([0.299, 0.587, 0.114])
    assert np.abs(decoded(content, 1)[0] - luma).max() <= 1


def first_pixel(content: bytes, channels: int = 3) -> list[int]:
    values: list[int] = decoded(content, channels)[:, 0, 0].tolist()
    return values


def palette(**facts: Any) -> bytes:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    return encode(image, **facts)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encode(Image.new("1", (2, 2), 1)), [255, 255, 255]),
        (encode(Image.new("1", (2, 2), 0)), [0, 0, 0]),
        (palette(), [10, 20, 30]),
        (palette(transparency=0), [10, 20, 30]),
        (palette(transparency=1), [255, 255, 255]),
        (encode(Image.new("RGBA", (2, 2), (10, 20, 30, 255))), [10, 20, 30]),
        (encode(Image.new("RGBA", (2, 2), (10, 20, 30, 0))), [255, 255, 255]),
        (encode(Image.new("RGBA", (2, 2), (0, 0, 0, 51))), [204, 204, 204]),
        (encode(Image.new("LA", (2, 2), (7, 255))), [7, 7, 7]),
        (encode(Image.new("LA", (2, 2), (7, 0))), [255, 255, 255]),
        (encode(Image.new("RGB", (2, 2), (1, 2, 3)), transparency=(1, 2, 3)), [255, 255, 255]),
        (encode(Image.new("L", (2, 2), 9), transparency=9), [255, 255, 255]),
        (encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100), [254, 0, 0]),
        (encode(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "JPEG", quality=100), [0, 0, 0]),
    ],
)
def test_every_mode_has_one_conversion(content: bytes, expected: list[int]) -> None:
    assert np.abs(np.array(first_pixel(content)) - expected).max() <= 1


@pytest.mark.parametrize("value", [0, 1, 128, 129, 256, 257, 32896, 65406, 65407, 65535])
def test_sixteen_bits_are_scaled_and_not_clipped(value: int) -> None:
    content = encode(Image.fromarray(np.full((2, 2), value, np.uint16)))
    assert first_pixel(content, 1) == [round(value / 257)]
    rows = b"".join(b"\0" + struct.pack(">H", value) * 2 for _ in range(2))
    keyed = raw_png(2, 2, 16, 0, rows, b"tRNS" + struct.pack(">H", value))
    assert first_pixel(keyed, 1) == [255]
    colour = b"".join(b"\0" + struct.pack(">H", value) * 6 for _ in range(2))
    assert first_pixel(raw_png(2, 2, 16, 2, colour)) == [value >> 8] * 3


def test_the_exif_orientation_is_applied() -> None:
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # The camera was turned: rotate by 90 degrees clockwise to view.
    content = encode(Image.fromarray(upright), "JPEG", exif=exif, quality=100)
    pixels = decoded(content, 1)
    assert pixels.shape == (1, 16, 8)
    assert pixels[0, :7].min() > 240 and pixels[0, 9:].max() < 15


def test_resizing_antialiases_and_keeps_images_of_the_right_size() -> None:
    board = (np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8)
    content = encode(Image.fromarray(board))
    assert np.array_equal(decoded(content, 1, (32, 32)), board[None])
    small = decoded(content, 1, (8, 4))
    assert small.shape == (1, 8, 4)
    # Without antialiasing a chequerboard would become black or white instead of grey.
    assert np.abs(small.astype(int) - 127).max() <= 20
    one = encode(Image.new("L", (1, 1), 77))
    assert np.array_equal(decoded(one, 1, (28, 28)), np.full((1, 28, 28), 77))


JPEG = encode(Image.fromarray(np.arange(4800, dtype=np.uint8).reshape(40, 40, 3)), "JPEG")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not one of PNG, JPEG, WEBP, BMP"),
        (b"plain text", "is not one of"),
        (encode(Image.new("L", (2, 2)), "GIF"), "is not one of"),
        (encode(Image.new("L", (2, 2)), "TIFF"), "is not one of"),
        (raw_png(0, 0, 8, 0, b""), "is not one of"),
        (JPEG[: len(JPEG) // 2], "cannot be decoded"),
        (encode(Image.new("RGB", (50, 50), "red"))[:60], "cannot be decoded"),
        (raw_png(4, 4, 8, 0, b"\0\1"), "cannot be decoded"),
        (raw_png(9000, 9000, 8, 0, b""), "has 9000 x 9000 pixels, over the limit"),
        (raw_png(12000, 12000, 8, 0, b""), "cannot be decoded"),
        (raw_png(2**31 - 1, 2**31 - 1, 8, 0, b""), "cannot be decoded"),
        (bytes(16_000_001), "is 16000001 bytes long"),
    ],
)
def test_content_that_is_no_image_gives_a_reason(content: bytes, reason: str) -> None:
    found = decode(content, 3, (8, 8))
    assert isinstance(found, str) and found.startswith(reason)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_damaged_bytes_never_raise() -> None:
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "BMP"):
        whole = encode(Image.new("RGB", (9, 9), (10, 200, 30)), kind)
        for _ in range(100):
            content = bytearray(whole)
            for position in rng.integers(len(content), size=3):
                content[position] = rng.integers(256)
            pixels = decode(bytes(content), 3, (9, 9))
            assert isinstance(pixels, str) or pixels.shape == (3, 9, 9)


def save(path: Path, size: tuple[int, int] = (4, 3), kind: str = "PNG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(Image.new("RGB", size, "red"), kind))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("train/cat/1.png", "train/cat/2.PNG", "train/dog/1.png", "test/dog/1.png"):
        save(tmp_path / name)
    return tmp_path


def load_folder(root: Path, **facts: Any) -> RawData:
    facts = {"path": str(root), "channels": 3, "size": None, **facts}
    return ImageFolder.model_validate({"kind": "image_folder", **COMMON, **facts}).load(root)


def test_a_folder_is_read_in_sorted_order(root: Path) -> None:
    save(root / "train/cat/3.jpeg", kind="JPEG")
    raw = load_folder(root)
    assert raw.class_names == ("cat", "dog") and raw.test is not None
    assert raw.train.labels.tolist() == [0, 0, 0, 1] and raw.train.images.shape == (4, 3, 3, 4)
    assert raw.test.labels.tolist() == [1] and raw.train.rejects == raw.test.rejects == ()
    assert load_folder(root, size=[2, 5], channels=1).train.images.shape == (4, 1, 2, 5)
    for path in sorted((root / "test").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (root / "test").rmdir()
    assert load_folder(root).test is None


def test_entries_that_are_no_images_are_rejected_and_links_are_not_followed(root: Path) -> None:
    cat = root / "train/cat"
    (cat / ".hidden").write_text("x")
    (cat / "text.png").write_text("x")
    (cat / "notes.txt").write_text("x")
    save(cat / "9.gif", kind="GIF")
    save(cat / "other.png", size=(9, 9))
    save(cat / "nested/1.png")
    (cat / "loop").symlink_to(cat)
    (cat / "self.png").symlink_to(cat / "self.png")
    os.mkfifo(cat / "pipe.png")
    (root / "train/stray.png").write_bytes(b"x")
    (root / "train/wolf").symlink_to(root / "train/dog")
    raw = load_folder(root)
    reasons = {reject.file.removeprefix("train/"): reject.reason for reject in raw.train.rejects}
    assert set(reasons) == {
        "cat/text.png", "cat/notes.txt", "cat/9.gif", "cat/other.png", "cat/nested", "cat/loop",
        "cat/self.png", "cat/pipe.png", "stray.png", "wolf",
    }  # fmt: skip
    assert reasons["cat/other.png"] == "is 9 x 9, but the first is 3 x 4"
    assert raw.class_names == ("cat", "dog") and len(raw.train.labels) == 3
    assert raw.train.seen == 13 and len(set(raw.train.rows.tolist())) == 3


def test_folders_that_cannot_be_used_are_refused(root: Path, tmp_path: Path) -> None:
    save(root / "test/wolf/1.png")
    with pytest.raises(DataError, match="has the class wolf, which `train` does not have"):
        load_folder(root)
    (root / "train/wolf").mkdir()
    with pytest.raises(DataError, match="wolf is empty"):
        load_folder(root)
    with pytest.raises(DataError, match="has no folder `train`"):
        load_folder(root / "train")
    (tmp_path / "empty/train").mkdir(parents=True)
    with pytest.raises(DataError, match="train has no usable image: there are none"):
        load_folder(tmp_path / "empty")
    (tmp_path / "bad/train/cat").mkdir(parents=True)
    (tmp_path / "bad/train/cat/1.png").write_text("x")
    with pytest.raises(DataError, match=r"the first, train/cat/1\.png, is not one of"):
        load_folder(tmp_path / "bad")


@pytest.mark.parametrize(
    "facts",
    [{"size": [8]}, {"size": [0, 8]}, {"size": ["8", "8"]}, {"size": [8.0, 8]}, {"size": 8},
     {"size": [8, 8, 3]}, {"channels": 4}, {"channels": "3"}, {"path": None}],
)  # fmt: skip
def test_invalid_settings_are_refused(root: Path, facts: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        load_folder(root, **facts)
