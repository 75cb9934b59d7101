"""A random classifier gets keyed noise of its own, in every mode and wherever it is asked."""

from copy import deepcopy
from math import erf, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy_networks import Blurred, Noisy, Rounded, Shaken
from toys import LINF, failed, head, linear_task

from components import probes, serving
from components.attacks import craft
from components.attacks.apgd import ApgdCe
from components.data.draws import Draws, NoiseStream
from components.data.image_set import ImageSet
from components.evaluation.counting import CLEAN
from components.evaluation.detection import detector_scores
from components.models.accuracy import count_correct, predict
from components.models.classifiers import Classifier
from components.models.defense import Defense, Mode, bind, fold_batch_norm, margin
from components.models.foreign import adopt_classifier
from components.models.one_pass import one_pass
from components.models.purifiers import Purifier
from components.models.purifiers.controls import BitDepth
from components.probes import masking
from components.probes.attacks import planted
from components.probes.bench import Bench

PURIFIERS: dict[str, Purifier | None] = {
    "none": None, "deterministic": Blurred(), "random": Noisy(0.1), "rounding": Rounded(7),
}  # fmt: skip
MODES: tuple[Mode, ...] = ("full", "bpda", "fixed_noise")


class Overheard(nn.Module):
    """A classifier that keeps what it is called with beside the pixels."""

    def __init__(self, classifier: nn.Module, random: bool) -> None:
        super().__init__()
        self.classifier, self.stochastic = classifier, random
        self.given: list[tuple[Any, ...]] = []

    def forward(self, x: Tensor, *noise: NoiseStream | None) -> Tensor:
        self.given.append(noise)
        logits: Tensor = self.classifier(x)
        return logits


