"""Noise keyed per image: an image gets the same noise in any batch, order or worker.

A stream is keyed by seed, role, image id, draw and use. Two roles never share a stream, so an
attack cannot fit the draws that are used for scoring. The generator is counter-based (the
SplitMix64 finaliser of Steele, Lea and Flood, OOPSLA 2014, over a hashed key) and written in int64
tensor arithmetic, so a whole batch is drawn at once on any device.
"""

import math
import zlib
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


@dataclass(frozen=True)
class Draws:
    """One draw of noise for a batch of images; index it in the same way as the batch.

    `ids` (N,) int64 are image ids; `draw` numbers independent repetitions for the same image.
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

    def uniform(self, shape: tuple[int, ...], use: str) -> Tensor:
        """Return uniform noise (N, *shape), float32 in [0, 1); `use` names what it is for."""
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
        name = zlib.crc32(f"{self.role}/{use}".encode())
        stream = (self.seed * 0x1_0000_0001 + name) * _GOLDEN + self.draw * 0xD1B54A32D192ED03
        key = _mix(_mix(self.ids * _signed(_GOLDEN)) ^ _signed(stream))
        counter = torch.arange(1, count + 1, device=self.ids.device) * _signed(_GOLDEN)
        return _mix(key[:, None] + counter)


def fresh(count: int, device: torch.device) -> Draws:
    """Return unpredictable draws for `count` images: for serving, where nothing is scored."""
    ids = torch.randint(1 << 62, (count,), device=device)
    return Draws(int(torch.randint(1 << 62, ()).item()), "clean", ids)
