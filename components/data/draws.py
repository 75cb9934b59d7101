"""Noise keyed per image: an image gets the same noise in any batch, order or worker.

Two classes share one generator. `Draws` belongs to the harness: it names seed, role, image ids and
the number of the draw. `NoiseStream` belongs to the defense under test, and names nothing: a
purifier that could tell an attack from the scoring, or one image from another, could answer
differently in each. A `NoiseStream` holds one key per image, hashed with a salt that is the
defense's own digest, so a defense cannot have a table of the keys that it will meet.

Two roles never share a stream, so an attack cannot fit the draws that are used for scoring. The
generator is counter-based (the SplitMix64 finaliser of Steele, Lea and Flood, OOPSLA 2014, over a
hashed key) and written in int64 tensor arithmetic, so a whole batch is drawn at once on any device.
"""

import hashlib
import math
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Role = Literal["train", "attack", "select", "score", "clean"]

_GOLDEN = 0x9E3779B97F4A7C15


def _signed(value: int) -> int:
    """Wrap an unsigned 64-bit constant into the int64 range torch works in."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix(value: Tensor) -> Tensor:
    """Scramble int64 values (N,...): the SplitMix64 finaliser, with wrapping arithmetic."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = (value ^ _shift(value, shift)) * _signed(factor)
    return value ^ _shift(value, 31)


def _shift(value: Tensor, bits: int) -> Tensor:
    """Shift right logically (torch shifts int64 arithmetically)."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


class Keyed(ABC):
    """A batch of independent random streams, one per image; index it in the same way as the batch.

    `use` names what the noise is for: each use has noise of its own.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abstractmethod
    def _keys_of(self, use: str) -> Tensor:
        """Return the key of each image (N,) int64 for one use."""

    def uniform(self, shape: tuple[int, ...], use: str) -> Tensor:
        """Return uniform noise (N, *shape), float32 in [0, 1)."""
        # 24 bits fit a float32 mantissa exactly, so rounding cannot give 1.0.
        return (_shift(self._bits(math.prod(shape), use), 40).float() / (1 << 24)).view(
            len(self), *shape
        )

    def normal(self, shape: tuple[int, ...], use: str) -> Tensor:
        """Return standard normal noise (N, *shape), float32 (Box and Muller, 1958)."""
        count = math.prod(shape)
        bits = self._bits(2 * count, use)
        # Float64 keeps devices equal to the last float32 bit, up to their log and cos.
        radius = (_shift(bits[:, :count], 11).double() + 1) / (1 << 53)
        angle = _shift(bits[:, count:], 11).double() / (1 << 53)
        normal = (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()
        return normal.float().view(len(self), *shape)

    def permutation(self, count: int, use: str) -> Tensor:
        """Return a random order of 0..count-1 for each image: (N, count) int64."""
        return self._bits(count, use).argsort(dim=1, stable=True)

    def _bits(self, count: int, use: str) -> Tensor:
        """Return random int64 values (N, count) over all 64 bits."""
        keys = self._keys_of(use)
        counter = torch.arange(1, count + 1, device=keys.device) * _signed(_GOLDEN)
        return _mix(keys[:, None] + counter)


class NoiseStream(Keyed):
    """The noise of one query of a purifier: all that it gets besides pixels.

    It holds one hashed key per image, which reveals neither role nor image nor draw.
    """

    def __init__(self, keys: Tensor) -> None:
        self._keys = keys

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, rows: Tensor) -> "NoiseStream":
        return NoiseStream(self._keys[rows])

    def _keys_of(self, use: str) -> Tensor:
        return _mix(self._keys + _signed(zlib.crc32(use.encode()) * _GOLDEN))


@dataclass(frozen=True)
class Draws(Keyed):
    """One draw of the harness's noise for a batch of images.

    `ids` (N,) int64 are image ids; `draw` numbers independent repetitions for the same image. Its
    own methods are for choices of attacks and of trainings; a defense gets the `stream`.
    """

    seed: int
    role: Role
    ids: Tensor
    draw: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Tensor) -> "Draws":
        return replace(self, ids=self.ids[rows])

    def redraw(self, draw: int) -> "Draws":
        """Return the same images at repetition `draw`."""
        return replace(self, draw=draw)

    def stream(self, salt: str = "") -> NoiseStream:
        """Return the noise of this draw for a defense; `salt` is the digest of that defense.

        Every id passes through a mixer between secret keys three times (after Even and Mansour,
        1997). Without the salt, keys of known ids are as good as random.
        """
        name = f"{salt}/{self.seed}/{self.role}/{self.draw}".encode()
        digest = hashlib.blake2b(name, digest_size=32).digest()
        parts = [int.from_bytes(digest[k : k + 8], "little", signed=True) for k in (0, 8, 16, 24)]
        keys = self.ids ^ parts[0]
        for part in parts[1:]:
            keys = _mix(keys) ^ part
        return NoiseStream(keys)

    def _keys_of(self, use: str) -> Tensor:
        name = zlib.crc32(f"{self.role}/{use}".encode())
        stream = (self.seed * 0x1_0000_0001 + name) * _GOLDEN + self.draw * 0xD1B54A32D192ED03
        return _mix(_mix(self.ids * _signed(_GOLDEN)) ^ _signed(stream))


def fresh(count: int, device: torch.device) -> NoiseStream:
    """Return unpredictable noise for `count` images: for serving, where nothing is scored."""
    return NoiseStream(torch.randint(1 << 62, (count,), device=device))
