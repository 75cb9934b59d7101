"""Square finds what gradients are kept from, at every size; a memory of the test images shows."""

from dataclasses import replace
from math import comb
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy_networks import Noisy
from toys import head

from components.attacks import Linf
from components.data.draws import NoiseStream
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.defense import Defense
from components.models.purifiers import Purifier
from components.probes import bench as benches
from components.probes import masking
from components.probes.bench import WAY, Bench, multiply_adds, spread
from components.probes.masking import blind_attack, fisher, remembered, stored_attacks

THREAT = Linf(norm="linf", eps_255=51)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].roll(3, dims=3)


class Misleading(nn.Module):
    """A classifier whose input gradient is that of another function."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(_Backward.apply(x))  # type: ignore[no-untyped-call]
        return logits


class Contrary(Purifier):
    """The identity, with the reversed derivative."""

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        return 2 * x.detach() - x


class Remembering(Purifier):
    """Returns a known image where one is within `reach` of a radius; else its input."""

    known: Tensor

    def __init__(self, images: Tensor, reach: float = 1.5) -> None:
        super().__init__()
        self.register_buffer("known", images)
        self.reach = reach

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        far = (x[:, None] - self.known[None].to(x.dtype)).abs().flatten(2).amax(2)
        nearest = far.min(1)
        near = (nearest.values <= self.reach * THREAT.eps)[:, None, None, None]
        return torch.where(near, self.known[nearest.indices].to(x.dtype), x)


def bench_of(defense: Defense, data: ImageSet, count: int = 48) -> Bench:
    some = head(data, count)
    return Bench(defense.freeze(), some.pixels(), some.labels, some.ids, THREAT, 0, None, 50)


# Without gradients


@pytest.mark.parametrize("random", [False, True], ids=["deterministic", "random"])
def test_square_finds_what_a_misleading_gradient_hides(
    random: bool, classifier: Classifier, test_set: ImageSet
) -> None:
    purifier = Noisy(0.02) if random else None
    found = blind_attack(bench_of(Defense(Misleading(classifier), purifier), test_set))
    assert found.level == "block" and not found.passed, found.detail
    assert found.figures["gain"] > 0.2


def test_a_purifier_that_turns_the_gradient_falls_to_grey_box_examples(
    classifier: Classifier, test_set: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masking, "QUERIES", 0)
    found = blind_attack(bench_of(Defense(classifier, Contrary()), test_set))
    assert not found.passed and found.figures["gain"] > 0.3, found.detail


class Decoys(nn.Module):
    """A classifier with as many more classes, which come next to the first one and seldom win."""

    ways: Tensor

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier
        generator = torch.Generator().manual_seed(7)
        self.register_buffer("ways", torch.randn(64, 1, generator=generator) / 8)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = 40 * self.classifier(x)
        decoy = 3 * (x.flatten(1) @ self.ways.to(x.dtype)).tanh()
        near = logits.amax(1, keepdim=True) - 12 + decoy - 0.1 * torch.arange(10).to(x.dtype)
        # Some image is answered with one of them.
        near = near + 100 * (x.flatten(1)[:, -1:] > 0.45).to(x.dtype)
        return torch.cat([logits, near], 1)


def test_classes_that_no_image_has_do_not_lead_attacks_astray(
    classifier: Classifier, test_set: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masking, "QUERIES", 0)
    bench = bench_of(Defense(Decoys(classifier), None), test_set)
    found = blind_attack(replace(bench, classes=torch.arange(10)))
    assert not found.passed and found.figures["gain"] > 0.3, found.detail


def test_an_honest_defense_loses_next_to_nothing_to_blind_attacks(
    classifier: Classifier, test_set: ImageSet
) -> None:
    for purifier in (None, Noisy(0.2)):
        found = blind_attack(bench_of(Defense(classifier, purifier), test_set))
        assert found.passed, found.detail


def stripes(side: int, count: int = 40) -> tuple[nn.Module, ImageSet]:
    """Return images of two classes, and a network that tells them apart by a smooth pattern."""
    generator = torch.Generator().manual_seed(side)
    wave = torch.sin(torch.arange(side) * 2 * torch.pi / side).repeat(side, 1)[None]
    labels = torch.arange(count) % 2
    grey = 0.5 + 0.05 * torch.where(labels == 1, 1.0, -1.0)[:, None, None, None] * wave
    images = grey + 0.03 * torch.randn(count, 1, side, side, generator=generator)
    linear = nn.Linear(side * side, 3)
    with torch.no_grad():
        linear.weight.zero_()
        linear.weight[0], linear.weight[1] = -wave.flatten(), wave.flatten()
        linear.bias.copy_(torch.tensor([0.0, 0.0, -1e3]))
    levels = (images * 255).round().clamp(0, 255).to(torch.uint8)
    data = ImageSet(levels, labels, torch.arange(count), ("0", "1", "2"))
    return nn.Sequential(nn.Flatten(), linear), data


@pytest.mark.parametrize("side", [8, 32, 64])
def test_a_misleading_gradient_is_caught_at_every_size(side: int) -> None:
    model, data = stripes(side)

    class Turned(nn.Module):
        """The derivative is rolled by half a wave, which turns its sign."""

        def forward(self, x: Tensor) -> Tensor:
            return x.detach() + (x - x.detach()).roll(side // 2, 3)

    defense = Defense(nn.Sequential(Turned(), model), None).freeze()
    threat = Linf(norm="linf", eps_255=24)
    bench = Bench(defense, data.pixels(), data.labels, data.ids, threat, 0, None, 40)
    found = blind_attack(bench)
    assert not found.passed, found.detail
    honest = Bench(
        Defense(model, None).freeze(), data.pixels(), data.labels, data.ids, threat, 0, None, 40
    )
    assert blind_attack(honest).passed


def test_where_an_answer_is_dear_fewer_images_are_tried_and_the_gap_says_so(
    classifier: Classifier, test_set: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_of(Defense(Misleading(classifier), None), test_set)
    whole = blind_attack(bench)
    monkeypatch.setattr(benches, "BUDGET", 100 * 10 * multiply_adds(bench))
    part = blind_attack(replace(bench))
    assert part.figures["tried"] == 10 < whole.figures["tried"]
    assert part.figures["queries"] == 100 < whole.figures["queries"]
    assert "would show" in part.detail and not whole.passed


def test_the_budget_grows_with_what_the_attacks_took(
    classifier: Classifier, test_set: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_of(Defense(classifier, None), test_set)
    monkeypatch.setattr(benches, "BUDGET", 50 * multiply_adds(bench))
    assert replace(bench).answers == 50 and len(replace(bench).affordable(48).x) == 8
    rich = replace(bench, spent=100 * 20 * 3 * WAY.steps)
    assert rich.answers == 20 * 3 * WAY.steps and len(rich.affordable(48).x) == 20


@pytest.mark.parametrize("random", [False, True], ids=["deterministic", "random"])
def test_stored_examples_weaker_than_a_short_attack_are_caught(
    random: bool, classifier: Classifier, test_set: ImageSet
) -> None:
    """A gradient that is wrong while sets are crafted and right in the probes gives such sets."""
    bench = bench_of(Defense(classifier, Noisy(0.02) if random else None), test_set)
    clean = replace(bench, stored=bench.x)
    assert not stored_attacks(clean).passed and stored_attacks(clean).figures["gain"] > 0.3
    attacked = replace(bench, stored=bench.way[0].images)
    assert stored_attacks(attacked).passed, stored_attacks(attacked).detail
    assert stored_attacks(bench).passed and blind_attack(clean).passed


# Memory


def test_a_memory_of_the_test_images_is_found(classifier: Classifier, test_set: ImageSet) -> None:
    data, val = head(test_set, 100), test_set[torch.arange(100, 200)]

    def judge(purifier: Purifier | None) -> Any:
        defense = Defense(classifier, purifier).freeze()
        return remembered(bench_of(defense, data), data, val)

    assert judge(None).passed
    found = judge(Remembering(data.pixels()))
    assert found.level == "block" and not found.passed, found.detail
    assert found.figures["p"] < 1e-6
    both = judge(Remembering(torch.cat([data.pixels(), val.pixels()]), reach=1.2))
    assert not both.passed and both.figures["p"] > 0.01, "val is remembered as well: moves show it"


def test_a_memory_is_not_asked_for_on_a_few_images(
    classifier: Classifier, test_set: ImageSet
) -> None:
    defense = Defense(classifier, None).freeze()
    data, val = head(test_set, 100), test_set[torch.arange(100, 159)]
    for others in (val, None):
        found = remembered(bench_of(defense, data), data, others)
        assert found.level == "warn" and not found.passed and "not asked" in found.detail


def test_fishers_test_counts_all_tables_as_extreme() -> None:
    """The tea lady: 4 of 4 against 0 of 4 has probability 1 in 70; 3 against 1, 17 in 70."""
    assert fisher(4, 4, 0, 4) == pytest.approx(1 / 70)
    assert fisher(3, 4, 1, 4) == pytest.approx(17 / 70)
    ways = sum(comb(30, k) * comb(50, 20 - k) for k in range(12, 21))
    assert fisher(12, 30, 8, 50) == pytest.approx(ways / comb(80, 20))


# Cost and rows


def test_multiply_adds_count_every_call() -> None:
    """By hand: 3 x 3 over 2 channels at 16 places, twice; then 32 x 5. A gradient counts thrice."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(32, 5)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.linear(self.conv(self.conv(x)).flatten(1))
            return logits

    class Descends(Purifier):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)

        def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
            with torch.enable_grad():
                point = x.detach().requires_grad_()
                (slope,) = torch.autograd.grad(self.conv(point).sum(), point)
            return x - 0.1 * slope

    defense = Defense(Twice(), None).freeze()
    bench = Bench(
        defense, torch.rand(3, 2, 4, 4), torch.zeros(3, dtype=torch.int64), torch.arange(3),
        THREAT, 0,
    )  # fmt: skip
    assert multiply_adds(bench) == 2 * (9 * 2 * 2 * 16) + 32 * 5
    descends = replace(bench, defense=Defense(Twice(), Descends()).freeze())
    assert multiply_adds(descends) == (3 + 2) * (9 * 2 * 2 * 16) + 32 * 5


def test_probed_images_are_spread_by_the_digest() -> None:
    ids = torch.arange(1000)
    rows = spread(ids, "one", 0, 100)
    assert len(set(rows.tolist())) == 100 and torch.equal(rows, spread(ids, "one", 0, 100))
    assert 400 < rows.double().mean() < 600 and (rows < 100).sum() < 30
    assert not torch.equal(rows, spread(ids, "other", 0, 100))
    assert not torch.equal(rows, spread(ids, "one", 1, 100))
    assert np.array_equal(np.sort(spread(ids, "one", 0, 2000).numpy()), np.arange(1000))
