"""Keyed noise is SplitMix64 over a counter, value by value, however it is cut into blocks."""

import math

import pytest
import torch

from components.data import draws as module
from components.data.draws import NoiseStream

WRAP = (1 << 64) - 1
KEYS = torch.tensor([0, 1, -5, 2**62 + 11])
USE = "use"


def splitmix(state: int) -> int:
    """The finaliser of Steele, Lea and Flood (2014) on plain integers."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ (state >> shift)) * factor & WRAP
    return state ^ (state >> 31)


def bits(key: int, number: int) -> int:
    return splitmix((key + number * 0x9E3779B97F4A7C15) & WRAP)


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 15])
def test_noise_is_that_of_plain_integers_in_any_block(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers of a stream start at 1; a normal value takes two of them, a count apart."""
    monkeypatch.setattr(module, "_BLOCK", block)
    stream = NoiseStream(KEYS)
    keys = [int(key) & WRAP for key in stream._keys_of(USE)]
    uniform, normal = stream.uniform((2, 3, 4), USE), stream.normal((2, 3, 4), USE)
    for row, key in enumerate(keys):
        for at in range(24):
            assert uniform[row].flatten()[at] == (bits(key, at + 1) >> 40) / 2**24
            radius = ((bits(key, at + 1) >> 11) + 1) / 2**53
            angle = 2 * math.pi * ((bits(key, at + 25) >> 11) / 2**53)
            value = math.sqrt(-2 * math.log(radius)) * math.cos(angle)
            assert normal[row].flatten()[at].item() == pytest.approx(value, rel=1e-6, abs=1e-12)


def test_a_large_image_is_cut_into_blocks_and_stays_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = NoiseStream(KEYS)
    shape = (3, 224, 224)
    cut = stream.uniform(shape, USE), stream.normal(shape, USE)
    monkeypatch.setattr(module, "_BLOCK", 1 << 30)
    assert torch.equal(cut[0], stream.uniform(shape, USE))
    assert torch.equal(cut[1], stream.normal(shape, USE))


def test_torch_mixes_as_numpy_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator torch does it, in signed integers."""
    values = torch.randint(-(2**63), 2**63 - 1, (1000,))
    signed = module._mix_signed(values.clone())
    assert torch.equal(signed, module._mix(values.clone()))
    assert [int(v) & WRAP for v in signed[:20]] == [splitmix(int(v) & WRAP) for v in values[:20]]


def test_no_noise_for_no_images_and_for_no_values() -> None:
    none = NoiseStream(KEYS[:0])
    assert none.uniform((2, 3), USE).shape == (0, 2, 3)
    assert NoiseStream(KEYS).normal((0,), USE).shape == (4, 0)
