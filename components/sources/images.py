"""Decode an encoded image to pixels, and build a split of many.

The conversion is fixed, so that the same bytes give the same pixels everywhere: the first frame,
turned upright by its EXIF tag; palettes and CMYK to RGB; one bit to 0 and 255; 16-bit grey v to
round(v / 257); transparent pixels on white; RGB to grey by ITU-R 601 luma, grey to RGB by repeating
it; last, if a size is asked for, resized bilinearly with antialiasing. Colour profiles are ignored.
Pillow itself reduces 16-bit colour to its high byte.
"""

import io
import warnings
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field

from components.data.shards import DataError
from components.sources.raw import RawSplit, Reject, SourceConfig

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_PIXELS = 16_000_000
MAX_BYTES = 16_000_000
# An image of one colour compresses a thousandfold; a split of nothing else is no data set.
MAX_PIXEL_BYTES, MAX_GROWTH = 100_000_000, 200

Side = Annotated[int, Field(ge=1, le=4096)]
# YAML has lists and no tuples, so the tuple itself is not strict; its sides are.
Size = Annotated[tuple[Side, Side], Field(strict=False)]
Pixels = npt.NDArray[np.uint8]


# The settings of a source of which nothing is cut, and no image may be left out.
ALL: dict[str, Any] = {
    "val": 1, "test": 0, "train_limit": None, "test_limit": None, "max_reject_fraction": 0.0
}  # fmt: skip


class EncodedSource(SourceConfig):
    """A source of encoded images under the folder `path`.

    Images are converted to `channels` (1: grey, 3: RGB) and to `size` [height, width]. If these are
    null, the first usable image decides: all get its channels, and those of another size are
    rejected.
    """

    path: str
    channels: Literal[1, 3] | None = None
    size: Size | None = None


def decode(content: bytes, channels: int | None, size: tuple[int, int] | None) -> Pixels | str:
    """Return an encoded image as (C,H,W) uint8, or the reason why it cannot be used.

    If `channels` is None, a grey image has one channel and any other three.
    """
    image = _open(content)
    if isinstance(image, str):
        return image
    image = _flat(image)
    channels = channels or (1 if image.mode in ("1", "L") else 3)
    image = image.convert("L" if channels == 1 else "RGB")
    if size is not None and image.size != size[::-1]:
        image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[np.newaxis] if channels == 1 else pixels.transpose(2, 0, 1)


def _open(content: bytes) -> Image.Image | str:
    """Return the decoded image, upright, or why it cannot be used; huge images are not decoded."""
    if len(content) > MAX_BYTES:
        return f"is {len(content)} bytes long, over the limit of {MAX_BYTES}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            return f"has {image.width} x {image.height} pixels, over the limit of {MAX_PIXELS}"
        image.load()
        return ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        return f"is not one of {', '.join(FORMATS)}"
    # Decoders raise nearly any exception on damaged bytes; one bad image must not stop the rest.
    except Exception as error:
        return f"cannot be decoded: {error}"


def _flat(image: Image.Image) -> Image.Image:
    """Return an 8-bit image without transparency, in a mode that Pillow converts to L or RGB."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        values[values == image.info.get("transparency")] = 65535
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        pixels = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels)
    return image.convert("RGB") if image.mode == "P" else image


class SplitBuilder:
    """Builds a split of images that are added one by one and must all have one shape.

    If no `shape` (H,W) is given, the first usable image sets it. `where` names the split in errors;
    the caller adds to `packed` the bytes that it reads from disk.
    """

    def __init__(self, where: str, source: EncodedSource, shape: tuple[int, int] | None) -> None:
        self.where = where
        self.channels = source.channels
        self.size = source.size
        self.shape = shape
        self.rejects: list[Reject] = []
        self.packed = 0
        # One growing buffer, because stacking a list of arrays would hold all of them twice.
        self._pixels = bytearray()
        self._labels: list[int] = []
        self._rows: list[int] = []

    def __len__(self) -> int:
        return len(self._labels) + len(self.rejects)

    def add(self, content: bytes, label: int, file: str, row: int | None = None) -> None:
        """Decode an image and keep it, or the reason why it cannot be used.

        Raises DataError if the images unpack to so many bytes that the file must be hostile.
        """
        pixels = decode(content, self.channels, self.size)
        if isinstance(pixels, str):
            return self.reject(file, row, pixels)
        self.channels, height, width = pixels.shape
        self.shape = self.shape or (height, width)
        if (height, width) != self.shape:
            expected = f"{self.shape[0]} x {self.shape[1]}"
            return self.reject(file, row, f"is {height} x {width}, but the first is {expected}")
        self._rows.append(len(self))
        self._labels.append(label)
        self._pixels += pixels.tobytes()
        if len(self._pixels) > max(MAX_PIXEL_BYTES, MAX_GROWTH * self.packed):
            raise DataError(
                f"{self.where} unpacks {self.packed} bytes to {len(self._pixels)} or more, over "
                f"{MAX_GROWTH} times as many: these are no real images; `size` makes them smaller"
            )

    def reject(self, file: str, row: int | None, reason: str) -> None:
        """Record an image that is left out."""
        self.rejects.append(Reject(file, row, reason))

    def build(self) -> RawSplit:
        """Return the split; raise DataError if it has no usable image."""
        if self.shape is None or not self._labels:
            first = self.rejects[0] if self.rejects else None
            why = f"the first, {first.file}, {first.reason}" if first else "there are none"
            raise DataError(f"{self.where} has no usable image: {why}")
        return RawSplit(
            np.frombuffer(self._pixels, np.uint8).reshape(-1, self.channels or 1, *self.shape),
            np.array(self._labels, dtype=np.int64),
            np.array(self._rows, dtype=np.int64),
            tuple(self.rejects),
        )
