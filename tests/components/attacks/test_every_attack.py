"""Every kind of attack keeps the contract of `limpid.testing`; and what holds for ours besides."""

from itertools import groupby, pairwise
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from toy_networks import Constant, Noisy, Rounded, listening
from toys import ATTACK_VARIANTS, ATTACKS, LINF, THREATS, fooled, head, parse_attack, true_margins

from components.attacks import (
    L2,
    AttackConfig,
    Linf,
    a3,
    autoattack,
    craft,
)
from components.data.draws import Draws
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.defense import Defense
from limpid.testing import Check, attack_checks

# Where an attack does not apply, and raises ValueError.
REFUSES = {
    "a3": {"stochastic"},
    "autoattack": {"stochastic"},
    "fab_t": {"stochastic"},
    "flip": {"l2"},
    "mi_fgsm": {"l2", "stochastic"},
}
GRADIENT_FREE = ("noise", "square")
# Attacks that rank the images of a batch: another batch gives another result.
RANKING = ("a3",)
# Attacks without random choices. FAB draws noise for restarts only, and here none is needed.
UNSEEDED = (
    "fgsm", "bim", "mi_fgsm", "cw_l2", "deepfool", "elastic_net", "fab_t", "flip",
    "detector_aware", "detector_aware, classifier",
)  # fmt: skip
# Attacks that do not stop early, but leave an image that is misclassified from the start.
UNMOVED = ("detector_aware", "detector_aware, classifier", "deepfool", "elastic_net", "mi_fgsm")
EVERY = pytest.mark.parametrize("name", [*ATTACKS, *ATTACK_VARIANTS])


