"""Checks of scores: attacks and rungs in their order of strength, on made-up and real scores."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from toys import LINF, Blurred, Rounded, failed, head

from components.attacks import Linf, craft
from components.attacks.gradient import Bim, Fgsm, Noise, Pgd
from components.checks import scores
from components.data.image_set import ImageSet
from components.evaluation.counting import Score
from components.models.accuracy import count_correct
from components.models.classifiers import Classifier
from components.models.defense import Defense, Mode
from components.models.purifiers import Purifier
from components.probes.contract import Accuracies


def accuracies(n: int, wrong: int, start: int = 0) -> Accuracies:
    """Return accuracies of `n` images, of which `wrong` from `start` on are fooled."""
    values = np.ones(n)
    values[start : start + wrong] = 0
    return values


def beaten(kinds: Mapping[str, tuple[str, Accuracies]], stochastic: bool = False) -> list[str]:
    return failed(scores.order_of_strength(kinds, stochastic))


def test_an_attack_that_beats_all_stronger_ones_is_reported() -> None:
    honest = {
        "full/noise": ("noise", accuracies(200, 10)),
        "full/fgsm": ("fgsm", accuracies(200, 40)),
        "full/pgd": ("pgd", accuracies(200, 60)),
        "full/apgd": ("apgd_ce", accuracies(200, 62)),
    }
    assert beaten(honest) == []
    assert beaten({**honest, "full/fgsm": ("fgsm", accuracies(200, 75))}) == [
        "order_of_strength/full/fgsm"
    ]
    elsewhere = {**honest, "full/noise": ("noise", accuracies(200, 15, start=100))}
    assert beaten(elsewhere) == [], "it fools other images, but fewer than the stronger ones"
    chance = {**honest, "full/fgsm": ("fgsm", accuracies(200, 3, start=62))}
    assert beaten(chance) == [], "three images may be chance"


def test_an_attack_is_compared_with_all_stronger_ones_together() -> None:
    """PGD fools what APGD-CE misses, but APGD-T does not miss it."""
    both = {
        "full/pgd": ("pgd", accuracies(200, 80)),
        "full/apgd_ce": ("apgd_ce", accuracies(200, 50)),
        "full/apgd_t": ("apgd_t", accuracies(200, 60, start=40)),
    }
    assert beaten(both) == []
    two = {k: v for k, v in both.items() if k != "full/apgd_t"}
    assert beaten(two) == ["order_of_strength/full/pgd"]
    assert beaten(two, stochastic=True) == [], "under noise adaptive steps gain nothing"
    weak = {**two, "full/fgsm": ("fgsm", accuracies(200, 120))}
    assert beaten(weak, stochastic=True) == ["order_of_strength/full/fgsm"]


def test_attacks_without_a_tier_are_not_compared() -> None:
    odd = {
        "full/square": ("square", accuracies(200, 150)),
        "full/cw": ("cw_l2", accuracies(200, 200)),
        "full/pgd": ("pgd", accuracies(200, 20)),
    }
    assert beaten(odd) == [] and beaten({}) == []
    for stochastic in (False, True):
        assert [f.name for f in scores.order_of_strength(odd, stochastic)] == []


def test_a_single_attack_below_the_headline_is_reported() -> None:
    singles = {"full/pgd": accuracies(200, 100), "full/apgd": accuracies(200, 120)}
    assert scores.selection(accuracies(200, 130), singles).passed
    assert scores.selection(accuracies(200, 119), singles).passed, "half a point may be noise"
    found = scores.selection(accuracies(200, 110), singles)
    assert not found.passed and found.level == "warn" and "full/apgd" in found.detail


def test_a_weaker_rung_that_beats_the_full_gradient_is_reported() -> None:
    full = accuracies(300, 100)
    rungs = {"classifier": accuracies(300, 60), "bpda": accuracies(300, 100)}
    assert failed(scores.full_is_strongest(full, rungs)) == []
    rungs["bpda"] = accuracies(300, 130)
    findings = scores.full_is_strongest(full, rungs)
    assert failed(findings) == ["full_is_strongest/bpda"]
    assert [f.name for f in findings] == ["full_is_strongest/classifier", "full_is_strongest/bpda"]
    assert failed(scores.full_is_strongest(full, {"bpda": accuracies(300, 150, start=150)})) != []
    assert failed(scores.full_is_strongest(full, {"bpda": accuracies(300, 103)})) == [], "chance"


def test_chance_among_many_rungs_is_not_reported() -> None:
    """p = 1/128 for seven images fooled by one rung alone: significant for one rung, not for 20."""
    full, rung = accuracies(300, 0), accuracies(300, 7)
    assert failed(scores.full_is_strongest(full, {"bpda": rung})) == ["full_is_strongest/bpda"]
    many = {f"rung {k}": rung for k in range(20)}
    assert failed(scores.full_is_strongest(full, many)) == []


def test_a_rung_far_above_white_box_accuracy_is_an_illusion() -> None:
    full = accuracies(200, 150)
    rungs = {"classifier": accuracies(200, 20), "bpda": accuracies(200, 135)}
    (found,) = scores.illusions(rungs, full)
    assert (found.rung, found.seen, found.left) == ("classifier", 0.9, 0.25)
    assert scores.illusions({"bpda": accuracies(200, 150)}, full) == []


def test_a_strong_attack_on_the_full_gradient_or_on_all_its_stand_ins_is_required() -> None:
    far = Pgd(kind="pgd", steps=20, step=0.1, restarts=1, random_start=True, early_stop=True, eot=1)
    near = Fgsm(kind="fgsm", random_start=False, step=1, eot=1)
    every = ("direct", "plain")

    def passed(rungs: dict[str, list[Any]], stand_ins: tuple[str, ...], usable: bool) -> bool:
        found = scores.strong_enough(rungs, stand_ins, usable)
        assert found.level == "block"
        return found.passed

    assert passed({"full": [near, far]}, every, True)
    assert not passed({"full": [near]}, (), True) and not passed({}, (), True)
    assert not passed({"plain": [far]}, every, True), "one stand-in alone"
    assert not passed({"plain": [far], "direct": [far]}, every, True), "without BPDA"
    assert not passed({"plain": [far], "direct": [near], "bpda": [far]}, every, True)
    assert passed({"plain": [far], "direct": [far], "bpda": [far]}, every, True)
    assert not passed({"full": [far]}, ("soft",), False), "a gradient of zero"
    assert passed({"soft": [far], "bpda": [far]}, ("soft",), False)
    assert passed({"bpda": [far]}, (), False)


def test_every_stand_in_must_have_been_tried() -> None:
    right = np.ones(4)
    (found,) = scores.stand_ins_tried(("direct", "plain"), {"direct": right}, None)
    assert not found.passed and found.level == "block" and "not tried: plain" in found.detail
    (found,) = scores.stand_ins_tried(("direct",), {"direct": right}, right)
    assert found.passed
    assert scores.stand_ins_tried((), {}, right) == []


# Real attacks on real defenses


PGD = Pgd(kind="pgd", steps=10, step=0.25, restarts=1, random_start=True, early_stop=True, eot=1)


def attack_accuracies(defense: Defense, mode: Mode, data: ImageSet) -> Accuracies:
    crafted = craft(PGD, defense, mode, data, LINF, 0, 250)
    counts = count_correct(defense, crafted.images, data.labels, data.ids, 0, "score", 1, 250)
    return Score(1, counts, counts).accuracy()


@pytest.mark.parametrize(
    ("purifier", "masked"), [(Rounded(7, differentiable=True), True), (Blurred(), False)]
)
def test_bpda_beats_the_full_gradient_of_a_masked_defense_only(
    purifier: Purifier, masked: bool, classifier: Classifier, test_set: ImageSet
) -> None:
    data = head(test_set, 200)
    defense = Defense(classifier, purifier).freeze()
    full, bpda = (attack_accuracies(defense, mode, data) for mode in ("full", "bpda"))
    found = failed(scores.full_is_strongest(full, {"bpda": bpda}))
    assert found == (["full_is_strongest/bpda"] if masked else [])
    assert bool(scores.illusions({"full": full}, bpda)) == masked


@pytest.mark.parametrize(
    ("purifier", "masked"), [(Rounded(7, differentiable=True), True), (Blurred(), False)]
)
def test_noise_beats_a_gradient_attack_on_a_masked_defense_only(
    purifier: Purifier, masked: bool, classifier: Classifier, test_set: ImageSet
) -> None:
    wide = Linf(norm="linf", eps_255=100.0)
    data = head(test_set, 200)
    defense = Defense(classifier, purifier).freeze()
    found = {}
    for attack in (Noise(kind="noise", tries=30), Bim(kind="bim", steps=5, step=0.2, eot=1)):
        crafted = craft(attack, defense, "full", data, wide, 0, 250)
        found[f"full/{attack.kind}"] = (attack.kind, (~crafted.success).double().numpy())
    assert beaten(found) == (["order_of_strength/full/noise"] if masked else [])
