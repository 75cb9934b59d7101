"""Noise keyed per image: the same image gets the same noise in any batch, order or worker.

A stream is named by (seed, role, image id, draw) and the use the noise is put to; two roles
never share a stream, so an attacker cannot fit the very draws that are scored. The generator is
counter-based (the SplitMix64 finaliser of Steele, Lea and Flood, OOPSLA 2014, over a hashed key),
written in int64 tensor arithmetic, so a whole batch is drawn at once on any device.
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
    """Shift right logically; torch's own shift of int64 carries the sign along."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


@dataclass(frozen=True)
class Draws:
    """A handle on one draw of noise for a batch of images; index it as the batch is indexed.

    `ids` (N,) int64 are image ids, `draw` counts repetitions of the noise for the same image.
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
        """Return the same streams at repetition `draw`."""
        return replace(self, draw=draw)

    def uniform(self, shape: tuple[int, ...], use: str) -> Tensor:
        """Return (N, *shape) float32 in [0, 1); `use` names what the noise is for."""
        # 24 bits fill a float32 mantissa exactly, so 1.0 can not come out by rounding.
        return (_shift(self._bits(math.prod(shape), use), 40).float() / (1 << 24)).view(
            len(self), *shape
        )

    def normal(self, shape: tuple[int, ...], use: str) -> Tensor:
        """Return (N, *shape) float32 standard normal noise (Box and Muller, 1958)."""
        count = math.prod(shape)
        bits = self._bits(2 * count, use)
        # Float64 inside keeps devices equal to the last float32 bit, short of libm itself.
        radius = (_shift(bits[:, :count], 11).double() + 1) / (1 << 53)
        angle = _shift(bits[:, count:], 11).double() / (1 << 53)
        normal = (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()
        return normal.float().view(len(self), *shape)

    def permutation(self, count: int, use: str) -> Tensor:
        """Return (N, count) int64: an independent random order of 0..count-1 per image."""
        return self._bits(count, use).argsort(dim=1, stable=True)

    def _bits(self, count: int, use: str) -> Tensor:
        name = zlib.crc32(f"{self.role}/{use}".encode())
        stream = (self.seed * 0x1_0000_0001 + name) * _GOLDEN + self.draw * 0xD1B54A32D192ED03
        key = _mix(_mix(self.ids * _signed(_GOLDEN)) ^ _signed(stream))
        counter = torch.arange(1, count + 1, device=self.ids.device) * _signed(_GOLDEN)
        return _mix(key[:, None] + counter)


def fresh(count: int, device: torch.device) -> Draws:
    """Return draws nobody can foresee, for a purifier that is served rather than scored."""
    ids = torch.randint(1 << 62, (count,), device=device)
    return Draws(int(torch.randint(1 << 62, ()).item()), "clean", ids)