class Eavesdropping(Noisy):
    """A random purifier that keeps its streams."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[NoiseStream | None] = []

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        self.given.append(stream)
        return super().purify(x, stream)


def batch(test_set: ImageSet, count: int = 16) -> tuple[Tensor, Tensor, Draws]:
    some = head(test_set, count)
    return some.pixels(), some.labels, Draws(0, "attack", some.ids)


@pytest.mark.parametrize("purifier", PURIFIERS.values(), ids=PURIFIERS)
def test_a_defense_is_as_random_as_either_half(
    purifier: Purifier | None, classifier: Classifier
) -> None:
    drawing = purifier is not None and purifier.stochastic
    assert Defense(classifier, purifier).stochastic is drawing
    assert Defense(Shaken(classifier), purifier).stochastic
    assert not Defense(Shaken(classifier), purifier).batchwise


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("purifier", PURIFIERS.values(), ids=PURIFIERS)
def test_a_draw_is_answered_alike_in_every_mode_and_another_otherwise(
    purifier: Purifier | None, mode: Mode, classifier: Classifier, test_set: ImageSet
) -> None:
    x, _, draws = batch(test_set)
    defense = Defense(Shaken(classifier), purifier).freeze()
    target = bind(defense, mode, draws, 1)
    for draw in (0, 3):
        known = draws.redraw(0 if mode == "fixed_noise" else draw)
        assert torch.equal(target(x, draw), defense(x, known))
        assert torch.equal(target(x, draw, bare=True), defense.classify(x, known))
    for bare in (False, True):
        same = torch.equal(target(x, 0, bare), target(x, 3, bare))
        assert same is (mode == "fixed_noise")


def test_a_stand_in_is_followed_under_the_noise_of_the_query(
    classifier: Classifier, test_set: ImageSet
) -> None:
    x, labels, draws = batch(test_set)
    purifier = BitDepth(kind="bit_depth", bits=3).build(test_set.shape)
    defense = Defense(Shaken(classifier), purifier).freeze()
    target = bind(defense, "soft", draws, 1)
    with torch.enable_grad():
        logits = target(x.clone().requires_grad_(), 5)
    assert torch.equal(logits, defense(x, draws.redraw(5)))
    assert not torch.equal(logits, defense(x, draws.redraw(4)))
    seen = target.evaluate(x, labels, margin, 5)
    assert torch.equal(seen.margin, margin(logits.detach(), labels)) and seen.gradient.abs().max()


def test_an_image_gets_the_same_noise_in_any_batch(
    classifier: Classifier, test_set: ImageSet
) -> None:
    x, _, draws = batch(test_set)
    defense = Defense(Shaken(classifier, pixels=0.3), Blurred()).freeze()
    with torch.no_grad():
        whole = defense(x, draws)
        for row in range(len(x)):
            rows = torch.tensor([row])
            alone = defense(x[rows], draws[rows])
            assert torch.allclose(alone, whole[rows], atol=1e-5)
    flags = predict(defense, x, draws.ids, 0, "score", 8, 16)
    assert np.array_equal(flags, predict(defense, x, draws.ids, 0, "score", 8, 1))
    assert (flags != flags[0]).any()


def test_the_halves_never_draw_alike(classifier: Classifier, test_set: ImageSet) -> None:
    x, _, draws = batch(test_set)
    purifier, behind = Eavesdropping(), Overheard(classifier, random=True)
    defense = Defense(behind, purifier).freeze()
    for given in (draws, draws.stream("other")):
        purifier.given.clear(), behind.given.clear()
        defense.classify(defense.purify(x, given), given)
        (mine,), ((theirs,),) = purifier.given, behind.given
        assert mine is not None
        assert not torch.equal(mine.normal((3,), "noise"), theirs.normal((3,), "noise"))


@pytest.mark.parametrize("purifier", [None, Noisy(0.1)], ids=["none", "random"])
def test_a_deterministic_classifier_gets_pixels_alone(
    purifier: Purifier | None, classifier: Classifier, test_set: ImageSet
) -> None:
    x, _, draws = batch(test_set)
    behind = Overheard(classifier, random=False)
    defense = Defense(behind, purifier).freeze()
    logits = [defense(x, draws)]
    logits += [bind(defense, mode, draws, 1)(x, 0) for mode in MODES]
    purified = defense.purify(x, draws)
    assert all(torch.equal(one, classifier(purified)) for one in logits)
    assert torch.equal(bind(defense, "full", draws, 1)(x, 0, bare=True), classifier(x))
    assert set(behind.given) == {()}


def test_copies_and_one_pass_keep_the_noise_of_the_classifier(
    classifier: Classifier, test_set: ImageSet
) -> None:
    x, _, draws = batch(test_set)
    defense = Defense(Shaken(classifier), Noisy(0.1)).freeze()
    with torch.no_grad():
        logits = defense(x, draws)
        assert torch.allclose(fold_batch_norm(defense)(x, draws), logits, atol=1e-4)
        exact = deepcopy(defense).double()(x.double(), draws)
        assert torch.allclose(exact.float(), logits, atol=1e-4)

    class Descending(Blurred):
        stand_ins = ("direct",)

        def stand_in(self, kind: str, x: Tensor, stream: NoiseStream | None) -> Tensor:
            return x

    passed = one_pass(Defense(Shaken(classifier), Descending()).freeze())
    assert passed.stochastic
    assert torch.equal(passed(x, draws), passed(x, draws))
    assert not torch.equal(passed(x, draws), passed(x, draws.redraw(1)))


# What can be computed by hand


def phi(value: float) -> float:
    return 0.5 * (1 + erf(value / sqrt(2)))


@pytest.fixture(scope="module")
def linear() -> tuple[Defense, ImageSet, Tensor, float]:
    """A linear classifier of two classes with Gaussian noise on its logits.

    Returned with its images, their clean margins without noise, and the deviation of the margin:
    two logits have independent noise, so it is their deviation times the root of two.
    """
    model, data = linear_task(2)
    margins = margin(model(data.pixels()), data.labels)
    sigma = float(margins.abs().mean())
    defense = Defense(Shaken(model, pixels=0.0, logits=sigma), None).freeze()
    return defense, data, margins, sigma * sqrt(2)


def test_the_mean_margin_under_eot_is_that_without_noise(
    linear: tuple[Defense, ImageSet, Tensor, float],
) -> None:
    defense, data, margins, deviation = linear
    draws, eot = Draws(0, "attack", data.ids), 400
    found = bind(defense, "full", draws, eot).margins(data.pixels(), data.labels, 0)
    apart = (found - margins) / (deviation / sqrt(eot))
    assert apart.abs().max() < 4.5 and 0.8 < float(apart.std()) < 1.2


def test_robust_accuracy_of_a_random_linear_model_is_its_closed_form(
    linear: tuple[Defense, ImageSet, Tensor, float],
) -> None:
    """An attack takes eps times the L1 length off the margin, which then is Gaussian."""
    defense, data, margins, deviation = linear
    model = defense.classifier.classifier
    assert isinstance(model, nn.Module)
    weight = model.weight
    assert isinstance(weight, Tensor)
    ball = LINF.scaled(0.1)
    lost = ball.eps * float((weight[0] - weight[1]).abs().sum())
    exact = np.array([phi((float(one) - lost) / deviation) for one in margins])
    attack = ApgdCe(kind="apgd_ce", steps=20, restarts=1, eot=4)
    crafted = craft(attack, defense, "full", data, ball, 0, 50)
    n = 200
    right = count_correct(defense, crafted.images, data.labels, data.ids, 0, "score", n, 50) / n
    clean = count_correct(defense, data.pixels(), data.labels, data.ids, 0, "clean", n, 50) / n
    deviations = float(np.sqrt((exact * (1 - exact)).sum() / n)) / len(data)
    assert right.mean() == pytest.approx(exact.mean(), abs=4 * deviations)
    assert clean.mean() == pytest.approx(
        np.mean([phi(float(one) / deviation) for one in margins]), abs=0.01
    )
    assert 0.05 < exact.mean() < clean.mean() - 0.1
    assert crafted.answers.max() > 1, "a random defense is asked several times"


# Wherever it is asked


def test_serving_with_a_seed_repeats_its_answers(
    classifier: Classifier, test_set: ImageSet
) -> None:
    x, _, _ = batch(test_set)
    defense = Defense(Shaken(classifier), Blurred()).freeze()
    first, again, other = (serving.predict(defense, x, seed, 5).logits for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(serving.predict(defense, x, None, 5).logits, first)
    assert torch.allclose(first, defense(x, Draws(1, "score", torch.arange(len(x)))), atol=1e-5)


def test_detector_scores_of_a_deterministic_purifier_have_no_noise(
    classifier: Classifier, test_set: ImageSet
) -> None:
    x, _, draws = batch(test_set)
    for purifier, same in ((Blurred(), True), (Noisy(0.1), False)):
        defense = Defense(Shaken(classifier), purifier).freeze()
        found = detector_scores(defense, {CLEAN: x}, draws.ids, x[:0], draws.ids[:0], 0, 5, {})
        assert found is not None
        assert (found.select is found.score) is same


def probed(defense: Defense, data: ImageSet, modes: tuple[Mode, ...], thorough: bool = False):  # type: ignore[no-untyped-def]
    test, val = head(data, 200), data[torch.arange(200, 300)]
    return probes.probe(defense, modes, test, LINF, 0, 64, 4, 50, None, val, thorough)


@pytest.mark.parametrize("purifier", [None, Blurred(), Noisy(0.05)], ids=["none", "soft", "noisy"])
def test_an_honest_random_classifier_passes_every_probe(
    purifier: Purifier | None, classifier: Classifier, test_set: ImageSet
) -> None:
    modes: tuple[Mode, ...] = ("full",) if purifier is None else ("full", "bpda")
    findings = probed(Defense(Shaken(classifier, 0.05), purifier).freeze(), test_set, modes)
    assert {one.name for one in findings} == set(probes.required(modes, True, True, False))
    assert failed(findings) == failed(findings, "warn") == []
    assert all(one.asked for one in findings)


def dropping(classifier: Classifier) -> nn.Module:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = deepcopy(classifier)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.inner(F.dropout(x, 0.1, training=True))
            return logits

    return Dropping()


def test_noise_of_a_whole_batch_is_not_asked_in_other_batches(
    classifier: Classifier, test_set: ImageSet
) -> None:
    adopted = adopt_classifier(dropping(classifier), head(test_set, 8).pixels(), 10)
    defense = Defense(adopted, Blurred()).freeze()
    assert defense.stochastic and defense.batchwise
    findings = probed(defense, test_set, ("full", "bpda"))
    assert [one.name for one in findings if not one.asked] == ["one_answer"]
    assert failed(findings) == []


@pytest.mark.parametrize("declared", [True, False])
def test_a_false_declaration_of_a_classifier_blocks(
    declared: bool, classifier: Classifier, test_set: ImageSet
) -> None:
    class Liar(nn.Module):
        stochastic = declared

        def __init__(self) -> None:
            super().__init__()
            self.inner = classifier

        def forward(self, x: Tensor, stream: NoiseStream | None = None) -> Tensor:
            moved = x if declared else x + 0.1 * torch.randn_like(x)
            logits: Tensor = self.inner(moved)
            return logits

    findings = probed(Defense(Liar(), None).freeze(), test_set, ("full",))
    assert "randomness_declared" in failed(findings)


def test_probes_with_heads_ask_a_random_classifier_under_its_noise(
    classifier: Classifier, test_set: ImageSet
) -> None:
    """A planted boundary, and the logits of the classes that occur."""
    some = head(test_set, 24)
    kept = torch.unique(some.labels)[:4]
    some = some[torch.isin(some.labels, kept)]
    defense = Defense(Shaken(classifier, 0.02), Blurred()).freeze()
    bench = Bench(
        defense, some.pixels(), some.labels, some.ids, LINF, 0, None, 50, classes=kept
    )  # fmt: skip
    first, again = (masking._of_classes(bench) for _ in range(2))
    assert len(first) == 1 and torch.equal(first[0], again[0])
    attack = ApgdCe(kind="apgd_ce", steps=10, restarts=1, eot=1)
    finding = planted(bench.first(4), attack)
    assert finding.figures["share"] > 0
