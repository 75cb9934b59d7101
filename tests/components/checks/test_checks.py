"""Every check fires on the fault planted for it, and stays silent on an honest small defense."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from toys import LINF, Detached, Noisy, Rounded

from components import probes
from components.attacks import L2, AttackConfig, Linf, craft
from components.attacks.gradient import Fgsm, Pgd
from components.checks import scores, sets
from components.data.draws import Draws
from components.data.image_set import ImageSet
from components.evaluation.counting import Score
from components.models.accuracy import count_correct
from components.models.checkpoints import state_digest
from components.models.classifiers import Classifier
from components.models.defense import Defense, Mode
from components.models.purifiers import Purifier
from components.probes import Finding, models
from components.probes.contract import Accuracies


class Soft(Purifier):
    """An honest deterministic purifier: a slight blur."""

    def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
        return 0.8 * x + 0.2 * nn.functional.avg_pool2d(x, 3, 1, 1)


class SecretlyNoisy(Noisy):
    """Random, and says it is not."""

    stochastic = False

    def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
        return (x + 0.05 * torch.randn_like(x)).clamp(0, 1)


class SecretlyFixed(Soft):
    """Deterministic, and says it is random."""

    stochastic = True


class Often(Purifier):
    """Cuts the gradient of the images whose first pixels are brightest only."""

    def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
        minority = x.flatten(1).sum(1) > x.flatten(1).sum(1).quantile(0.9)
        return torch.where(minority[:, None, None, None], x.detach(), x)


class Nan(Purifier):
    """A gradient that is not a number, at a value that is."""

    def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
        return x + 0 * (x - x).sqrt()


class Head(nn.Module):
    """The shared classifier behind some function of its logits."""

    def __init__(self, classifier: Classifier, kind: str) -> None:
        super().__init__()
        self.classifier, self.kind = classifier, kind

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(x)
        if self.kind == "softmax":
            return logits.softmax(1)
        if self.kind == "constant":
            return 0 * logits + torch.arange(10.0)
        if self.kind == "nan":
            return logits * torch.nan
        if self.kind == "one nan":
            return torch.where(torch.arange(10) == 3, torch.nan, logits)
        raise AssertionError(self.kind)


def failed(findings: list[Finding], level: str = "block") -> list[str]:
    return [f.name for f in findings if not f.passed and f.level == level]


def probe(
    data: ImageSet, classifier: nn.Module, purifier: Purifier | None, modes: tuple[Mode, ...]
) -> list[Finding]:
    defense = Defense(classifier, purifier).freeze()
    return probes.probe(defense, modes, data, LINF, 0, 128, 4, None)


FULL: tuple[Mode, ...] = ("full",)
BOTH: tuple[Mode, ...] = ("full", "bpda")


# Honest defenses


@pytest.mark.parametrize("purifier", [None, Soft(), Noisy(0.05)], ids=["none", "soft", "noisy"])
def test_an_honest_defense_raises_no_doubt(
    purifier: Purifier | None, classifier: Classifier, test_set: ImageSet
) -> None:
    modes = FULL if purifier is None else BOTH
    findings = probe(test_set, classifier, purifier, modes)
    names = [finding.name for finding in findings]
    assert names == [
        "input_convention", "logits", "randomness_declared", "batch_independence", "labels_unseen",
        *(f"{name}/{mode}" for mode in modes for name in ("gradient_present", "loss_alive")),
        "gradient_correct", *(["eot_agreement"] if isinstance(purifier, Noisy) else []),
        "unbounded_by_gradient", "unbounded",
    ]  # fmt: skip
    assert failed(findings) == [] and failed(findings, "warn") == []
    assert all(finding.detail for finding in findings)


def test_probing_leaves_no_trace(classifier: Classifier, test_set: ImageSet) -> None:
    defense = Defense(classifier, Noisy(0.05)).freeze()
    before, stream = state_digest(defense), torch.get_rng_state()
    first = probes.probe(defense, BOTH, test_set, LINF, 0, 128, 4, None)
    assert state_digest(defense) == before and not defense.training
    assert torch.equal(torch.get_rng_state(), stream)
    assert probes.probe(defense, BOTH, test_set, LINF, 0, 128, 4, None) == first


# Gradients


@pytest.mark.parametrize(
    "purifier",
    [Rounded(7, differentiable=True), Detached(), Often(), Nan()],
    ids=lambda p: type(p).__name__,
)
def test_a_gradient_that_cannot_be_followed_is_named(
    purifier: Purifier, classifier: Classifier, test_set: ImageSet
) -> None:
    findings = probe(test_set, classifier, purifier, BOTH)
    assert "gradient_present/full" in failed(findings)
    assert "gradient_present/bpda" not in failed(findings)
    (found,) = [f for f in findings if f.name == "gradient_present/full"]
    share = float(found.detail.split("%")[0])
    assert 5 < share < 15 if isinstance(purifier, Often) else share == 100
    assert "nothing to follow" in found.detail


def test_rounding_leaves_an_unbounded_attack_helpless_on_its_own_gradient(
    classifier: Classifier, test_set: ImageSet
) -> None:
    findings = probe(test_set, classifier, Rounded(7, differentiable=True), FULL)
    assert failed(findings, "warn") == ["gradient_correct", "unbounded_by_gradient"]
    assert "unbounded" not in failed(findings), "an image of another class is another class"
    both = failed(probe(test_set, classifier, Rounded(7, differentiable=True), BOTH), "warn")
    assert both == ["gradient_correct"], "bpda gets there"


# Logits and randomness


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("softmax", "already softmaxed"),
        ("constant", "constant"),
        ("nan", "not finite"),
        ("one nan", "not finite"),
    ],
)
def test_logits_that_are_none_are_named(
    kind: str, said: str, classifier: Classifier, test_set: ImageSet
) -> None:
    findings = probe(test_set, Head(classifier, kind), None, FULL)
    assert "logits" in failed(findings)
    (found,) = [f for f in findings if f.name == "logits"]
    assert said in found.detail
    if kind == "constant":
        assert "unbounded" in failed(findings), "nothing changes what it says"


def test_logits_are_judged_as_such() -> None:
    sound = torch.tensor([[3.0, -1.0], [0.5, 2.0]])
    assert models.logits_sound(sound).passed
    assert models.logits_sound(torch.tensor([[0.3, 0.6], [0.2, 0.1]])).passed, "sums are not 1"
    assert not models.logits_sound(torch.tensor([[0.3, 0.7], [0.9, 0.1]])).passed
    assert not models.logits_sound(torch.tensor([[1.0, 2.0], [1.0, 2.0]])).passed
    assert not models.logits_sound(torch.tensor([[1.0, torch.inf], [1.0, 2.0]])).passed
    assert models.logits_sound(sound[:1]).passed, "one image varies with nobody"


@pytest.mark.parametrize(
    ("purifier", "declared"), [(SecretlyNoisy(), "deterministic"), (SecretlyFixed(), "stochastic")]
)
def test_randomness_that_is_not_as_declared_is_found(
    purifier: Purifier, declared: str, classifier: Classifier, test_set: ImageSet
) -> None:
    findings = probe(test_set, classifier, purifier, FULL)
    assert "randomness_declared" in failed(findings)
    (found,) = [f for f in findings if f.name == "randomness_declared"]
    assert f"declared {declared}" in found.detail


# Pixels


def test_pixels_are_between_0_and_1(test_set: ImageSet) -> None:
    pixels = test_set.pixels()
    assert models.convention(pixels).passed
    normalised = (pixels - pixels.mean()) / pixels.std()
    wrong = {
        "normalised": normalised,
        "0 to 255": 255 * pixels,
        "-1 to 1": 2 * pixels - 1,
        "divided twice": pixels / 255,
        "one grey": torch.full_like(pixels, 0.5),
        "a hair above": pixels + 0.01,
        "not a number": pixels.where(pixels > 0, torch.nan),
    }
    for name, images in wrong.items():
        found = models.convention(images)
        assert not found.passed and found.level == "block", name


def test_an_unbounded_attack_that_fails_is_a_fault(
    classifier: Classifier, test_set: ImageSet
) -> None:
    """A purifier that knows the answer, whatever it is shown: here, by drawing what it remembers
    of the images in their order.
    """

    class Oracle(Purifier):
        def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
            return test_set.pixels()[: len(x)] + 0 * x

    findings = probe(test_set, classifier, Oracle(), FULL)
    assert {"unbounded", "gradient_present/full"} <= set(failed(findings))
    assert "unbounded_by_gradient" in failed(findings, "warn")


# Stored sets


def check_stored_set(data: ImageSet, images: Tensor, **changes: Any) -> list[Finding]:
    facts = {"ids": data.ids, "labels": data.labels, "threat": LINF, **changes}
    return sets.stored_set("full/pgd", images, facts["ids"], facts["labels"], data, facts["threat"])


def attacked(data: ImageSet, factor: float = 1.0) -> Tensor:
    """Return images on the surface of the ball, or `factor` times as far away."""
    signs = torch.randn(data.images.shape, generator=torch.Generator().manual_seed(0)).sign()
    return (data.pixels() + factor * LINF.eps * signs).clamp(0, 1)


def test_a_sound_set_passes(test_set: ImageSet) -> None:
    findings = check_stored_set(test_set, attacked(test_set))
    assert [f.name for f in findings] == ["accounting/full/pgd", "threat_model/full/pgd"]
    assert failed(findings) == []
    assert failed(check_stored_set(test_set, attacked(test_set, 5), threat=None)) == [], (
        "it has no ball"
    )
    ball = L2(norm="l2", eps_l2=1.0)
    noise = ball.start(test_set.pixels(), Draws(0, "attack", test_set.ids), "start")
    assert failed(check_stored_set(test_set, noise, threat=ball)) == []


def test_images_outside_their_ball_are_found(test_set: ImageSet) -> None:
    one = attacked(test_set)
    one[77, 0, 3, 3] = (one[77, 0, 3, 3] + 0.3) % 1
    faults = {
        "twice the radius": attacked(test_set, 2),
        "a hair": attacked(test_set, 1.0001),
        "one pixel of one image": one,
        "16 bits": attacked(test_set).half().float(),
        "16 bits of the brain": attacked(test_set).bfloat16().float(),
        "truncated to 8 bits": (attacked(test_set) * 255 - 1).floor().clamp(0) / 255,
        "stored in 64 bits": attacked(test_set).double(),
        "below 0": attacked(test_set) - 0.01,
        "not a number": attacked(test_set).where(test_set.pixels() > 0, torch.nan),
    }
    for name, images in faults.items():
        assert failed(check_stored_set(test_set, images)) == ["threat_model/full/pgd"], name
    assert failed(check_stored_set(test_set, attacked(test_set) + 1, threat=None)) != []
    far = L2(norm="l2", eps_l2=0.5)
    assert failed(check_stored_set(test_set, attacked(test_set), threat=far)) != []


def test_sets_of_other_images_are_found(test_set: ImageSet) -> None:
    images, count = attacked(test_set), len(test_set)
    missing = torch.arange(count - 1)
    order = torch.arange(count).roll(1)
    faults = {
        "shifted ids": check_stored_set(test_set, images, ids=test_set.ids.roll(1)),
        "another id": check_stored_set(
            test_set, images, ids=test_set.ids + (torch.arange(count) == 5)
        ),
        "other labels": check_stored_set(test_set, images, labels=(test_set.labels + 1) % 10),
        "one missing": check_stored_set(
            test_set, images[missing], ids=test_set.ids[missing], labels=test_set.labels[missing]
        ),
        "another order": check_stored_set(
            test_set, images[order], ids=test_set.ids[order], labels=test_set.labels[order]
        ),
        "filtered": check_stored_set(
            test_set, images[:9], ids=test_set.ids[:9], labels=test_set.labels[:9]
        ),
    }
    for name, findings in faults.items():
        assert failed(findings) == ["accounting/full/pgd"], name


def test_images_shifted_against_their_ids_leave_the_ball(test_set: ImageSet) -> None:
    assert failed(check_stored_set(test_set, attacked(test_set).roll(1, 0))) == [
        "threat_model/full/pgd"
    ]


def test_a_set_of_another_model_is_a_transfer() -> None:
    same = {"classifier": ("a", "a"), "purifier": ("b", "b"), "data": ("c", "c")}
    assert sets.agreement("full/pgd", same).passed
    for part in same:
        found = sets.agreement("full/pgd", {**same, part: ("a", "z")})
        assert not found.passed and found.level == "block"
        assert f"another {part}" in found.detail and "transfer" in found.detail


# State


def test_the_recorded_accuracy_must_be_met() -> None:
    assert models.recorded_accuracy(96, 96, 100).passed
    for now in (95, 97, 0):
        assert not models.recorded_accuracy(now, 96, 100).passed
    assert models.recorded_accuracy(9590, 9600, 10_000).passed, "0.1 points, for another device"
    assert not models.recorded_accuracy(9589, 9600, 10_000).passed


def test_another_checkpoint_has_another_accuracy(
    classifier: Classifier, test_set: ImageSet
) -> None:
    def right(model: nn.Module) -> int:
        defense = Defense(model, None).freeze()
        pixels, labels, ids = test_set.pixels(), test_set.labels, test_set.ids
        return int(count_correct(defense, pixels, labels, ids, 0, "clean", 1, 250).sum())

    then, other = right(classifier), deepcopy(classifier)
    for parameter in other.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    assert models.recorded_accuracy(right(classifier), then, len(test_set)).passed
    assert not models.recorded_accuracy(right(other), then, len(test_set)).passed


def test_scoring_that_changes_the_model_is_found(
    classifier: Classifier, test_set: ImageSet
) -> None:
    model = deepcopy(classifier)
    before = state_digest(model)
    model(test_set.pixels())
    assert models.unchanged(before, state_digest(model), model.training).passed
    assert not models.unchanged(before, state_digest(model), True).passed
    model.train()(test_set.pixels())
    model.eval()
    found = models.unchanged(before, state_digest(model), model.training)
    assert not found.passed and "changed" in found.detail and found.level == "block"


# Orders


def accuracies(n: int, wrong: int, start: int = 0) -> Accuracies:
    """Return shares of `n` images, of which `wrong` from `start` on are fooled."""
    values = np.ones(n)
    values[start : start + wrong] = 0
    return values


def order(kinds: Mapping[str, tuple[str, Accuracies]], stochastic: bool = False) -> list[str]:
    return failed(scores.order_of_strength(kinds, stochastic))


def test_a_weak_attack_that_beats_all_stronger_ones_is_found() -> None:
    honest = {
        "full/noise": ("noise", accuracies(200, 10)),
        "full/fgsm": ("fgsm", accuracies(200, 40)),
        "full/pgd": ("pgd", accuracies(200, 60)),
        "full/apgd": ("apgd_ce", accuracies(200, 62)),
    }
    assert order(honest) == []
    assert order({**honest, "full/fgsm": ("fgsm", accuracies(200, 75))}) == [
        "order_of_strength/full/fgsm"
    ]
    elsewhere = {**honest, "full/noise": ("noise", accuracies(200, 15, start=100))}
    assert order(elsewhere) == [], "it fools others, but fewer: the union is stronger"
    chance = {**honest, "full/fgsm": ("fgsm", accuracies(200, 3, start=62))}
    assert order(chance) == [], "three images are chance"


def test_strong_attacks_are_judged_together() -> None:
    """PGD fools what APGD-CE misses, but APGD-T does not miss it."""
    both = {
        "full/pgd": ("pgd", accuracies(200, 80)),
        "full/apgd_ce": ("apgd_ce", accuracies(200, 50)),
        "full/apgd_t": ("apgd_t", accuracies(200, 60, start=40)),
    }
    assert order(both) == []
    two = {k: v for k, v in both.items() if k != "full/apgd_t"}
    assert order(two) == ["order_of_strength/full/pgd"]
    assert order(two, stochastic=True) == [], "under noise, steps of one's own choice gain nothing"
    weak = {**two, "full/fgsm": ("fgsm", accuracies(200, 120))}
    assert order(weak, stochastic=True) == ["order_of_strength/full/fgsm"]


def test_attacks_of_no_tier_are_judged_by_nobody() -> None:
    odd = {
        "full/square": ("square", accuracies(200, 150)),
        "full/cw": ("cw_l2", accuracies(200, 200)),
        "full/pgd": ("pgd", accuracies(200, 20)),
    }
    assert order(odd) == [] and order({}) == []
    for stochastic in (False, True):
        assert [f.name for f in scores.order_of_strength(odd, stochastic)] == []


def test_a_single_attack_below_the_headline_is_found() -> None:
    singles = {"full/pgd": accuracies(200, 100), "full/apgd": accuracies(200, 120)}
    assert scores.selection(accuracies(200, 130), singles).passed
    assert scores.selection(accuracies(200, 119), singles).passed, "half a point is noise"
    found = scores.selection(accuracies(200, 110), singles)
    assert not found.passed and found.level == "warn" and "full/apgd" in found.detail


def test_a_weaker_rung_that_beats_the_full_gradient_is_found() -> None:
    full = accuracies(300, 100)
    rungs = {"classifier": accuracies(300, 60), "bpda": accuracies(300, 100)}
    assert failed(scores.full_is_strongest(full, rungs)) == []
    rungs["bpda"] = accuracies(300, 130)
    findings = scores.full_is_strongest(full, rungs)
    assert failed(findings) == ["full_is_strongest/bpda"]
    assert [f.name for f in findings] == ["full_is_strongest/classifier", "full_is_strongest/bpda"]
    assert failed(scores.full_is_strongest(full, {"bpda": accuracies(300, 150, start=150)})) != []
    assert failed(scores.full_is_strongest(full, {"bpda": accuracies(300, 103)})) == [], "chance"


def test_many_rungs_do_not_make_chance_a_finding() -> None:
    """p = 1/128 for seven images fooled by one rung alone: a finding for one, not for twenty."""
    full, rung = accuracies(300, 0), accuracies(300, 7)
    assert failed(scores.full_is_strongest(full, {"bpda": rung})) == ["full_is_strongest/bpda"]
    many = {f"rung {k}": rung for k in range(20)}
    assert failed(scores.full_is_strongest(full, many)) == []


def test_accuracy_that_the_full_gradient_takes_away_is_called_an_illusion() -> None:
    full = accuracies(200, 150)
    rungs = {"classifier": accuracies(200, 20), "bpda": accuracies(200, 135)}
    (found,) = scores.illusions(rungs, full)
    assert (found.rung, found.seen, found.left) == ("classifier", 0.9, 0.25)
    assert scores.illusions({"bpda": accuracies(200, 150)}, full) == []


# The same, found by real attacks on real defenses


def attack_shares(
    defense: Defense, mode: Mode, data: ImageSet, **changes: Any
) -> tuple[str, Accuracies]:
    settings: dict[str, Any] = {
        "kind": "pgd", "steps": 10, "step": 0.25, "restarts": 1, "random_start": True,
        "early_stop": True, "eot": 1, **changes,
    }  # fmt: skip
    crafted = craft(Pgd(**settings), defense, mode, data, LINF, 0, 250)
    counts = count_correct(defense, crafted.images, data.labels, data.ids, 0, "score", 1, 250)
    return "pgd", Score(1, counts, counts).accuracy()


def test_bpda_beats_the_full_gradient_of_a_masked_defense_only(
    classifier: Classifier, test_set: ImageSet
) -> None:
    data = test_set[torch.arange(200)]
    for purifier, masked in ((Rounded(7, differentiable=True), True), (Soft(), False)):
        defense = Defense(classifier, purifier).freeze()
        full, bpda = (attack_shares(defense, mode, data)[1] for mode in BOTH)
        found = failed(scores.full_is_strongest(full, {"bpda": bpda}))
        assert found == (["full_is_strongest/bpda"] if masked else [])
        assert bool(scores.illusions({"full": full}, bpda)) == masked


def test_noise_beats_a_gradient_attack_that_follows_nothing(
    classifier: Classifier, test_set: ImageSet
) -> None:
    wide = Linf(norm="linf", eps_255=100.0)
    noise = TypeAdapter(AttackConfig).validate_python({"kind": "noise", "tries": 30})
    data = test_set[torch.arange(200)]
    still = {"kind": "bim", "steps": 5, "step": 0.2, "eot": 1}
    for purifier, masked in ((Rounded(7, differentiable=True), True), (Soft(), False)):
        defense = Defense(classifier, purifier).freeze()
        found = {}
        for kind, attack in (
            ("noise", noise),
            ("bim", TypeAdapter(AttackConfig).validate_python(still)),
        ):
            crafted = craft(attack, defense, "full", data, wide, 0, 250)
            found[f"full/{kind}"] = (kind, (~crafted.success).double().numpy())
        assert order(found) == (["order_of_strength/full/noise"] if masked else [])


def test_strength_is_that_of_the_full_gradient_or_of_everything_that_stands_for_it() -> None:
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
    assert not passed({"full": [far]}, ("soft",), False), "a gradient that is nil"
    assert passed({"soft": [far], "bpda": [far]}, ("soft",), False)
    assert passed({"bpda": [far]}, (), False)


def test_every_stand_in_is_to_be_tried() -> None:
    right = np.ones(4)
    (found,) = scores.stand_ins_tried(("direct", "plain"), {"direct": right}, None)
    assert not found.passed and found.level == "block" and "not tried: plain" in found.detail
    (found,) = scores.stand_ins_tried(("direct",), {"direct": right}, right)
    assert found.passed
    assert scores.stand_ins_tried((), {}, right) == []
