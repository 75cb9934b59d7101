"""Probes that attack, and measured gradients: right on honest defenses, failed on faulty ones."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from toy_networks import Blurred, Function, Noisy, Rounded, listening
from toys import BALL, head

from components.attacks import L2, Attack, Linf
from components.attacks.apgd import ApgdCe
from components.attacks.gradient import Noise, Pgd
from components.data.draws import NoiseStream
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.defense import Defense, Mode
from components.models.purifiers import Purifier
from components.models.purifiers.controls import BitDepth, GaussianNoise
from components.probes import Finding, attacks, gradients
from components.probes.bench import Bench

THREAT = Linf(norm="linf", eps_255=25.5)
APGD = ApgdCe(kind="apgd_ce", steps=40, restarts=1, eot=1)


@pytest.fixture
def bench(classifier: Classifier, test_set: ImageSet) -> Bench:
    return bench_of(Defense(classifier, None), test_set)


@pytest.fixture
def noisy(classifier: Classifier, test_set: ImageSet) -> Bench:
    purifier = GaussianNoise(kind="gaussian_noise", sigma=0.3).build(test_set.shape)
    return bench_of(Defense(classifier, purifier), test_set)


def bench_of(defense: Defense, data: ImageSet, count: int = 48) -> Bench:
    some = head(data, count)
    return Bench(defense.freeze(), some.pixels(), some.labels, some.ids, THREAT, 0)


class Dodging(Bench):
    """A bench whose attacks do nothing at radii above the threat's."""

    def run(self, attack: Attack, mode: Mode, threat: Linf, seed: int) -> Tensor:  # type: ignore[override]
        return self.x if threat.eps > self.threat.eps else super().run(attack, mode, threat, seed)


class Global(Purifier):
    """Noise from the global random stream."""

    stochastic = True

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        return (x + 0.1 * torch.randn_like(x)).clamp(0, 1)


def test_accuracy_falls_as_the_radius_grows(bench: Bench) -> None:
    found = attacks.radii(bench)
    assert found.passed
    curve = [found.figures[f"{factor:g}"] for factor in (0, *attacks.RADII)]
    assert curve[0] > 0.9 and curve[-1] < 0.05 and curve == sorted(curve, reverse=True)
    assert found.figures["n"] == len(bench.x)
    clean = (bench.defense(bench.x).argmax(1) == bench.labels).double().mean()
    assert curve[0] == pytest.approx(float(clean)), "radius 0 is clean"


def test_a_larger_radius_that_protects_is_reported(bench: Bench) -> None:
    dodging = Dodging(**{name: getattr(bench, name) for name in bench.__dataclass_fields__})
    assert not attacks.radii(dodging).passed


def test_stored_attacks_of_too_few_steps_are_reported(bench: Bench, noisy: Bench) -> None:
    for whole in (bench, noisy):
        one = replace(whole, x=whole.x[:24], labels=whole.labels[:24], ids=whole.ids[:24])
        found = attacks.converged(one, [one.x])
        assert not found.passed and found.figures["before"] > found.figures["after"] + 0.1
        strong = [one.run(APGD.model_copy(update={"eot": 8}), "full", THREAT, k) for k in (5, 6)]
        assert attacks.converged(one, strong).passed


def test_planted_examples_are_found_by_a_usable_gradient_only(
    bench: Bench, classifier: Classifier, test_set: ImageSet
) -> None:
    assert attacks.planted(bench, APGD).passed
    blind = attacks.planted(bench, Noise(kind="noise", tries=20))
    assert not blind.passed and blind.figures["share"] < 0.5
    rounded = BitDepth(kind="bit_depth", bits=2).build(test_set.shape)
    masked = attacks.planted(bench_of(Defense(classifier, rounded), test_set), APGD)
    assert not masked.passed


def test_accuracy_that_unknown_noise_adds_is_reported(noisy: Bench) -> None:
    # One draw of known noise on 48 images is a matter of luck; four are enough.
    found = [attacks.fixed_noise(replace(noisy, seed=seed)) for seed in range(4)]
    gaps = [each.figures["gap"] for each in found]
    assert sum(gaps) / 4 > 0.08 and max(gaps) > 0.1
    assert [each.passed for each in found] == [gap <= 0.1 for gap in gaps]
    little = GaussianNoise(kind="gaussian_noise", sigma=0.001).build((1, 8, 8))
    quiet = replace(noisy, defense=Defense(noisy.defense.classifier, little).freeze())
    assert attacks.fixed_noise(quiet).passed


def test_noise_from_the_global_stream_is_reported_as_not_repeatable(bench: Bench) -> None:
    assert attacks.repeatable(bench).passed
    wild = replace(bench, defense=Defense(bench.defense.classifier, Global()).freeze())
    assert not attacks.repeatable(wild).passed


def test_too_few_draws_per_gradient_are_reported(noisy: Bench) -> None:
    assert attacks.eot_enough(noisy, 16).passed

    class Starved(Bench):
        def run(self, attack: Attack, mode: Mode, threat: Linf, seed: int) -> Tensor:  # type: ignore[override]
            assert isinstance(attack, Pgd)
            return self.x if attack.eot == 4 else super().run(attack, mode, threat, seed)

    starved = Starved(**{name: getattr(noisy, name) for name in noisy.__dataclass_fields__})
    assert not attacks.eot_enough(starved, 4).passed


