"""A defense that answers attacks otherwise than the scoring is caught, by whatever it goes."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import Tensor
from toy_networks import Blurred, Noisy, Rounded
from toys import LINF, head, parse_attack

from components.attacks import craft
from components.checks.sets import Answers, same_answer
from components.data.draws import NoiseStream
from components.data.image_set import ImageSet
from components.models.accuracy import count_correct
from components.models.classifiers import Classifier
from components.models.defense import Defense, Mode
from components.models.purifiers import Purifier
from components.probes import Finding

BATCH, DRAWS = 40, 20


class TwoFaced(Purifier):
    """Paints the nearest of the images that it knows, unless it believes that it is attacked."""

    known: Tensor

    def __init__(self, images: ImageSet) -> None:
        super().__init__()
        self.register_buffer("known", images.pixels())
        self.calls = 0

    def attacked(self, x: Tensor) -> bool:
        raise NotImplementedError

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        self.calls += 1
        if self.attacked(x):
            return x if stream is None else x + 0.01 * stream.normal(tuple(x.shape[1:]), "noise")
        nearest = torch.cdist(x.flatten(1), self.known.flatten(1)).argmin(1)
        return self.known[nearest]


class ByGradient(TwoFaced):
    def attacked(self, x: Tensor) -> bool:
        return torch.is_grad_enabled()


class ByCall(TwoFaced):
    """The attacker of a process meets another face than those who ask the first five times."""

    def attacked(self, x: Tensor) -> bool:
        return self.calls > 5


class ByLeaf(TwoFaced):
    def attacked(self, x: Tensor) -> bool:
        return x.requires_grad


def judged(
    defense: Defense, data: ImageSet, attack: str = "pgd", mode: Mode = "full", draws: int = DRAWS
) -> Finding:
    """Craft a set, score it as another process does, and compare."""
    crafted = craft(parse_attack(attack), defense, mode, data, LINF, 0, BATCH)
    draws = draws if defense.stochastic else 1
    again = deepcopy(defense)
    for module in again.modules():
        if isinstance(module, TwoFaced):
            module.calls = 0
    scored = count_correct(again, crafted.images, data.labels, data.ids, 0, "score", draws, BATCH)
    answers = Answers.of(crafted, defense.stochastic)
    return same_answer("full/pgd", answers, scored, draws, rough=False)


@pytest.mark.parametrize("random", [False, True], ids=["deterministic", "random"])
@pytest.mark.parametrize("face", [ByGradient, ByCall, ByLeaf])
def test_a_defense_of_two_faces_is_caught(
    face: type[TwoFaced], random: bool, classifier: Classifier, test_set: ImageSet
) -> None:
    data = head(test_set, 2 * BATCH)
    purifier = face(data)
    purifier.stochastic = random
    found = judged(Defense(classifier, purifier).freeze(), data)
    assert found.level == "block" and not found.passed, found.detail


@pytest.mark.parametrize("attack", ["pgd", "apgd_ce", "square", "fgsm", "noise", "cw_l2"])
@pytest.mark.parametrize("purifier", [None, Blurred(), Noisy(0.2)])
def test_an_honest_defense_answers_alike(
    attack: str, purifier: Purifier | None, classifier: Classifier, test_set: ImageSet
) -> None:
    found = judged(Defense(classifier, purifier).freeze(), head(test_set, 60), attack)
    assert found.passed, found.detail


def test_one_draw_does_not_make_a_random_defense_deterministic(
    classifier: Classifier, test_set: ImageSet
) -> None:
    noisy = Defense(classifier, Noisy(0.2)).freeze()
    found = judged(noisy, head(test_set, 2 * BATCH), draws=1)
    assert found.passed and "when scored (p = " in found.detail, found.detail


@pytest.mark.parametrize("mode", ["bpda", "fixed_noise"])
def test_rungs_in_which_the_noise_or_the_derivative_is_another_pass_too(
    mode: Mode, classifier: Classifier, test_set: ImageSet
) -> None:
    for purifier in (Noisy(0.2), Rounded()):
        found = judged(Defense(classifier, purifier).freeze(), head(test_set, 60), "pgd", mode)
        assert found.passed, found.detail


def answers(right: list[int], fooled: list[bool], margin: list[float], asked: int = 1) -> Answers:
    return Answers(asked, np.array(fooled), np.array(right), np.array(margin, dtype=np.float32))


def test_only_margins_within_rounding_may_change_their_sign() -> None:
    scored = np.array([1, 0])
    edge = answers([0, 0], [True, True], [-1e-4, -0.5])
    assert same_answer("full/pgd", edge, scored, 1, rough=False).passed
    clear = answers([0, 0], [True, True], [-0.01, -0.5])
    assert not same_answer("full/pgd", clear, scored, 1, rough=False).passed
    believed = answers([1, 0], [True, True], [0.4, -0.5])
    assert not same_answer("full/pgd", believed, scored, 1, rough=False).passed


def test_margins_within_rounding_excuse_two_percent_of_the_images() -> None:
    """Long logits put every margin there, and would hide any other defense."""
    for n, most in ((10, 2), (200, 4)):
        for wrong, passes in ((most, True), (most + 1, False)):
            scored = np.array([1] * wrong + [0] * (n - wrong))
            given = answers([0] * n, [True] * n, [-1e-4] * n)
            for rough in (False, True):
                found = same_answer("full/pgd", given, scored, 1, rough)
                assert found.passed == passes, found.detail


def test_a_purifier_that_rounds_may_differ_on_two_percent() -> None:
    right, fooled, margin = [1] * 100, [False] * 100, [0.5] * 100
    for wrong, passes in ((2, True), (3, False)):
        scored = np.array([0] * wrong + [1] * (100 - wrong))
        given = answers(right, fooled, margin)
        assert same_answer("full/pgd", given, scored, 1, rough=True).passed == passes
        assert not same_answer("full/pgd", given, scored, 1, rough=False).passed
