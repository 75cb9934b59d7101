"""Noise belongs to an image: no batch or order changes it, and no two streams are correlated."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from components.data.draws import Draws, Keyed, NoiseStream, Role, fresh

IDS = torch.arange(1000) * 13 + 5
SHAPE = (2, 3, 4)
ROLES: tuple[Role, ...] = ("train", "attack", "select", "score", "clean")


def sample(draws: Keyed, kind: str) -> Tensor:
    if kind == "uniform":
        return draws.uniform(SHAPE, "use")
    if kind == "normal":
        return draws.normal(SHAPE, "use")
    return draws.permutation(24, "use")


def correlation(one: Tensor, other: Tensor) -> float:
    return torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].item()


@pytest.mark.parametrize("kind", ["uniform", "normal", "permutation"])
def test_an_image_has_the_same_noise_in_any_batch(kind: str) -> None:
    draws = Draws(3, "score", IDS, 2)
    whole = sample(draws, kind)
    order = torch.randperm(len(IDS), generator=torch.Generator().manual_seed(1))
    assert torch.equal(sample(draws[order], kind), whole[order])
    for row in (0, 17, 999):
        alone = Draws(3, "score", IDS[row : row + 1], 2)
        assert torch.equal(sample(alone, kind), whole[row : row + 1])
    mask = IDS % 3 == 0
    assert torch.equal(sample(draws[mask], kind), whole[mask])
    assert torch.equal(sample(draws[order][:10], kind), whole[order[:10]])


@pytest.mark.parametrize("kind", ["uniform", "normal", "permutation"])
def test_equal_keys_give_equal_noise_and_leave_the_global_stream_alone(kind: str) -> None:
    before = torch.get_rng_state()
    draws = Draws(3, "attack", IDS)
    assert torch.equal(sample(draws, kind), sample(Draws(3, "attack", IDS.clone()), kind))
    assert torch.equal(torch.get_rng_state(), before)


def test_indexing_keeps_the_draw_and_redraw_keeps_the_images() -> None:
    draws = Draws(3, "attack", IDS, 4)[torch.tensor([5, 2])].redraw(9)
    assert (draws.seed, draws.role, draws.draw, len(draws)) == (3, "attack", 9, 2)
    assert draws.ids.tolist() == [IDS[5].item(), IDS[2].item()]


@pytest.mark.parametrize("seed", [0, 2**40])
@pytest.mark.parametrize("numbers", [range(7, 70), range(-2, 2), range(5, 5)])
def test_many_draws_at_once_are_those_of_each(seed: int, numbers: range) -> None:
    draws = Draws(seed, "attack", IDS[:100], 31)
    each = [draws.redraw(number).uniform(SHAPE, "use") for number in numbers]
    found = draws.uniform_of(numbers, SHAPE, "use")
    assert found.shape == (100, len(numbers), *SHAPE)
    assert torch.equal(found, torch.stack(each, 1) if each else found)
    none = draws[torch.zeros(100, dtype=torch.bool)]
    assert none.uniform_of(numbers, SHAPE, "use").shape == (0, len(numbers), *SHAPE)


def variants() -> dict[str, Draws]:
    base = Draws(0, "attack", IDS)
    streams = {f"role {role}": Draws(0, role, IDS) for role in ROLES}
    streams |= {f"draw {draw}": base.redraw(draw) for draw in (-2, -1, 1, 2, 31)}
    streams |= {f"seed {seed}": Draws(seed, "attack", IDS) for seed in (1, 2, 1_000_003, 2**40)}
    streams["ids moved by one"] = Draws(0, "attack", IDS + 1)
    streams["ids of the neighbours"] = Draws(0, "attack", IDS.roll(1))
    return streams


@pytest.mark.parametrize("of", ["harness", "defense"])
@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_no_two_streams_are_correlated(kind: str, of: str) -> None:
    streams: dict[str, Keyed] = dict(variants())
    if of == "defense":
        streams = {name: draws.stream("salt") for name, draws in variants().items()}
        streams["another salt"] = Draws(0, "attack", IDS).stream("pepper")
    noise = {name: sample(stream, kind) for name, stream in streams.items()}
    # 24,000 values: the standard error of a correlation is 0.0065; 105 pairs.
    for one, other in itertools.combinations(noise, 2):
        assert abs(correlation(noise[one], noise[other])) < 5 / math.sqrt(24_000), (one, other)


def test_uses_do_not_share_noise() -> None:
    draws = Draws(0, "score", IDS)
    uses = [draws.normal(SHAPE, use) for use in ("noise", "mask", "start", "start radius")]
    for one, other in itertools.combinations(uses, 2):
        assert abs(correlation(one, other)) < 5 / math.sqrt(24_000)


def test_role_and_use_are_kept_apart_in_the_key() -> None:
    """Role `attack` with use `x` must not collide with another pair that spells `attack/x`."""
    draws = [Draws(0, role, IDS[:50]).uniform((10,), use) for role, use in
             itertools.product(ROLES, ("a", "b", "a/b"))]  # fmt: skip
    assert len({tuple(noise.flatten().tolist()) for noise in draws}) == len(draws)


def test_pixels_of_an_image_are_uncorrelated() -> None:
    """Neither neighbouring pixels nor the same pixel of images with neighbouring ids correlate."""
    noise = Draws(0, "score", torch.arange(2000)).uniform((64,), "use")
    between = torch.corrcoef(noise.T) - torch.eye(64)
    assert between.abs().max() < 5.5 / math.sqrt(2000)
    assert abs(correlation(noise[1:], noise[:-1])) < 5 / math.sqrt(noise.numel())
    assert abs(correlation(noise[:, 1:], noise[:, :-1])) < 5 / math.sqrt(noise.numel())


def test_uniform_noise_is_uniform_and_never_one() -> None:
    noise = Draws(0, "score", torch.arange(20_000)).uniform((50,), "use").flatten().double()
    assert noise.min() >= 0 and noise.max() < 1
    n = len(noise)
    assert abs(noise.mean() - 1 / 2) < 5 * math.sqrt(1 / 12 / n)
    assert abs(noise.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    assert kolmogorov(noise) < 2.2  # p = 1e-4


def test_normal_noise_is_normal_to_the_tails() -> None:
    noise = Draws(0, "score", torch.arange(20_000)).normal((50,), "use").flatten().double()
    n = len(noise)
    moments = [noise.pow(k).mean().item() for k in (1, 2, 3, 4)]
    spreads = [1, 2, 15, 96]  # variances of the first four powers of a standard normal
    for value, expected, spread in zip(moments, (0, 1, 0, 3), spreads, strict=True):
        assert abs(value - expected) < 5 * math.sqrt(spread / n)
    assert kolmogorov(torch.special.ndtr(noise)) < 2.2
    beyond = (noise.abs() > 4).sum().item()  # 63.3 expected among a million
    assert 30 < beyond < 105
    assert noise.isfinite().all() and noise.abs().max() < 9


@pytest.mark.parametrize("bits", [-1, 0, 2**63 - 1, -(2**63)])
def test_extreme_bits_give_finite_noise_in_range(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest uniform value stays below 1, and no normal value is infinite."""
    monkeypatch.setattr("components.data.draws._mix", lambda value: value.fill_(bits))
    draws = Draws(0, "score", torch.tensor([1]))
    assert 0 <= draws.uniform((1,), "use").item() < 1
    assert draws.normal((1,), "use").isfinite().all() and draws.normal((1,), "use").abs() < 9


