"""Checks of scores: attacks and rungs in their order of strength, on made-up and real scores."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from toy_networks import Blurred, Rounded
from toys import ATTACKS, LINF, distances, failed, head, linear_task, parse_attack

from components.attacks import Attack, Linf, craft
from components.attacks.apgd import ApgdCe, ApgdDlr, ApgdT
from components.attacks.autoattack import AutoAttack
from components.attacks.distance.cw import CwL2
from components.attacks.distance.fab import FabT
from components.attacks.gradient import Bim, Fgsm, Noise, Pgd, log_odds
from components.attacks.square import Square
from components.checks import scores
from components.data.image_set import ImageSet
from components.evaluation.counting import Score
from components.models.accuracy import count_correct
from components.models.classifiers import Classifier
from components.models.defense import Defense, Mode, margin
from components.models.purifiers import Purifier
from components.probes.contract import Accuracies, Finding


def accuracies(n: int, wrong: int, start: int = 0) -> Accuracies:
    """Return accuracies of `n` images, of which `wrong` from `start` on are fooled."""
    values = np.ones(n)
    values[start : start + wrong] = 0
    return values


def transferred(n: int, **wrong: int) -> list[str]:
    """Return which baselines fool too many of `n` images, of which the own attacks fool three."""
    own = accuracies(n, 3, start=n - 3)
    added = {name: np.minimum(own, accuracies(n, count)) for name, count in wrong.items()}
    return failed(scores.transfer_attack(own, added))


def test_examples_of_another_classifier_fool_no_more_than_five_points_further() -> None:
    assert transferred(100) == [] and transferred(1000, none=50) == []
    assert transferred(1000, none=51) == ["transfer_attack/none"]
    # 2^-6 = 0.016 and 2^-7 = 0.008 that so many of 100 images were fooled by chance.
    assert transferred(100, none=6) == []
    assert transferred(100, none=7) == ["transfer_attack/none"]
    # Of two baselines each p-value counts double: 2^-7 = 0.008 for eight images.
    assert transferred(100, none=7, robust=0) == []
    assert transferred(100, none=0, robust=8) == ["transfer_attack/robust"]
    assert transferred(20, none=3) == [], "three of few images"


def test_a_random_defense_is_not_blamed_for_another_draw() -> None:
    """Ten points less on average, but as many images are right more often as less often."""
    own = np.tile([1.0, 0.5], 50)
    found = scores.transfer_attack(own, {"none": np.tile([0.7, 0.6], 50)})
    assert failed(found) == [] and "a further 10.0% of 100 images" in found[0].detail


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


def test_images_of_a_caller_are_tested_by_themselves() -> None:
    """They must not weaken the test of another rung: p = 1/128 is significant for one alone."""
    full, rung, harmless = accuracies(300, 0), accuracies(300, 7), accuracies(300, 0)
    others = {"given": harmless, "bpda": rung}
    assert failed(scores.full_is_strongest(full, others)) == ["full_is_strongest/bpda"]
    many = {f"rung {k}": harmless for k in range(20)}
    found = failed(scores.full_is_strongest(full, {**many, "given": rung}))
    assert found == ["full_is_strongest/given"]


def test_a_rung_far_above_white_box_accuracy_is_an_illusion() -> None:
    full = accuracies(200, 150)
    rungs = {"classifier": accuracies(200, 20), "bpda": accuracies(200, 135)}
    (found,) = scores.illusions(rungs, full)
    assert (found.rung, found.seen, found.left) == ("classifier", 0.9, 0.25)
    assert scores.illusions({"bpda": accuracies(200, 150)}, full) == []


FAR = Pgd(kind="pgd", steps=20, step=0.1, restarts=1, random_start=True, early_stop=True, eot=1)
NEAR = Fgsm(kind="fgsm", random_start=False, step=1, eot=1)
CE = ApgdCe(kind="apgd_ce", steps=20, restarts=1, eot=1)
DLR = ApgdDlr(kind="apgd_dlr", steps=20, restarts=1, eot=1)
TARGETED = ApgdT(kind="apgd_t", steps=20, targets=3, eot=1)
FAB = FabT(kind="fab_t", steps=20, targets=2, restarts=1)
CW = CwL2(kind="cw_l2", c=1, searches=1, steps=99, learning_rate=0.1, confidence=0, eot=1)
BOTH = [FAR, DLR]


def strong(
    rungs: Mapping[str, Sequence[Attack]], stand_ins: Sequence[str] = (), usable: bool = True,
    classes: int = 10, void: Sequence[str] = (),
) -> bool:  # fmt: skip
    found = scores.strong_enough(rungs, stand_ins, usable, classes, void)
    assert found.level == "block" and found.name == "strong_attack"
    return found.passed


def test_strong_attacks_on_the_full_gradient_or_on_all_its_stand_ins_are_required() -> None:
    every = ("direct", "plain")
    whole = {"plain": BOTH, "direct": BOTH, "bpda": BOTH}
    assert strong({"full": [NEAR, *BOTH]}, every)
    assert not strong({"full": [NEAR]}) and not strong({})
    assert not strong({"plain": BOTH}, every), "one stand-in alone"
    assert not strong({"plain": BOTH, "direct": BOTH}, every), "without BPDA"
    assert not strong({**whole, "direct": [NEAR]}, every)
    assert not strong({**whole, "direct": [FAR]}, every), "cross-entropy alone on a stand-in"
    assert strong(whole, every)
    assert not strong({"full": BOTH}, ("soft",), usable=False), "a gradient of zero"
    assert strong({"soft": BOTH, "bpda": BOTH}, ("soft",), usable=False)
    assert strong({"bpda": BOTH}, usable=False)
    assert not strong({"full": [FAR], "bpda": [DLR]}), "on two rungs"


def test_a_claim_takes_both_families_of_losses() -> None:
    assert not strong({"full": [FAR, CE]}), "cross-entropy alone"
    assert not strong({"full": [DLR, TARGETED, FAB]}), "margins alone"
    for other in (DLR, TARGETED, FAB):
        assert strong({"full": [CE, other]})
    assert not strong({"full": [CE, CW]}), "an attack without a ball"
    assert strong({"full": [AutoAttack(kind="autoattack", version="standard")]})
    short = DLR.model_copy(update={"steps": 9})
    assert not strong({"full": [CE, short]}), "nine steps"
    found = scores.strong_enough({"full": [CE]}, (), True, 10)
    assert "missing: margin on full" in found.detail


def test_two_classes_have_one_loss() -> None:
    logits, labels = torch.randn(50, 2), torch.arange(50) % 2
    assert torch.equal(log_odds(logits, labels).float(), -margin(logits, labels))
    assert strong({"full": [CE]}, classes=2) and not strong({"full": [CE]}, classes=3)
    assert strong({"full": [CE, DLR]}, classes=3)


@pytest.mark.parametrize(
    ("steps", "step", "sound"),
    [
        (10, 0.2, True), (20, 0.1, True), (40, 0.05, True), (10, 0.5, True), (3, 0.5, False),
        (9, 0.25, False), (10, 0.15, False), (40, 1 / 30, False), (1000, 0.001, False),
        (10, 0.51, False), (20, 2.0, False), (100, 10.0, False),
    ],
)  # fmt: skip
def test_the_steps_of_pgd_are_neither_too_few_nor_too_short_nor_too_long(
    steps: int, step: float, sound: bool
) -> None:
    pgd = FAR.model_copy(update={"steps": steps, "step": step})
    assert (
        pgd.strong()
        == Bim(kind="bim", steps=steps, step=step, early_stop=True, eot=1).strong()
        == sound
    )


def test_every_attack_but_noise_says_what_it_climbs() -> None:
    for name in ATTACKS:
        assert bool(parse_attack(name).losses) == (name != "noise"), name


def test_on_a_linear_model_the_cross_entropy_leaves_what_margins_do_not() -> None:
    """The exact robust accuracy is 50 %: why a claim takes both families."""
    model, data = linear_task(5, 400)
    eps = distances(model, data, 1).quantile(0.5).item()
    left = {}
    for attack in (FAR, CE, DLR, TARGETED):
        threat, defense = Linf(norm="linf", eps_255=255 * eps), Defense(model, None).freeze()
        crafted = craft(attack, defense, "full", data, threat, 0, 400)
        left[attack.kind] = float((~crafted.success).float().mean())
    assert left["pgd"] > 0.53 and left["apgd_ce"] > 0.53
    assert left["apgd_dlr"] < 0.51 and left["apgd_t"] < 0.51


def gradients(*failed_names: str) -> list[Finding]:
    names = ["gradient_present/full", "loss_alive/full", "loss_alive/bpda", "gradient_present/bpda"]
    return [
        Finding(name=name, level="warn", passed=name not in failed_names, detail="")
        for name in names
    ]


def test_a_rung_without_a_gradient_is_void() -> None:
    assert scores.void_rungs(gradients(), {"full": [CE]}) == frozenset()
    assert scores.void_rungs(gradients("gradient_present/full"), {"full": BOTH}) == {"full"}
    assert scores.void_rungs([], {"full": [CE]}) == frozenset()


def test_a_flat_loss_voids_a_rung_unless_a_strong_attack_on_a_margin_stands_on_it() -> None:
    flat = gradients("loss_alive/full")
    assert scores.void_rungs(flat, {"full": [CE], "bpda": BOTH}) == {"full"}
    assert scores.void_rungs(flat, {}) == {"full"}
    for other in (DLR, TARGETED, FAB):
        assert scores.void_rungs(flat, {"full": [CE, other]}) == frozenset()
    assert scores.void_rungs(flat, {"full": [CE, DLR.model_copy(update={"steps": 9})]}) == {"full"}
    square = Square(kind="square", queries=5000, eot=1)
    assert scores.void_rungs(flat, {"full": [CE, square, CW]}) == {"full"}


def test_no_claim_rests_on_a_void_rung() -> None:
    rungs = {"full": BOTH, "soft": BOTH, "bpda": BOTH}
    assert strong(rungs, void=["soft"]) and not strong(rungs, void=["full"])
    assert strong(rungs, ("soft",), void=["full"]), "all stand-ins carry it"
    assert not strong(rungs, ("soft",), void=["full", "bpda"])
    assert "void: full" in scores.strong_enough(rungs, (), True, 10, ["full"]).detail


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
    for attack in (
        Noise(kind="noise", tries=30),
        Bim(kind="bim", steps=5, step=0.2, early_stop=True, eot=1),
    ):
        crafted = craft(attack, defense, "full", data, wide, 0, 250)
        found[f"full/{attack.kind}"] = (attack.kind, (~crafted.success).double().numpy())
    assert beaten(found) == (["order_of_strength/full/noise"] if masked else [])


def test_where_gradients_decide_nothing_an_attack_without_any_is_asked_for() -> None:
    pgd, square = parse_attack("pgd"), parse_attack("square", queries=100)
    apgd_t = parse_attack("apgd_t", steps=10)
    undecided = Finding(
        name="gradient_honest/full",
        level="warn",
        passed=False,
        detail="",
        figures={"undecided": 1.0},
    )

    def passes(attacks: list[Attack], *findings: Finding, **traits: bool) -> bool:
        facts = {"stochastic": False, "differentiable": True, **traits}
        return scores.without_gradients({"full": attacks}, findings, **facts).passed

    assert passes([pgd])
    assert not passes([pgd], differentiable=False) and passes([pgd, square], differentiable=False)
    assert passes([pgd], differentiable=False, stochastic=True), "noise is no rounding"
    assert not passes([pgd], undecided) and not passes([pgd, square], undecided)
    assert passes([square, apgd_t], undecided)
    behind = undecided.model_copy(update={"name": "gradient_honest/soft"})
    assert not passes([square], behind) and passes([square, apgd_t], behind)
    assert passes([square, parse_attack("fab_t", steps=10)], undecided)
    assert passes([parse_attack("autoattack")], undecided)
    assert passes([parse_attack("flip", steps=20, candidates=5)], differentiable=False)
    rounds = {"differentiable": False}
    assert not passes([parse_attack("square", queries=99)], **rounds), "too few to say anything"
    assert not passes([parse_attack("flip", steps=11, candidates=9)], **rounds)
    assert not passes([square, parse_attack("apgd_t", steps=9)], undecided)
    assert not passes([square, parse_attack("fab_t", steps=9)], undecided)
    rand = parse_attack("autoattack", version="rand")
    assert not passes([rand, square], undecided, stochastic=True), "it targets no class"
    assert not passes([rand, apgd_t], undecided, stochastic=True), "and has no Square"


def test_a_useless_gradient_voids_its_rung() -> None:
    useless = Finding(name="gradient_pays/full", level="warn", passed=False, detail="")
    assert scores.void_rungs([useless], {"full": BOTH, "bpda": BOTH}) == {"full"}


def test_a_wrong_gradient_voids_its_rung_and_an_undecided_one_does_not() -> None:
    wrong = Finding(name="gradient_honest/full", level="warn", passed=False, detail="")
    assert scores.void_rungs([wrong], {}) == {"full"}
    undecided = wrong.model_copy(update={"figures": {"undecided": 1.0}})
    assert scores.void_rungs([undecided], {}) == frozenset()


def test_a_quick_ladder_is_excused_for_what_it_leaves_out_and_for_nothing_else() -> None:
    weak = scores.strong_enough({"full": [parse_attack("fgsm")]}, (), True, 10)
    excused = scores.excused(weak)
    assert not weak.passed and weak.level == "block"
    assert (excused.level, excused.asked, excused.passed) == ("warn", False, False)
    full, rung = accuracies(300, 0), accuracies(300, 20)
    for other in scores.full_is_strongest(full, {"given": rung, "bpda": rung}):
        assert not other.passed
        assert scores.excused(other).asked == (other.name == "full_is_strongest/bpda")
    (other,) = scores.transfer_attack(accuracies(100, 0), {"none": accuracies(100, 50)})
    assert not other.passed and scores.excused(other) is other
