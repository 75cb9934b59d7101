"""Attacks keep their threat, leave no trace, treat every image alone, and find what there is."""

import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields
from itertools import groupby, pairwise
from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional
from toys import (
    ATTACK_VARIANTS,
    ATTACKS,
    BALL,
    LINF,
    Constant,
    Linear,
    Noisy,
    Precise,
    Rounded,
    distances,
    fooled,
    head,
    linear_task,
    parse_attack,
)

from components.attacks import (
    L2,
    Attack,
    AttackConfig,
    Crafted,
    Linf,
    autoattack,
    craft,
    violations,
)
from components.attacks.apgd import targeted_dlr
from components.attacks.contract import Outcome, Search, strongest
from components.data.draws import Draws
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.defense import Defense, Target, bind

# Where an attack does not apply, and says so.
REFUSES = {
    "autoattack": {"stochastic"},
    "fab_t": {"stochastic"},
    "flip": {"l2"},
    "mi_fgsm": {"l2", "stochastic"},
}
GRADIENT_FREE = ("noise", "square")
# FAB's first run starts at the image, and here nothing is left for the second.
UNSEEDED = (
    "fgsm", "bim", "mi_fgsm", "cw_l2", "deepfool", "elastic_net", "fab_t", "flip",
    "detector_aware", "detector_aware, classifier",
)  # fmt: skip
THREATS = pytest.mark.parametrize("threat", [LINF, BALL], ids=["linf", "l2"])
EVERY = pytest.mark.parametrize("name", [*ATTACKS, *ATTACK_VARIANTS])


@pytest.fixture(autouse=True)
def _short_autoattack(monkeypatch: pytest.MonkeyPatch) -> None:
    """What AutoAttack means stands in tests/test_autoattack.py; here it may be short."""
    for name, value in (("STEPS", 10), ("TARGETS", 3), ("QUERIES", 40)):
        monkeypatch.setattr(autoattack, name, value)


def refuses(
    name: str, defense: Defense, data: ImageSet, threat: Linf | L2 = LINF, mode: Any = "full"
) -> bool:
    """Say whether an attack does not apply here, after seeing that it says so itself."""
    here = {"l2"} if isinstance(threat, L2) else set()
    here |= {"stochastic"} if defense.stochastic else set()
    if not REFUSES.get(name, set()) & here:
        return False
    with pytest.raises(ValueError, match=name):
        craft(parse_attack(name), defense, mode, data, threat, 0, len(data))
    return True


def test_the_table_has_every_kind() -> None:
    members = get_args(get_args(AttackConfig)[0])
    kinds = {kind for m in members for kind in get_args(m.model_fields["kind"].annotation)}
    assert kinds == set(ATTACKS)


# What holds for every attack


@EVERY
@THREATS
@pytest.mark.parametrize("stochastic", [False, True], ids=["deterministic", "stochastic"])
def test_what_is_returned_lies_in_the_ball_and_is_judged_by_its_bytes(
    name: str, threat: Linf | L2, stochastic: bool, classifier: Classifier, test_set: ImageSet
) -> None:
    attack, data = parse_attack(name), head(test_set, 40)
    defense = Defense(classifier, Noisy() if stochastic else None).freeze()
    if refuses(name, defense, data, threat):
        return
    crafted = craft(attack, defense, "full", data, threat, 0, 25)
    assert torch.equal(crafted.ids, data.ids) and torch.equal(crafted.labels, data.labels)
    assert crafted.images.shape == data.images.shape and crafted.images.dtype == torch.float32
    assert crafted.images.isfinite().all()
    assert crafted.images.min() >= 0 and crafted.images.max() <= 1
    delta = (crafted.images.double() - data.pixels().double()).flatten(1)
    reach = delta.abs().amax(1) if threat is LINF else delta.norm(dim=1)
    if attack.bounded:
        assert reach.max() <= threat.eps + 1e-6
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
        if not stochastic:
            short = (crafted.backward < attack.effort()) & ~crafted.success
            assert short.sum() <= 1, "one may lie where folding tips it over"
    else:
        assert not crafted.backward.any()