def kolmogorov(values: Tensor) -> float:
    """Return sqrt(n) times the Kolmogorov-Smirnov distance to the uniform distribution."""
    n = len(values)
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    far = torch.maximum(steps - values.sort().values, values.sort().values - steps + 1 / n)
    return math.sqrt(n) * far.max().item()


def test_permutations_are_permutations() -> None:
    orders = Draws(0, "score", IDS).permutation(16, "mask")
    assert orders.shape == (1000, 16) and orders.dtype == torch.int64
    assert torch.equal(orders.sort(1).values, torch.arange(16).expand(1000, 16))
    assert len({tuple(order) for order in orders.tolist()}) == 1000


def test_every_position_gets_every_rank_equally_often() -> None:
    orders = Draws(0, "score", torch.arange(8000)).permutation(8, "mask")
    counts = torch.stack([(orders == rank).sum(0) for rank in range(8)]).double()
    chi2 = ((counts - 1000) ** 2 / 1000).sum().item()
    assert chi2 < 100  # 49 degrees of freedom: p = 2e-5
    # And pairs: position 0 says nothing about position 1, except that they differ.
    pairs = torch.bincount(orders[:, 0] * 8 + orders[:, 1], minlength=64).double()
    pairs = pairs.view(8, 8)[~torch.eye(8, dtype=torch.bool)]
    assert ((pairs - 8000 / 56) ** 2 / (8000 / 56)).sum() < 110  # 55 degrees of freedom


def test_fresh_draws_differ_every_time() -> None:
    one, other = fresh(4, torch.device("cpu")), fresh(4, torch.device("cpu"))
    assert not torch.equal(one.normal((3,), "noise"), other.normal((3,), "noise"))
    assert len({tuple(row) for row in one.normal((3,), "noise").tolist()}) == 4


@pytest.mark.parametrize("kind", ["uniform", "normal", "permutation"])
def test_a_stream_is_keyed_by_image_and_salt_and_indexed_like_the_batch(kind: str) -> None:
    draws = Draws(3, "score", IDS, 2)
    whole = sample(draws.stream("salt"), kind)
    order = torch.randperm(len(IDS), generator=torch.Generator().manual_seed(1))
    assert torch.equal(sample(draws[order].stream("salt"), kind), whole[order])
    assert torch.equal(sample(draws.stream("salt")[order], kind), whole[order])
    assert not torch.equal(sample(draws.stream("pepper"), kind), whole)


def test_keys_do_not_reveal_ids() -> None:
    """Every bit of an id flips every bit of the key in half of the cases, under unknown salts."""
    salts = [str(salt) for salt in range(400)]
    for bit in (0, 1, 17, 40):
        pair = torch.tensor([1234, 1234 ^ (1 << bit)])
        flips = torch.zeros(64)
        for salt in salts:
            one, other = _keys(Draws(0, "attack", pair).stream(salt))
            flips += torch.tensor([(int(one) ^ int(other)) >> k & 1 for k in range(64)])
        # 400 tosses: half, within five standard deviations.
        assert (flips / 400 - 0.5).abs().max() < 5 * 0.5 / 20


def test_keys_of_two_images_differ_by_nothing_that_lasts() -> None:
    """The XOR and the difference of the keys of two images change with draw, role and salt."""
    pair = torch.tensor([3, 4])
    keys = [
        _keys(Draws(0, role, pair, draw).stream(salt))
        for role in ROLES for draw in range(4) for salt in ("a", "b")
    ]  # fmt: skip
    assert len({int(one) ^ int(other) for one, other in keys}) == len(keys)
    assert len({int(one) - int(other) for one, other in keys}) == len(keys)


def _keys(stream: NoiseStream) -> Tensor:
    """Return the keys, the one thing that a stream holds."""
    (keys,) = vars(stream).values()
    assert isinstance(keys, Tensor)
    return keys
