"""Checks that take an attack: each passes on an honest defense and fires on a planted fault."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from components.attacks import Attack, Linf
from components.attacks.apgd import ApgdCe
from components.attacks.gradient import Noise, Pgd
from components.data.draws import Draws
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.defense import Defense, Mode
from components.models.purifiers import Purifier
from components.models.purifiers.controls import BitDepth, GaussianNoise
from components.probes import gradients, trials
from components.probes.trials import Bench

THREAT = Linf(norm="linf", eps_255=25.5)
APGD = ApgdCe(kind="apgd_ce", steps=40, restarts=1, eot=1)


@pytest.fixture
def bench(classifier: Classifier, test_set: ImageSet) -> Bench:
    return on(Defense(classifier, None), test_set)


@pytest.fixture
def noisy(classifier: Classifier, test_set: ImageSet) -> Bench:
    purifier = GaussianNoise(kind="gaussian_noise", sigma=0.3).build(test_set.shape)
    return on(Defense(classifier, purifier), test_set)


def on(defense: Defense, data: ImageSet, count: int = 48) -> Bench:
    some = data[torch.arange(count)]
    return Bench(defense.freeze(), some.pixels(), some.labels, some.ids, THREAT, 0)


class Dodging(Bench):
    """A bench whose attacks do nothing in balls larger than the threat's."""

    def run(self, attack: Attack, mode: Mode, threat: Linf, seed: int) -> Tensor:  # type: ignore[override]
        return self.x if threat.eps > self.threat.eps else super().run(attack, mode, threat, seed)


class Global(Purifier):
    """Noise from the global stream, which nobody can repeat."""

    stochastic = True

    def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
        return (x + 0.1 * torch.randn_like(x)).clamp(0, 1)


def test_accuracy_falls_as_the_radius_grows(bench: Bench) -> None:
    found = trials.radii(bench)
    assert found.passed
    curve = [found.figures[f"{factor:g}"] for factor in (0, *trials.RADII)]
    assert curve[0] > 0.9 and curve[-1] < 0.05 and curve == sorted(curve, reverse=True)
    assert found.figures["n"] == len(bench.x)
    clean = (bench.defense(bench.x).argmax(1) == bench.labels).double().mean()
    assert curve[0] == pytest.approx(float(clean)), "radius 0 is clean"


def test_a_radius_that_protects_is_found(bench: Bench) -> None:
    dodging = Dodging(**{name: getattr(bench, name) for name in bench.__dataclass_fields__})
    assert not trials.radii(dodging).passed


def test_images_that_fall_to_more_steps_were_not_attacked_enough(
    bench: Bench, noisy: Bench
) -> None:
    for one in (bench, noisy):
        found = trials.converged(one, [one.x])
        assert not found.passed and found.figures["before"] > found.figures["after"] + 0.1
        strong = [one.run(APGD.model_copy(update={"eot": 8}), "full", THREAT, k) for k in (5, 6)]
        assert trials.converged(one, strong).passed


def test_a_planted_example_is_found_by_gradient_and_by_nothing_else(
    bench: Bench, classifier: Classifier, test_set: ImageSet
) -> None:
    assert trials.planted(bench, APGD).passed
    blind = trials.planted(bench, Noise(kind="noise", tries=20))
    assert not blind.passed and blind.figures["share"] < 0.5
    rounded = BitDepth(kind="bit_depth", bits=2).build(test_set.shape)
    masked = trials.planted(on(Defense(classifier, rounded), test_set), APGD)
    assert not masked.passed


def test_what_is_owed_to_chance_is_measured(noisy: Bench) -> None:
    found = trials.fixed_noise(noisy)
    assert found.figures["gap"] > 0.1 and not found.passed
    little = GaussianNoise(kind="gaussian_noise", sigma=0.001).build((1, 8, 8))
    quiet = replace(noisy, defense=Defense(noisy.defense.classifier, little).freeze())
    assert trials.fixed_noise(quiet).passed


def test_equal_seeds_give_equal_bytes_unless_noise_is_global(bench: Bench) -> None:
    assert trials.repeatable(bench).passed
    wild = replace(bench, defense=Defense(bench.defense.classifier, Global()).freeze())
    assert not trials.repeatable(wild).passed


def test_more_draws_that_fool_more_are_found(noisy: Bench) -> None:
    assert trials.eot_enough(noisy, 16).passed

    class Starved(Bench):
        def run(self, attack: Attack, mode: Mode, threat: Linf, seed: int) -> Tensor:  # type: ignore[override]
            assert isinstance(attack, Pgd)
            return self.x if attack.eot == 4 else super().run(attack, mode, threat, seed)

    starved = Starved(**{name: getattr(noisy, name) for name in noisy.__dataclass_fields__})
    assert not trials.eot_enough(starved, 4).passed


def test_gradients_of_a_noisy_defense_agree_the_better_the_more_draws(noisy: Bench) -> None:
    found = gradients.eot_agreement(noisy.defense, noisy.x, noisy.labels, noisy.draws, 20)
    figures = [found.figures[f"cosine_{size}"] for size in gradients.EOT_SIZES]
    assert figures == sorted(figures) and figures[0] < 0.5 < 0.8 < figures[-1] <= 1


def test_the_certificate_of_a_linear_model_is_exact() -> None:
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    x = torch.rand(4, 1, 4, 4)
    labels = linear(x).argmax(1)
    draws = Draws(0, "attack", torch.arange(4))
    found = gradients.gradient_correct(Defense(linear, None).freeze(), x, labels, draws)
    assert found.passed and found.figures["defense"] == pytest.approx(1, abs=1e-6)


class Scaled(Purifier):
    """Right in the forward pass; its gradient is turned around where `flipped`."""

    def __init__(self, flipped: bool) -> None:
        super().__init__()
        self.flipped = flipped

    def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
        return 2 * x.detach() * 0.9 - x * 0.9 if self.flipped else 0.9 * x


@pytest.mark.parametrize("flipped", [False, True])
def test_a_wrong_half_is_named_by_its_own_cosine(bench: Bench, flipped: bool) -> None:
    defense = Defense(bench.defense.classifier, Scaled(flipped)).freeze()
    found = gradients.gradient_correct(defense, bench.x, bench.labels, bench.draws)
    sign = -1 if flipped else 1
    assert found.passed != flipped
    assert found.figures["classifier"] > 0.95
    assert found.figures["purifier"] == pytest.approx(sign, abs=1e-3)
    assert found.figures["defense"] * sign > 0.95