def test_gradients_of_a_noisy_defense_agree_better_with_more_draws(noisy: Bench) -> None:
    found = gradients.eot_agreement(noisy.defense, noisy.x, noisy.labels, noisy.draws, 20)
    figures = [found.figures[f"cosine_{size}"] for size in gradients.EOT_SIZES]
    assert figures == sorted(figures) and figures[0] < 0.5 < 0.8 < figures[-1] <= 1


# Right gradients that lead nowhere

WAYS = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))


def rippled(classifier: Classifier) -> Function:
    """Return the classifier with a fast ripple on its logits."""
    return Function(lambda x: classifier(x) + 3 * (300 * x.flatten(1) @ WAYS.to(x)).sin())


def terraced(classifier: Classifier) -> Function:
    """Return a classifier of rounded pixels, with slopes of another direction inside each cell."""

    def logits(x: Tensor) -> Tensor:
        centre = ((40 * x.detach()).floor() + 0.5) / 40
        found: Tensor = classifier(centre) + (x - centre).flatten(1) @ WAYS.to(x)
        return found

    return Function(logits)


def paid(bench: Bench, threat: Linf | L2 = THREAT, count: int = 24) -> Finding:
    """Return the finding where the first `count` images are those that an attack is run on."""
    bench = replace(bench, threat=threat)
    return gradients.gradient_pays(bench, bench.pick(torch.arange(count)).points())


@pytest.mark.parametrize("threat", [THREAT, BALL], ids=["linf", "l2"])
@pytest.mark.parametrize("purifier", [None, Blurred(), Noisy(0.3)], ids=["none", "blur", "noise"])
def test_a_step_along_an_honest_gradient_beats_a_random_one(
    purifier: Purifier | None, threat: Linf | L2, classifier: Classifier, test_set: ImageSet
) -> None:
    found = paid(bench_of(Defense(classifier, purifier), test_set), threat)
    assert found.passed and found.level == "warn" and found.name == "gradient_pays/full"
    assert found.figures["share"] >= 0.95 and found.figures["judged"] >= 2, found.detail


@pytest.mark.parametrize("threat", [THREAT, BALL], ids=["linf", "l2"])
@pytest.mark.parametrize("purifier", [None, Noisy(0.1)], ids=["none", "noise"])
@pytest.mark.parametrize("shattered", [rippled, terraced])
def test_a_right_gradient_that_leads_nowhere_is_caught(
    shattered: Callable[[Classifier], Function], purifier: Purifier | None, threat: Linf | L2,
    classifier: Classifier, test_set: ImageSet,
) -> None:  # fmt: skip
    defense = Defense(shattered(classifier), purifier)
    found = paid(bench_of(defense, test_set), threat)
    assert not found.passed and found.figures["share"] < 0.75, found.detail


def test_too_few_right_images_are_not_judged(classifier: Classifier, test_set: ImageSet) -> None:
    defense = Defense(rippled(classifier), None)
    few = paid(bench_of(defense, test_set, 19), count=19)
    assert few.passed and few.figures["judged"] == 0 and "fewer than 20" in few.detail
    whole = bench_of(defense, test_set)
    wrong = paid(replace(whole, labels=(whole.labels + 1) % 10))
    assert wrong.passed and wrong.figures["judged"] == 0 and "fewer than 20" in wrong.detail


def test_where_an_attack_is_dear_more_images_take_single_steps(
    classifier: Classifier, test_set: ImageSet
) -> None:
    bench = bench_of(Defense(rippled(classifier), None), test_set)
    found = paid(bench, count=8)
    assert not found.passed and found.figures["judged"] == 2
    assert "of the way" in found.detail, found.detail
    # Of a defense that is often wrong, it takes images that are right.
    often = torch.arange(len(bench.x)) % 2 == 0
    found = paid(
        replace(bench, labels=torch.where(often, bench.labels, bench.labels + 1) % 10), count=8
    )
    assert not found.passed and found.figures["judged"] >= 1, found.detail


def test_the_identity_does_not_pay_for_a_purifier_without_gradient(
    classifier: Classifier, test_set: ImageSet
) -> None:
    """An image of a codebook that is put in the place of `x` has no gradient, and is not near."""
    coarse, fine = (bench_of(Defense(classifier, Rounded(n)), test_set) for n in (1, 15))
    found = [
        gradients.gradient_pays(
            replace(bench, mode="bpda"), replace(bench, mode="bpda").points(), "bpda"
        )
        for bench in (coarse, fine)
    ]
    assert [one.passed for one in found] == [False, True], [one.detail for one in found]
    assert {one.name for one in found} == {"gradient_pays/bpda"}


def test_both_steps_meet_the_same_noise_which_did_not_make_the_gradient(
    classifier: Classifier, test_set: ImageSet
) -> None:
    asked: list[int] = []
    bench = bench_of(listening(classifier, lambda draws: asked.append(draws.draw)), test_set, 4)
    points = bench.points()
    asked.clear()
    gradients.gradient_pays(bench, points)
    made, fresh = list(range(4)), list(range(16, 32))
    # The first question asks which images are right.
    assert asked == [0, *[*made, *fresh, *fresh] * 3]