@EVERY
@THREATS
def test_an_attack_does_harm(
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
def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_noise(
    name: str, stochastic: bool, classifier: Classifier, test_set: ImageSet
) -> None:
    defense = Defense(classifier, Noisy() if stochastic else None).freeze()
    data = head(test_set, 16)
    if refuses(name, defense, data):
        return
    one = craft(parse_attack(name), defense, "full", data, LINF, 0, 16)
    torch.manual_seed(99)
    again = craft(parse_attack(name), defense, "full", data, LINF, 0, 16)
    for field in fields(Crafted):
        assert torch.equal(getattr(one, field.name), getattr(again, field.name))
    other = craft(parse_attack(name), defense, "full", data, LINF, 1, 16)
    seeded = stochastic or name not in UNSEEDED
    assert torch.equal(one.images, other.images) != seeded


@EVERY
@pytest.mark.parametrize("stochastic", [False, True], ids=["deterministic", "stochastic"])
def test_an_image_is_attacked_on_its_own(
    name: str, stochastic: bool, classifier: Classifier, test_set: ImageSet
) -> None:
    """Whatever the order and the size of the batches. In float64, where rounding has no say."""
    defense = Defense(Precise(classifier), Noisy() if stochastic else None).freeze()
    data = head(test_set, 24)
    if refuses(name, defense, data):
        return
    whole = craft(parse_attack(name), defense, "full", data, LINF, 0, 24)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    for batch in (24, 10):
        shuffled = craft(parse_attack(name), defense, "full", data[order], LINF, 0, batch)
        assert torch.equal(shuffled.ids, whole.ids[order])
        assert torch.allclose(shuffled.images, whole.images[order], rtol=0, atol=1e-5)
        for column in ("success", "iterations", "forward", "backward"):
            assert torch.equal(getattr(shuffled, column), getattr(whole, column)[order]), column


@EVERY
def test_the_order_of_a_batch_changes_no_byte(
    name: str, classifier: Classifier, test_set: ImageSet
) -> None:
    random_one, data = Defense(classifier, Noisy()).freeze(), head(test_set, 24)
    alone = "stochastic" in REFUSES.get(name, set())
    defense = Defense(classifier, None).freeze() if alone else random_one
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    whole = craft(parse_attack(name), defense, "full", data, LINF, 0, 24)
    shuffled = craft(parse_attack(name), defense, "full", data[order], LINF, 0, 24)
    assert torch.equal(shuffled.images, whole.images[order])


@EVERY
@pytest.mark.parametrize("mode", ["full", "bpda"])
def test_an_attack_leaves_no_trace(
    name: str, mode: Any, classifier: Classifier, test_set: ImageSet
) -> None:
    data = head(test_set, 10)
    model = deepcopy(classifier).requires_grad_(True)
    alone = "stochastic" in REFUSES.get(name, set())
    defense = Defense(model, None if alone else Noisy()).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pixels = data.images.clone()
    streams = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    craft(parse_attack(name), defense, mode, data, LINF, 0, 10)
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert (random.getstate(), str(np.random.get_state())) == streams[1:]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert not any(p.grad is not None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(data.images, pixels)
    assert torch.is_grad_enabled()


@EVERY
def test_an_image_that_is_wrong_already_counts_as_fooled(
    name: str, classifier: Classifier, test_set: ImageSet
) -> None:
    data = head(test_set, 12)
    wrong = ImageSet(data.images, (data.labels + 1) % 10, data.ids, data.class_names)
    crafted = craft(
        parse_attack(name), Defense(classifier, None).freeze(), "full", wrong, LINF, 0, 12
    )
    assert crafted.success.all()
    if name not in ("pgd, last iterate", "noise", "cw_l2"):
        assert torch.equal(crafted.images, wrong.pixels()), "effort spent where none is needed"


@EVERY
@pytest.mark.parametrize("logits", [[torch.nan] * 10, [0.0] * 9 + [torch.nan]], ids=str)
def test_logits_that_are_not_numbers_count_as_fooled(
    name: str, logits: list[float], test_set: ImageSet
) -> None:
    """For whatever label: torch says that NaN is the largest, so class 0 would look robust."""
    data = head(test_set, 30)
    crafted = craft(
        parse_attack(name, **({"targets": 2} if name == "apgd_t" else {})),
        Defense(Constant(logits), None).freeze(), "full", data, LINF, 0, 30,
    )  # fmt: skip
    assert set(data.labels.tolist()) >= {0, 9}
    assert crafted.success.all()


@pytest.mark.parametrize("name", ["noise", "pgd", "apgd_ce", "apgd_t"])
def test_an_image_where_logits_stop_being_numbers_is_kept(name: str) -> None:
    """Random starts find it, and no image with an ordinary margin is preferred to it."""

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


@EVERY
def test_tied_logits_stop_no_attack(name: str, test_set: ImageSet) -> None:
    """Equal logits have margin 0: not right beyond doubt, so no attack has work left to do."""
    data = head(test_set, 40)
    assert (data.labels == 0).sum() > 1
    defense = Defense(Constant([1.0] * 10), None).freeze()
    crafted = craft(parse_attack(name), defense, "full", data, LINF, 0, 40)
    assert violations(crafted.images, data.pixels(), LINF) == []


def test_a_stochastic_defense_is_never_left_alone_after_one_lucky_draw(
    classifier: Classifier, test_set: ImageSet
) -> None:
    data = head(test_set, 40)
    random_one = Defense(classifier, Noisy()).freeze()
    fixed = Defense(classifier, None).freeze()
    for name, effort in (("pgd", 16), ("bim", 8), ("apgd_ce", 18), ("fgsm", 1)):
        crafted = craft(parse_attack(name), random_one, "full", data, LINF, 0, 40)
        assert crafted.iterations.tolist() == [effort] * 40
        assert (crafted.backward == 2 * effort).all(), "eot: 2 draws to a gradient"
        spared = craft(parse_attack(name), fixed, "full", data, LINF, 0, 40)
        assert (spared.iterations <= effort).all() and spared.success.any()
        if effort > 1:
            assert spared.iterations[spared.success].float().mean() < 0.75 * effort
        assert (spared.iterations[~spared.success] == effort).all()


def test_luck_is_not_strength(test_set: ImageSet) -> None:
    """Of 60 looks at a weaker image the luckiest looks better than a stronger one ever does."""
    data = head(test_set, 60)
    weak, strong = data.pixels(), (data.pixels() + 0.02).clamp(0, 1)

    class Lottery(Noisy):
        def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
            assert draws is not None
            marked = (x - weak[draws.ids]).flatten(1).amax(1) > 0.01
            luck = 2 * draws.normal((1,), "luck")[:, 0]
            return (1.0 - 1.5 * marked + luck)[:, None, None, None].expand_as(x)

    class Told(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional.pad(x.flatten(1).mean(1, keepdim=True), (0, 9))

    for eot in (1, 4):
        draws = Draws(0, "attack", torch.arange(60))
        target = bind(Defense(Told(), Lottery()).freeze(), "full", draws, eot)
        search = Search(target, weak, torch.zeros(60, dtype=torch.int64), early_stop=True)
        for _ in range(60):
            search.query(weak)
        search.query(strong)
        lucky = (search.best == weak).flatten(1).all(1)
        assert lucky.float().mean() > 0.8, "no luck was needed"
        found = search.outcome()
        kept = (found.images == strong).flatten(1).all(1)
        assert kept.float().mean() > 0.8
        # What is reported is a mean of fresh draws, not the luckiest.
        assert found.margin[kept].mean() == pytest.approx(-0.5, abs=0.4)


def test_the_strongest_is_right_under_the_fewest_draws() -> None:
    """By hand: three images for each of three rows, under four draws."""
    table = torch.tensor([
        # Right once of four, for all its mean; twice; thrice.
        [[9.0, -1, -1, -1], [1, 1, -9, -9], [1, 1, 1, -9]],
        # Right as often: the lower mean.
        [[2.0, 2, -1, -1], [1, 1, -1, -1], [3, 3, -1, -1]],
        # What is no number, or beyond all numbers, leaves no NaN behind.
        [[torch.inf, torch.nan, -torch.inf, 1], [1, 1, 1, 1], [torch.inf] * 4],
    ])  # fmt: skip
    labels = torch.zeros(3, dtype=torch.int64)

    class Asked:
        def __call__(self, x: Tensor, draw: int) -> Tensor:
            seen = table[torch.arange(3), x.flatten().long(), draw]
            return functional.pad(seen[:, None], (0, 1))

    candidates = torch.arange(3.0)[:, None, None, None, None].expand(3, 3, 1, 1, 1)
    best, margins = strongest(cast(Target, Asked()), candidates, labels, range(4))
    assert best.flatten().tolist() == [0, 1, 0]
    assert margins.tolist() == [1.5, 0.0, -torch.inf]


@EVERY
def test_no_two_looks_share_their_noise(
    name: str, classifier: Classifier, test_set: ImageSet
) -> None:
    """Only images that are compared are, and no gradient was seen under that noise.

    Draw 0 is met again: it ranks the target classes, and judges what is returned.
    """
    followed: list[int] = []
    judged: list[int] = []

    class Listening(Noisy):
        def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
            assert draws is not None and draws.role == "attack"
            (followed if torch.is_grad_enabled() else judged).append(draws.draw)
            return super().purify(x, draws)

    defense = Defense(classifier, Listening()).freeze()
    if refuses(name, defense, head(test_set, 8)):
        return
    followed.clear()
    judged.clear()
    craft(parse_attack(name), defense, "full", head(test_set, 8), LINF, 0, 8)
    assert len(followed) == len(set(followed))
    assert not (set(followed) & set(judged)) - {0}
    assert len({*followed, *judged} - {0}) == max(*followed, *judged), "a draw is left out"
    if not name.startswith("detector_aware"):
        # Five images beside each other at the end of a search.
        looks = [draw for draw, _ in groupby(judged) if draw]
        assert len(looks) == len(set(looks))


def test_the_least_margin_found_is_what_is_kept(classifier: Classifier, test_set: ImageSet) -> None:
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
            margins.append(least_margin(defense, crafted))
            wrong.append(crafted.success)
        for weak, strong in pairwise(range(len(values))):
            robust = ~wrong[weak]
            assert wrong[strong][wrong[weak]].all(), (name, key)
            assert (margins[strong] <= margins[weak] + 1e-4)[robust].all(), (name, key)
        assert margins[-1].sum() < margins[0].sum() - 0.01, (name, key)


def least_margin(defense: Defense, crafted: Crafted) -> Tensor:
    logits = defense(crafted.images)
    true = logits.gather(1, crafted.labels[:, None]).squeeze(1)
    return true - logits.scatter(1, crafted.labels[:, None], -torch.inf).amax(1)


def test_a_longer_apgd_is_no_weaker(classifier: Classifier, test_set: ImageSet) -> None:
    data, defense = head(test_set, 120), Defense(classifier, None).freeze()
    tight = Linf(norm="linf", eps_255=20.0)
    for name, changes in (("apgd_ce", {"restarts": 1}), ("apgd_t", {"targets": 2})):
        counts = [
            fooled(
                craft(
                    parse_attack(name, steps=steps, **changes), defense, "full", data, tight, 0, 120
                )
            )
            for steps in (5, 25, 100)
        ]
        assert counts[0] - 1 <= counts[1] <= counts[2] + 1 and 10 < counts[2] < 120


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


def test_bpda_gets_past_rounding_that_leaves_no_gradient(
    classifier: Classifier, test_set: ImageSet
) -> None:
    data, defense = head(test_set, 100), Defense(classifier, Rounded()).freeze()
    full, bpda = (
        fooled(craft(parse_attack("pgd"), defense, mode, data, LINF, 0, 100))
        for mode in ("full", "bpda")
    )
    assert bpda > full + 30


# Closed form: a linear model is robust where margin > eps * dual norm of the difference of weights


# With more than two classes the cross-entropy pulls towards all others at once, and finds less.
CLOSED: list[tuple[str, int, dict[str, Any], float]] = [
    ("pgd", 2, {"steps": 20, "step": 0.2}, 0.002),
    ("apgd_ce", 2, {"steps": 50, "restarts": 1}, 0.002),
    ("apgd_t", 5, {"steps": 40, "targets": 4}, 0.002),
    ("pgd", 5, {"steps": 40, "step": 0.1}, 0.1),
    ("apgd_ce", 5, {"steps": 50, "restarts": 1}, 0.1),
]


@THREATS
@pytest.mark.parametrize(("name", "classes", "changes", "tolerance"), CLOSED)
def test_on_a_linear_model_attacks_find_the_exact_robust_accuracy(
    name: str, classes: int, changes: dict[str, Any], tolerance: float, threat: Linf | L2
) -> None:
    model, data = linear_task(classes, 1200)
    exact = distances(model, data, 1 if threat is LINF else 2)
    eps = exact.quantile(0.5).item()  # half of the images are robust
    tight = Linf(norm="linf", eps_255=255 * eps) if threat is LINF else L2(norm="l2", eps_l2=eps)
    assert 0 < eps < 90 / 255 / 2, "a clip would be met"
    crafted = craft(
        parse_attack(name, **changes), Defense(model, None).freeze(), "full", data, tight, 0, 400
    )
    assert not (crafted.success & (exact > eps + 1e-5)).any(), "more was found than there is"
    found = (~crafted.success).float().mean().item()
    assert found == pytest.approx(0.5, abs=tolerance)


def test_every_class_is_aimed_at_in_turn() -> None:
    """The runner-up has the weights of the true class, so nothing leads there; the next does."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(90, 166, (50, 1, 6, 6), generator=generator, dtype=torch.uint8)
    weight, bias = torch.zeros(4, 36), torch.tensor([1.0, 0.9, 0.5, -3.0])
    weight[2] = torch.randn(36, generator=generator)
    bias[2] -= (weight[2] * 128 / 255).sum()
    model, labels = Linear(weight, bias), torch.zeros(50).long()
    data = ImageSet(images, labels, torch.arange(50), tuple("abcd"))
    ranks = model(data.pixels()).argsort(1, descending=True)
    data = data[(ranks[:, 0] == 0) & (ranks[:, 1] == 1) & (ranks[:, 2] == 2)]
    assert len(data) > 5
    wide = Linf(norm="linf", eps_255=40.0)
    counts = [
        fooled(
            craft(
                parse_attack("apgd_t", targets=n), Defense(model, None), "full", data, wide, 0, 50
            )
        )
        for n in (1, 2)
    ]
    assert counts[0] < len(data) / 2 and counts[1] == len(data)


def test_apgd_shortens_its_steps_where_long_ones_overshoot() -> None:
    """Only a small cube around a hidden point inside the ball fools this model; its gradient leads
    there, but steps of fixed length jump over it.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(90, 166, (60, 1, 4, 4), generator=generator, dtype=torch.uint8)
    data = ImageSet(images, torch.zeros(60).long(), torch.arange(60), tuple("ab"))
    offsets = LINF.eps * (1.4 * torch.rand(60, 1, 4, 4, generator=generator) - 0.7)
    hidden = data.pixels() + offsets

    class Valley(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = nn.Parameter(hidden, requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            nearest = (x[:, None] - self.hidden[None]).flatten(2).norm(dim=2).amin(1)
            return torch.stack([20 * nearest - 1, 0 * nearest], 1)

    defense = Defense(Valley(), None).freeze()
    assert fooled(craft(parse_attack("noise"), defense, "full", data, LINF, 0, 60)) == 0
    for name, changes in (("apgd_ce", {"steps": 100, "restarts": 1}), ("pgd", {"steps": 100})):
        found = fooled(craft(parse_attack(name, **changes), defense, "full", data, LINF, 0, 60))
        assert found > 30 if name == "apgd_ce" else found < 5


def test_cw_finds_the_nearest_point_across_the_boundary() -> None:
    model, data = linear_task(4, 200)
    exact = distances(model, data, 2).clamp_min(0)
    attack = parse_attack("cw_l2", c=0.1, steps=100, searches=8, learning_rate=0.01)
    crafted = craft(attack, Defense(model, None).freeze(), "full", data, BALL, 0, 200)
    found = BALL.distance(crafted.images, data.pixels())
    assert crafted.success.all()
    assert (found >= exact - 1e-5).all(), "nearer than there is anything"
    assert found.mean() == pytest.approx(exact.mean().item(), rel=0.02)
    assert (found[exact == 0] == 0).all()


def test_cw_with_confidence_goes_further(classifier: Classifier, test_set: ImageSet) -> None:
    data, defense = head(test_set, 40), Defense(classifier, None).freeze()
    far = []
    for confidence in (0.0, 2.0):
        attack = parse_attack("cw_l2", confidence=confidence, steps=40, searches=3)
        crafted = craft(attack, defense, "full", data, BALL, 0, 40)
        clean = classifier(data.pixels()).argmax(1) == data.labels
        assert crafted.success.float().mean() > 0.95
        far.append(BALL.distance(crafted.images, data.pixels())[clean])
        margins = least_margin(defense, crafted)
        assert (margins[clean & crafted.success] <= -confidence + 1e-3).all()
    assert far[1].mean() > far[0].mean() + 0.05


# The authors' AutoAttack on a fixed model


def test_the_recorded_model_is_read_as_it_was(
    recorded: tuple[Defense, ImageSet, dict[str, Any]],
) -> None:
    defense, data, _ = recorded
    logits = defense(data.pixels())
    assert logits.double().sum().item() == pytest.approx(-2683.1345, abs=0.01)
    assert int((logits.argmax(1) == data.labels).sum()) == 249


@THREATS
@pytest.mark.parametrize("name", ["apgd_ce", "apgd_t"])
def test_apgd_agrees_with_the_authors_image_by_image(
    name: str, threat: Linf | L2, recorded: tuple[Defense, ImageSet, dict[str, Any]]
) -> None:
    defense, data, outcomes = recorded
    norm = "Linf" if threat is LINF else "L2"
    # Nine times 100 steps on all images are 10 s: the targeted runs take every eighth.
    rows = torch.arange(0, 256, 8 if name == "apgd_t" else 1)
    ball = Linf(norm="linf", eps_255=51.0) if threat is LINF else L2(norm="l2", eps_l2=1.5)
    assert ball.eps == pytest.approx(outcomes[norm]["eps"])
    settings = {"restarts": 1} if name == "apgd_ce" else {"targets": 9}
    attack = parse_attack(name, steps=100, eot=1, **settings)
    crafted = craft(attack, defense, "full", data[rows], ball, 0, 256)
    theirs = torch.tensor(outcomes[norm][name.replace("_", "-")]["robust"]).bool()[rows]
    ours = ~crafted.success
    assert abs(int(ours.sum()) - int(theirs.sum())) <= (1 if name == "apgd_t" else 3)
    assert int((ours != theirs).sum()) <= (2 if name == "apgd_t" else 6)


# Square


@THREATS
def test_square_fools_more_than_noise(
    threat: Linf | L2, classifier: Classifier, test_set: ImageSet
) -> None:
    data, defense = head(test_set, 100), Defense(classifier, None).freeze()
    square = craft(parse_attack("square", queries=150), defense, "full", data, threat, 0, 100)
    noise = craft(parse_attack("noise", tries=20), defense, "full", data, threat, 0, 100)
    assert fooled(square) > fooled(noise) + 5
    assert violations(square.images, data.pixels(), threat) == []
    spent = square.iterations
    assert (spent[~square.success] == 150).all() and (spent <= 150).all()
    assert spent[square.success].float().mean() < 100
    assert torch.equal(square.forward - spent, torch.ones_like(spent)), "the look at the image"


# Planted faults


class Cheat(Attack):
    """Returns whatever it was told to."""

    kind: str = "cheat"
    images: Callable[[Tensor], Tensor]

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        return Outcome(self.images(images), torch.full((len(images),), -1.0), labels)


FAULTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "twice the radius": (lambda x: (x + 2 * LINF.eps).clamp(0, 1), "linf distance 0.25"),
    "one pixel of one image": (
        lambda x: x.index_put((torch.tensor(3), torch.tensor(0), torch.tensor(2), torch.tensor(2)),
                              (x[3, 0, 2, 2] + 0.2) % 1.0),
        "linf distance",
    ),
    "slightly": (lambda x: torch.where(x > 0.5, x - LINF.eps - 1e-4, x), "linf distance"),
    "below 0": (lambda x: x - 0.01, "outside"),
    "above 1": (lambda x: x + 0.01, "outside"),
    "not finite": (lambda x: x.where(x > 0, torch.nan), "not finite"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_an_attack_that_leaves_its_threat_is_stopped(
    fault: str, classifier: Classifier, test_set: ImageSet
) -> None:
    fault_of, said = FAULTS[fault]
    defense, data = Defense(classifier, None).freeze(), head(test_set, 8)
    with pytest.raises(AssertionError, match=f"Cheat left the threat: .*{said}"):
        craft(Cheat(images=fault_of), defense, "full", data, LINF, 0, 8)


def test_an_attack_does_not_grade_itself(classifier: Classifier, test_set: ImageSet) -> None:
    """It claims margin -1 everywhere, and returned the clean images."""
    defense, data = Defense(classifier, None).freeze(), head(test_set, 50)
    crafted = craft(Cheat(images=lambda x: x), defense, "full", data, LINF, 0, 50)
    assert torch.equal(crafted.success, classifier(data.pixels()).argmax(1) != data.labels)


def test_violations_are_named() -> None:
    clean = torch.full((2, 1, 4, 4), 0.5)
    assert violations(clean + LINF.eps, clean, LINF) == []
    assert violations(clean + LINF.eps + 2e-6, clean, LINF) == [
        "linf distance 0.125492 above 0.125490"
    ]
    assert violations(clean.double(), clean, LINF) == ["stored as torch.float64, not float32"]
    assert violations(clean.half(), clean, LINF) == ["stored as torch.float16, not float32"]
    assert violations(clean + 0.7 / 4, clean, BALL) == []
    assert len(violations(clean + 0.71 / 4, clean, BALL)) == 1
    assert len(violations(clean + 3, clean, LINF)) == 2


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("pgd", {"early_stop": False, "restarts": 2}),
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
def test_settings_that_make_no_attack_are_refused(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        parse_attack(name, **changes)


def test_restarts_without_early_stop_are_refused_with_a_sentence() -> None:
    with pytest.raises(ValidationError, match="returns the last iterate of one run"):
        parse_attack("pgd", early_stop=False, restarts=2)


@pytest.mark.parametrize("eps", [0.0, -1.0, 256.0, float("nan")])
def test_a_radius_that_is_none_is_refused(eps: float) -> None:
    with pytest.raises(ValidationError):
        Linf(norm="linf", eps_255=eps)
    if eps != 256:
        with pytest.raises(ValidationError):
            L2(norm="l2", eps_l2=eps)


@pytest.mark.parametrize(("classes", "targets"), [(3, 1), (3, 2), (5, 5)])
def test_targets_that_are_not_there_are_refused_with_a_sentence(classes: int, targets: int) -> None:
    model, data = linear_task(classes, 10)
    with pytest.raises(ValueError, match=f"needs 4 classes and at most {classes - 1} targets here"):
        craft(
            parse_attack("apgd_t", targets=targets), Defense(model, None), "full", data, LINF, 0, 10
        )


# The balls and the losses


@THREATS
def test_projection_lands_inside_and_leaves_alone_what_is(threat: Linf | L2) -> None:
    generator = torch.Generator().manual_seed(0)
    origin = torch.rand(50, 3, 8, 8, generator=generator)
    wild = origin + torch.randn(origin.shape, generator=generator)
    projected = threat.project(wild, origin)
    assert violations(projected, origin, threat) == []
    assert torch.allclose(threat.project(projected, origin), projected, atol=1e-6)
    inside = origin + (0.5 * (projected - origin))
    assert torch.allclose(threat.project(inside, origin), inside, atol=1e-7)


@pytest.mark.parametrize("eps", [0.01, 0.5, 5.0, 40.0])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 224, 224)])
def test_rounding_never_carries_a_projection_out_of_an_l2_ball(
    eps: float, shape: tuple[int, int, int]
) -> None:
    threat, generator = L2(norm="l2", eps_l2=eps), torch.Generator().manual_seed(0)
    origin = torch.rand(8, *shape, generator=generator)
    wild = origin + torch.randn(origin.shape, generator=generator)
    assert violations(threat.project(wild, origin), origin, threat) == []


def test_random_starts_fill_the_ball() -> None:
    many, grey = Draws(0, "attack", torch.arange(2000)), torch.full((2000, 1, 6, 6), 0.5)
    start = LINF.start(grey, many, "start") - grey
    assert abs(start.mean()) < 5 * LINF.eps / (3 * start.numel()) ** 0.5
    assert abs(start.std() - LINF.eps / 3**0.5) < 0.001
    length = (BALL.start(grey, many, "start") - grey).flatten(1).norm(dim=1)
    assert length.max() <= 0.7 + 1e-6
    assert ((length / 0.7).sort().values - torch.linspace(0, 1, 2000)).abs().max() < 0.05
    others = LINF.start(grey, many.redraw(1), "start") - grey
    assert not torch.allclose(start, others)


def test_steps_are_steepest_for_their_norm() -> None:
    gradient = torch.tensor([3.0, -4.0, 0.0, 0.0]).view(1, 1, 2, 2)
    zero = torch.zeros_like(gradient)
    assert LINF.ascend(zero, gradient, 0.1).flatten().tolist() == pytest.approx([0.1, -0.1, 0, 0])
    assert BALL.ascend(zero, gradient, 0.1).flatten().tolist() == pytest.approx([0.06, -0.08, 0, 0])
    assert BALL.ascend(zero, zero, 0.1).isfinite().all(), "no direction, no step"


def test_a_scaled_ball_is_as_large_as_it_says() -> None:
    assert LINF.scaled(0.5).eps == pytest.approx(16 / 255) and LINF.scaled(100).eps == 1
    assert BALL.scaled(2).eps == pytest.approx(1.4)


def test_the_targeted_loss_is_that_of_the_paper() -> None:
    """Equation 7: -(z_y - z_t) / (z_1 - (z_3 + z_4) / 2), the largest four being 6, 5, 3, 1."""
    logits = torch.tensor([[5.0, 1.0, 6.0, 3.0, -2.0]])
    right, wrong = torch.tensor([2]), torch.tensor([0])
    for place, expected in ((0, -1 / 4), (1, -5 / 4), (4, -8 / 4)):
        found = targeted_dlr(logits, right, torch.tensor([place]))
        assert found.item() == pytest.approx(expected)
    assert targeted_dlr(logits, wrong, torch.tensor([2])).item() == pytest.approx(1 / 4)
    shifted = targeted_dlr(7 * logits + 3, right, torch.tensor([0]))
    assert shifted.item() == pytest.approx(-1 / 4), "scale and shift are of no account"
