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
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Role = Literal["train", "attack", "select", "score", "clean"]

_GOLDEN = 0x9E3779B97F4A7C15
# Shifts and factors of the two rounds of the mixer.
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
# Values that are drawn at a time on a CPU, so that they stay in its cache.
_BLOCK = 1 << 15


def _signed(value: int) -> int:
    """Wrap an unsigned 64-bit constant into the int64 range torch works in."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix(value: Tensor) -> Tensor:
    """Scramble int64 values (N,...) in place: the SplitMix64 finaliser, with wrapping arithmetic.

    On a CPU numpy does it, since it knows unsigned integers: half the work.
    """
    if value.device.type == "cpu":
        bits = value.numpy().view(np.uint64)
        shifted = np.empty_like(bits)
        for shift, factor in _ROUNDS:
            np.right_shift(bits, np.uint64(shift), out=shifted)
            bits ^= shifted
            bits *= np.uint64(factor)
        np.right_shift(bits, np.uint64(31), out=shifted)
        bits ^= shifted
        return value
    return _mix_signed(value)


def _mix_signed(value: Tensor) -> Tensor:
    """Do the same in torch, on any device."""
    for shift, factor in _ROUNDS:
        value.bitwise_xor_(_shift(value.clone(), shift)).mul_(_signed(factor))
    return value.bitwise_xor_(_shift(value.clone(), 31))


def _shift(value: Tensor, bits: int) -> Tensor:
    """Shift right logically, in place (torch shifts int64 arithmetically)."""
    return value.bitwise_right_shift_(bits).bitwise_and_((1 << (64 - bits)) - 1)


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
        keys, count = self._keys_of(use)[:, None], math.prod(shape)
        counter = _counter(count, keys.device)
        noise = torch.empty(len(self), count, device=keys.device)
        for rows, columns in _blocks(noise):
            # 24 bits fit a float32 mantissa exactly, so rounding cannot give 1.0.
            bits = _shift(_mix(keys[rows] + counter[columns]), 40)
            noise[rows, columns].copy_(bits).mul_(2.0**-24)
        return noise.view(len(self), *shape)

    def normal(self, shape: tuple[int, ...], use: str) -> Tensor:
        """Return standard normal noise (N, *shape), float32 (Box and Muller, 1958)."""
        keys, count = self._keys_of(use)[:, None], math.prod(shape)
        first, second = _counter(2 * count, keys.device).chunk(2)
        noise = torch.empty(len(self), count, device=keys.device)
        for rows, columns in _blocks(noise):
            radius, angle = (
                _shift(_mix(keys[rows] + counter[columns]), 11).double()
                for counter in (first, second)
            )
            # Float64 keeps devices equal to the last float32 bit, up to their log and cos.
            radius.add_(1).mul_(2.0**-53).log_().mul_(-2).sqrt_()
            noise[rows, columns] = radius.mul_(angle.mul_(2 * math.pi * 2.0**-53).cos_())
        return noise.view(len(self), *shape)

    def permutation(self, count: int, use: str) -> Tensor:
        """Return a random order of 0..count-1 for each image: (N, count) int64."""
        keys = self._keys_of(use)[:, None]
        return _mix(keys + _counter(count, keys.device)).argsort(dim=1, stable=True)


def _counter(count: int, device: torch.device) -> Tensor:
    """Return what tells the values of one stream apart (count,): their numbers, spread out."""
    return torch.arange(1, count + 1, device=device).mul_(_signed(_GOLDEN))


def _blocks(noise: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield parts of `noise` (N,count) by rows and columns; on an accelerator, all at once."""
    images, count = noise.shape
    width = min(count, _BLOCK) if noise.device.type == "cpu" else count
    height = max(_BLOCK // max(width, 1), 1) if noise.device.type == "cpu" else images
    for row in range(0, images, max(height, 1)):
        for column in range(0, count, max(width, 1)):
            yield slice(row, row + height), slice(column, min(column + width, count))


class NoiseStream(Keyed):
    """The noise of one query of a purifier or a classifier: all that it gets besides pixels.

    It holds one hashed key per image, which reveals neither role nor image nor draw.
    """

    def __init__(self, keys: Tensor) -> None:
        self._keys = keys

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, rows: Tensor) -> "NoiseStream":
        return NoiseStream(self._keys[rows])

    def part(self, use: str) -> "NoiseStream":
        """Return a stream of its own for one part of a defense, so that no two draw alike."""
        return NoiseStream(self._keys_of(use))

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
        return _mix(_mix(self.ids * _signed(_GOLDEN)) ^ self._number_of(use))

    def _number_of(self, use: str) -> int:
        """Return what tells this draw apart from others for the same images, for one use."""
        name = zlib.crc32(f"{self.role}/{use}".encode())
        stream = (self.seed * 0x1_0000_0001 + name) * _GOLDEN + self.draw * 0xD1B54A32D192ED03
        return _signed(stream)

    def uniform_of(self, draws: range, shape: tuple[int, ...], use: str) -> Tensor:
        """Return what `uniform` does at each of k `draws`, at once: (N, k, *shape)."""
        numbers = [self.redraw(draw)._number_of(use) for draw in draws]
        stream = torch.tensor(numbers, dtype=torch.int64, device=self.ids.device)
        keys = _mix(_mix(self.ids * _signed(_GOLDEN))[:, None] ^ stream)
        return _Hashed(keys.flatten()).uniform(shape, use).view(len(self), len(draws), *shape)


class _Hashed(Keyed):
    """Streams whose keys (N,) are hashed with the use already."""

    def __init__(self, keys: Tensor) -> None:
        self._keys = keys

    def __len__(self) -> int:
        return len(self._keys)

    def _keys_of(self, use: str) -> Tensor:
        return self._keys


def fresh(count: int, device: torch.device) -> NoiseStream:
    """Return unpredictable noise for `count` images: for serving, where nothing is scored."""
    return NoiseStream(torch.randint(1 << 62, (count,), device=device))