@pytest.fixture(autouse=True)
def _short_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten AutoAttack and A3, whose own lengths are tested in files of their own."""
    for name, value in (("STEPS", 10), ("TARGETS", 3), ("QUERIES", 40)):
        monkeypatch.setattr(autoattack, name, value)
    short = (a3.Round(0.5, 3, 8), a3.Round(0.2, 3, 8, 4))
    for name in ("BY_MARGIN", "BY_DIRECTION"):
        monkeypatch.setattr(a3, name, short)


def refuses(
    name: str, defense: Defense, data: ImageSet, threat: Linf | L2 = LINF, mode: Any = "full"
) -> bool:
    """Say whether an attack does not apply here, after checking that it raises ValueError."""
    here = {"l2"} if isinstance(threat, L2) else set()
    here |= {"stochastic"} if defense.stochastic else set()
    if not REFUSES.get(name, set()) & here:
        return False
    with pytest.raises(ValueError, match=name):
        craft(parse_attack(name), defense, mode, data, threat, 0, len(data))
    return True


def test_the_toys_cover_every_kind_of_attack() -> None:
    members = get_args(get_args(AttackConfig)[0])
    kinds = {kind for m in members for kind in get_args(m.model_fields["kind"].annotation)}
    assert kinds == set(ATTACKS)


@EVERY
@pytest.mark.parametrize("check", attack_checks(shape=(1, 8, 8)), ids=str)
def test_every_kind_keeps_the_contract(name: str, check: Check) -> None:
    if check.name == "the_batch_size_changes_no_image" and name in RANKING:
        with pytest.raises(AssertionError, match="iterations differ"):
            check(lambda: parse_attack(name))
    else:
        check(lambda: parse_attack(name))


@EVERY
@THREATS
@pytest.mark.parametrize("stochastic", [False, True], ids=["deterministic", "stochastic"])
def test_success_is_measured_on_the_returned_images(
    name: str, threat: Linf | L2, stochastic: bool, classifier: Classifier, test_set: ImageSet
) -> None:
    attack, data = parse_attack(name), head(test_set, 40)
    defense = Defense(classifier, Noisy() if stochastic else None).freeze()
    if refuses(name, defense, data, threat):
        return
    crafted = craft(attack, defense, "full", data, threat, 0, 25)
    assert torch.equal(crafted.ids, data.ids) and torch.equal(crafted.labels, data.labels)
    draws = Draws(0, "attack", data.ids)
    right = torch.cat([
        defense(crafted.images[rows], draws[rows]).argmax(1) == data.labels[rows]
        for rows in (torch.arange(25), torch.arange(25, 40))
    ])  # fmt: skip
    assert torch.equal(crafted.success, ~right)
    clean = (defense(data.pixels(), draws).argmax(1) != data.labels).sum()
    assert fooled(crafted) >= clean
    assert (crafted.forward > 0).all()
    assert crafted.iterations.dtype == crafted.forward.dtype == torch.int64
    if name not in GRADIENT_FREE:
        assert (crafted.backward > 0)[~crafted.success].all()
        assert (crafted.backward <= crafted.forward).all() or name == "deepfool"
    else:
        assert not crafted.backward.any()


@EVERY
@THREATS
def test_every_attack_lowers_the_accuracy(
    name: str, threat: Linf | L2, classifier: Classifier, test_set: ImageSet
) -> None:
    data = head(test_set, 100)
    defense = Defense(classifier, None).freeze()
    if refuses(name, defense, data, threat):
        return
    crafted = craft(parse_attack(name), defense, "full", data, threat, 0, 100)
    clean = int((classifier(data.pixels()).argmax(1) != data.labels).sum())
    assert fooled(crafted) >= clean + {"noise": 0, "flip": 0, "square": 3, "r_fgsm": 5}.get(
        name, 10
    )
    assert not torch.equal(crafted.images, data.pixels())


@EVERY
@pytest.mark.parametrize("stochastic", [False, True], ids=["deterministic", "stochastic"])
def test_other_seeds_give_other_noise(
    name: str, stochastic: bool, classifier: Classifier, test_set: ImageSet
) -> None:
    defense = Defense(classifier, Noisy() if stochastic else None).freeze()
    data = head(test_set, 16)
    if refuses(name, defense, data):
        return
    one = craft(parse_attack(name), defense, "full", data, LINF, 0, 16)
    other = craft(parse_attack(name), defense, "full", data, LINF, 1, 16)
    seeded = stochastic or name not in UNSEEDED
    assert torch.equal(one.images, other.images) != seeded


@EVERY
def test_the_order_of_a_batch_changes_no_byte(
    name: str, classifier: Classifier, test_set: ImageSet
) -> None:
    stochastic, data = Defense(classifier, Noisy()).freeze(), head(test_set, 24)
    deterministic = "stochastic" in REFUSES.get(name, set())
    defense = Defense(classifier, None).freeze() if deterministic else stochastic
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    whole = craft(parse_attack(name), defense, "full", data, LINF, 0, 24)
    shuffled = craft(parse_attack(name), defense, "full", data[order], LINF, 0, 24)
    assert torch.equal(shuffled.images, whole.images[order])


@pytest.mark.parametrize("name", UNMOVED)
def test_a_misclassified_image_stays_though_the_attack_never_stops_early(
    name: str, classifier: Classifier, test_set: ImageSet
) -> None:
    attack, data = parse_attack(name), head(test_set, 12)
    wrong = ImageSet(data.images, (data.labels + 1) % 10, data.ids, data.class_names)
    crafted = craft(attack, Defense(classifier, None).freeze(), "full", wrong, LINF, 0, 12)
    assert not attack.stops_early()
    assert torch.equal(crafted.images, wrong.pixels())


@pytest.mark.parametrize("name", ["noise", "pgd", "apgd_ce", "apgd_t"])
def test_an_image_with_nan_logits_is_kept(name: str) -> None:
    """Random starts find it, and no image with a finite margin replaces it."""

    class Broken(Constant):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).where(x.mean((1, 2, 3))[:, None] < 0.505, torch.nan)

    grey = torch.full((30, 1, 4, 4), 128, dtype=torch.uint8)
    data = ImageSet(grey, torch.zeros(30).long(), torch.arange(30), tuple("0123"))
    changes = {"noise": {"tries": 40}, "apgd_t": {"targets": 3}, "pgd": {"restarts": 40}}
    attack = parse_attack(name, **{"apgd_ce": {"restarts": 40}, **changes}[name])
    defense = Defense(Broken([4.0, 3.0, 2.0, 1.0]), None).freeze()
    crafted = craft(attack, defense, "full", data, LINF, 0, 30)
    assert crafted.success.float().mean() > (0.8 if name == "apgd_t" else 0.99)


def test_no_attack_stops_early_on_a_stochastic_defense(
    classifier: Classifier, test_set: ImageSet
) -> None:
    data = head(test_set, 40)
    stochastic = Defense(classifier, Noisy()).freeze()
    deterministic = Defense(classifier, None).freeze()
    for name, effort in (("pgd", 16), ("bim", 8), ("apgd_ce", 18), ("fgsm", 1)):
        crafted = craft(parse_attack(name), stochastic, "full", data, LINF, 0, 40)
        assert crafted.iterations.tolist() == [effort] * 40
        assert (crafted.backward == 2 * effort).all(), "eot: 2 draws per gradient"
        early = craft(parse_attack(name), deterministic, "full", data, LINF, 0, 40)
        assert (early.iterations <= effort).all() and early.success.any()
        if effort > 1:
            assert early.iterations[early.success].float().mean() < 0.75 * effort
        assert (early.iterations[~early.success] == effort).all()


@EVERY
def test_queries_are_numbered_without_gaps(
    name: str, classifier: Classifier, test_set: ImageSet
) -> None:
    """The queries about the finished images have numbers below 0.

    Only images that are compared with each other share a number; draw 0 is used again, to rank the
    target classes and to decide about success.
    """
    asked: set[int] = set()
    followed: list[int] = []
    judged: list[int] = []

    def record(draws: Draws) -> None:
        assert draws.role == "attack"
        if draws.draw < 0:
            asked.add(draws.draw)
        else:
            (followed if torch.is_grad_enabled() else judged).append(draws.draw)

    defense = listening(classifier, record).freeze()
    if refuses(name, defense, head(test_set, 8)):
        return
    followed.clear()
    judged.clear()
    craft(parse_attack(name), defense, "full", head(test_set, 8), LINF, 0, 8)
    assert asked == {-1, -2, -3, -4}
    assert len({*followed, *judged} - {0}) == max(*followed, *judged), "a draw was skipped"
    if not name.startswith("detector_aware"):
        # At the end of a search five images are compared under the same draws, one after another.
        queries = [draw for draw, _ in groupby(judged) if draw]
        assert len(queries) == len(set(queries))


def test_the_lowest_margin_is_kept(classifier: Classifier, test_set: ImageSet) -> None:
    """More tries, steps or restarts of the same attack never leave an image with more margin."""
    data = head(test_set, 60)
    defense = Defense(classifier, None).freeze()
    ladders: list[tuple[str, str, tuple[int, ...]]] = [
        ("noise", "tries", (1, 3, 10)),
        ("pgd", "steps", (1, 4, 12)),
        ("pgd", "restarts", (1, 2, 4)),
        ("bim", "steps", (1, 4, 12)),
        ("apgd_ce", "restarts", (1, 2, 3)),
        ("apgd_t", "targets", (1, 4, 9)),
    ]
    for name, key, values in ladders:
        margins, wrong = [], []
        for value in values:
            changes = {"restarts": 1, key: value} if name == "pgd" else {key: value}
            crafted = craft(parse_attack(name, **changes), defense, "full", data, LINF, 0, 60)
            margins.append(true_margins(defense, crafted))
            wrong.append(crafted.success)
        for weak, strong in pairwise(range(len(values))):
            robust = ~wrong[weak]
            assert wrong[strong][wrong[weak]].all(), (name, key)
            assert (margins[strong] <= margins[weak] + 1e-4)[robust].all(), (name, key)
        assert margins[-1].sum() < margins[0].sum() - 0.01, (name, key)


def test_a_larger_ball_fools_no_fewer(classifier: Classifier, test_set: ImageSet) -> None:
    data, defense = head(test_set, 60), Defense(classifier, None).freeze()
    for name in ("fgsm", "pgd", "apgd_ce", "apgd_t"):
        counts = [
            fooled(craft(parse_attack(name), defense, "full", data, LINF.scaled(factor), 0, 60))
            for factor in (0.01, 0.5, 1, 2, 8)
        ]
        clean = int((classifier(data.pixels()).argmax(1) != data.labels).sum())
        assert counts[0] <= clean + 1
        steps = pairwise(counts)
        # One step overshoots where it is large (FGSM), the others may not.
        assert all(b >= a - 1 for a, b in steps) or name == "fgsm"
        assert counts[-1] == 60 or name == "fgsm"


def test_bpda_breaks_rounding_that_has_no_gradient(
    classifier: Classifier, test_set: ImageSet
) -> None:
    data, defense = head(test_set, 100), Defense(classifier, Rounded()).freeze()
    full, bpda = (
        fooled(craft(parse_attack("pgd"), defense, mode, data, LINF, 0, 100))
        for mode in ("full", "bpda")
    )
    assert bpda > full + 30


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("cw_l2", {"threat": {"norm": "l2", "eps_l2": 1.0}}),
        ("pgd", {"steps": 0}),
        ("pgd", {"step": 0.0}),
        ("pgd", {"alpha": 0.1}),
        ("apgd_t", {"targets": 0}),
        ("square", {"queries": 0}),
        ("square", {"eot": 0}),
        ("cw_l2", {"confidence": -1.0}),
        ("noise", {"tries": 1.5}),
    ],
)
def test_invalid_settings_are_refused(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        parse_attack(name, **changes)
