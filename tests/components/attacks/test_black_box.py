"""Square, flips and what the library lends find what there is, image by image, and leave no trace;
so does RAND+FGSM.
"""

import math
import random
from collections.abc import Callable
from copy import deepcopy
from itertools import groupby
from typing import Any

import pytest
import torch
import torchattacks
from pydantic import ValidationError
from torch import Tensor, nn
from toys import BALL, LINF, Linear, Noisy, Precise, Rounded, fooled, head

from components.attacks import L2, Attack, Crafted, Linf, craft, violations
from components.attacks.flip import Flip
from components.attacks.gradient import Pgd, RFgsm
from components.attacks.library import MiFgsm, run_torchattack
from components.attacks.square import Square, move_mass, patch_area, pyramid, two_pyramids
from components.data.draws import Draws
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.defense import Defense, Mode, bind
from components.models.purifiers import Purifier
from components.models.purifiers.controls import Threshold

THREATS = pytest.mark.parametrize("threat", [LINF, BALL], ids=["linf", "l2"])
MODES = pytest.mark.parametrize("mode", ["full", "bpda"])
SQUARE = Square(kind="square", queries=30, eot=2)
FLIP = Flip(kind="flip", at=0.5, steps=6, candidates=4, eot=2)
R_FGSM = RFgsm(kind="r_fgsm", alpha=0.4, eot=2)
MI_FGSM = MiFgsm(kind="mi_fgsm", steps=6, step=0.25, decay=1.0)
ATTACKS: dict[str, Attack] = {a.kind: a for a in (SQUARE, FLIP, R_FGSM, MI_FGSM)}
# Every attack under every threat it is for, against every kind of target it is for.
CASES = [
    pytest.param(ATTACKS[name], threat, noisy, id=f"{name}-{threat.norm}-{noisy or 'still'}")
    for name in ATTACKS
    for threat in (LINF, BALL)
    for noisy in ("", "noisy")
    if not (threat is BALL and name in ("flip", "mi_fgsm")) and not (noisy and name == "mi_fgsm")
]
EVERY = pytest.mark.parametrize(("attack", "threat", "noisy"), CASES)


class Function(nn.Module):
    """A classifier from a function of pixels; it has a parameter, so a device."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def grey_images(count: int, shape: tuple[int, int, int] = (1, 6, 6), classes: int = 2) -> ImageSet:
    """Return images of class 0 whose pixels stay clear of 0 and 1 under attack."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(90, 166, (count, *shape), generator=generator, dtype=torch.uint8)
    names = tuple(str(k) for k in range(classes))
    return ImageSet(images, torch.zeros(count).long(), torch.arange(count) * 5 + 2, names)


def attack_model(
    attack: Attack, model: nn.Module, data: ImageSet, threat: Linf | L2, mode: Mode = "full"
) -> Crafted:
    """Attack the model, behind a purifier if it is a defense already, in one batch."""
    defense = model if isinstance(model, Defense) else Defense(model, None)
    return craft(attack, defense.freeze(), mode, data, threat, 0, len(data))


# What holds for every attack


@EVERY
def test_what_is_returned_lies_in_the_ball_and_does_harm(
    attack: Attack, threat: Linf | L2, noisy: str, classifier: Classifier, test_set: ImageSet
) -> None:
    data, defense = head(test_set, 80), Defense(classifier, Noisy() if noisy else None).freeze()
    crafted = craft(attack, defense, "full", data, threat, 0, 50)
    assert violations(crafted.images, data.pixels(), threat) == []
    draws = Draws(0, "attack", data.ids)
    clean = int((defense(data.pixels(), draws).argmax(1) != data.labels).sum())
    # Flips move the few pixels near 0.5 alone, which is little where nothing quantises.
    assert fooled(crafted) >= clean + {"square": 3, "flip": 0}.get(attack.kind, 10)
    assert not torch.equal(crafted.images, data.pixels())
    assert (crafted.forward > 0).all()
    assert (crafted.backward[~crafted.success] >= attack.effort()).all()
    assert bool(crafted.backward.any()) == (attack.kind != "square")
    if noisy and isinstance(attack, Square):
        assert (crafted.iterations == attack.queries).all(), "one lucky draw ended the search"


@EVERY
def test_an_image_is_attacked_on_its_own(
    attack: Attack, threat: Linf | L2, noisy: str, classifier: Classifier, test_set: ImageSet
) -> None:
    """Whatever the order and the size of the batches. In float64, where rounding has no say."""
    defense = Defense(Precise(classifier), Noisy() if noisy else None).freeze()
    data = head(test_set, 12)
    whole = craft(attack, defense, "full", data, threat, 0, 12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    for batch in (12, 5, 1):
        shuffled = craft(attack, defense, "full", data[order], threat, 0, batch)
        assert torch.equal(shuffled.ids, whole.ids[order])
        assert torch.allclose(shuffled.images, whole.images[order], rtol=0, atol=1e-5)
        for column in ("success", "iterations", "forward", "backward"):
            assert torch.equal(getattr(shuffled, column), getattr(whole, column)[order]), column


@EVERY
@MODES
def test_an_attack_leaves_no_trace(
    mode: Mode, attack: Attack, threat: Linf | L2, noisy: str, classifier: Classifier,
    test_set: ImageSet,
) -> None:  # fmt: skip
    data, model = head(test_set, 8), deepcopy(classifier).requires_grad_(True)
    target = bind(
        Defense(model, Noisy() if noisy else None).eval(), mode, Draws(0, "attack", data.ids), 2
    )
    before = {key: value.clone() for key, value in model.state_dict().items()}
    streams, pixels = (torch.get_rng_state(), random.getstate()), data.pixels()
    one = attack.run(target, pixels, data.labels, threat, Draws(0, "attack", data.ids))
    assert torch.equal(torch.get_rng_state(), streams[0]) and random.getstate() == streams[1]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert not any(p.grad is not None or not p.requires_grad for p in model.parameters())
    assert torch.equal(pixels, data.pixels()) and torch.is_grad_enabled()
    torch.manual_seed(99)
    again = attack.run(target, pixels, data.labels, threat, Draws(0, "attack", data.ids))
    assert torch.equal(one.images, again.images), "the global stream has a say"


@EVERY
def test_what_is_wrong_already_or_no_number_is_left_alone(
    attack: Attack, threat: Linf | L2, noisy: str, classifier: Classifier, test_set: ImageSet
) -> None:
    data = head(test_set, 12)
    wrong = ImageSet(data.images, (data.labels + 1) % 10, data.ids, data.class_names)
    crafted = attack_model(attack, classifier, wrong, threat)
    assert crafted.success.all() and torch.equal(crafted.images, wrong.pixels())
    assert not crafted.iterations.any()
    nan = Defense(Function(lambda x: x.flatten(1)[:, :10] * torch.nan), Noisy() if noisy else None)
    crafted = attack_model(attack, nan, data, threat)
    assert crafted.success.all()
    if not noisy:
        assert torch.equal(crafted.images, data.pixels())


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("attack", [SQUARE, FLIP], ids=["square", "flip"])
def test_an_image_where_logits_stop_being_numbers_is_kept(attack: Attack, noisy: bool) -> None:
    grey = torch.full((20, 1, 4, 4), 128, dtype=torch.uint8)
    data = ImageSet(grey, torch.zeros(20).long(), torch.arange(20), tuple("ab"))

    def logits(x: Tensor) -> Tensor:
        ordinary = (x.flatten(1).mean(1, keepdim=True) - 128 / 255).abs() < 0.003
        return torch.tensor([2.0, 1.0]).where(ordinary, torch.nan)

    class Still(Purifier):
        stochastic = True

        def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
            return x

    crafted = attack_model(
        attack, Defense(Function(logits), Still() if noisy else None), data, LINF
    )
    assert crafted.success.all()


@EVERY
def test_one_image_and_layouts_of_all_kinds_are_attacked(
    attack: Attack, threat: Linf | L2, noisy: str
) -> None:
    for shape in ((3, 4, 6), (1, 2, 2), (1, 1, 3), (2, 7, 3)):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(4, math.prod(shape), generator=generator)
        data = grey_images(3, shape, 4)
        model = Function(lambda x, w=weight: x.contiguous().flatten(1) @ w.T)
        target = bind(
            Defense(model, Noisy() if noisy else None), "full", Draws(0, "attack", data.ids), 2
        )
        pixels = data.pixels().to(memory_format=torch.channels_last)
        for count in (3, 1):
            rows = torch.arange(count)
            outcome = attack.run(
                target[rows], pixels[rows], data.labels[rows], threat, target.draws[rows]
            )
            assert violations(outcome.images, pixels[rows], threat) == []


@EVERY
def test_two_images_alike_are_attacked_each_with_its_own_noise(
    attack: Attack, threat: Linf | L2, noisy: str
) -> None:
    """Equal ids give equal bytes, other ids others; only noise of its own makes the difference."""
    weight = torch.randn(3, 36, generator=torch.Generator().manual_seed(0))
    bias = torch.tensor([30.0, 0, 0])
    images = grey_images(1).images.expand(3, -1, -1, -1)
    data = ImageSet(images, torch.zeros(3).long(), torch.tensor([7, 7, 8]), tuple("abc"))
    crafted = attack_model(
        attack, Defense(Linear(weight, bias), Noisy() if noisy else None), data, threat
    )
    assert torch.equal(crafted.images[0], crafted.images[1])
    if not noisy:
        drawn = attack.kind in ("square", "r_fgsm")
        assert torch.equal(crafted.images[0], crafted.images[2]) != drawn


# Square


def test_the_patch_shrinks_as_in_the_authors_code() -> None:
    """Query i of n counts as query 10,000 i / n; after 10, 50, 200, ... the area is halved."""
    expected = {0: 1, 5: 1, 6: 2, 25: 2, 26: 4, 100: 4, 101: 8, 250: 8, 251: 16, 501: 32, 1001: 64}
    expected |= {2000: 64, 2001: 128, 3000: 128, 3001: 256, 4000: 256, 4001: 512, 4999: 512}
    for query, divisor in expected.items():
        assert patch_area(query, 5000) == 0.8 / divisor, query
    assert [patch_area(query, 4) for query in range(4)] == [0.8 / d for d in (1, 64, 128, 256)]
    model = Function(lambda x: x)
    library = torchattacks.Square(model, n_queries=777)
    assert all(library.p_selection(query) == patch_area(query, 777) for query in range(777))


def test_bumps_are_those_of_the_paper() -> None:
    """Sums of 1/j^2 towards the middle, in two halves of opposite sign, each of length one."""
    ring, top = 1 / 4 + 1 / 9, 1 + 1 / 4 + 1 / 9
    assert pyramid(5, 5)[2].tolist() == pytest.approx([1 / 9, ring, top, ring, 1 / 9])
    assert pyramid(5, 5)[:, 0].tolist() == pytest.approx([1 / 9] * 5)
    for side in range(2, 12):
        bump = two_pyramids(side)
        assert bump.norm().item() == pytest.approx(1)
        assert bump[: side // 2].norm().item() == pytest.approx(0.5**0.5)
        assert (bump[: side // 2] > 0).all() and (bump[side // 2 :] < 0).all()
        theirs = torchattacks.Square(Function(lambda x: x)).eta(side)
        assert any(torch.allclose(bump, each, atol=1e-6) for each in (theirs, theirs.T))


@THREATS
def test_square_spends_the_radius_and_moves_whole_patches(threat: Linf | L2) -> None:
    data = grey_images(40, (3, 10, 12))
    weight = torch.randn(2, 360, generator=torch.Generator().manual_seed(0))
    weight[1] = -weight[0]
    model, bias = Linear, torch.tensor([1e3, 0])
    crafted = attack_model(
        Square(kind="square", queries=60, eot=1), model(weight, bias), data, threat
    )
    delta = crafted.images - data.pixels()
    assert not crafted.success.any() and (crafted.iterations == 60).all()
    if threat is LINF:
        assert torch.allclose(delta.abs(), torch.tensor(LINF.eps), atol=1e-6), "corners alone"
        neighbours = (delta[:, :, 1:] * delta[:, :, :-1] > 0).float().mean()
        assert neighbours > 0.65, "stripes and patches, not single pixels"
    else:
        assert torch.allclose(delta.flatten(1).norm(dim=1), torch.tensor(BALL.eps), atol=1e-5)
        assert (delta.abs() < 1e-7).flatten(1).any(1).all(), "windows are emptied"
    clean = (data.pixels().flatten(1) @ (weight[0] - weight[1])) + 1e3
    after = (crafted.images.flatten(1) @ (weight[0] - weight[1])) + 1e3
    assert (after < clean).all()


@pytest.mark.parametrize("shape", [(1, 9, 9), (3, 8, 12)])
def test_mass_moves_as_in_algorithm_3(shape: tuple[int, int, int]) -> None:
    """Image by image, window by window, against the windows the draws stand for."""
    channels, height, width = shape
    generator, draws, eps = torch.Generator().manual_seed(0), Draws(0, "attack", torch.arange(9)), 2
    origin = torch.rand(9, *shape, generator=generator)
    delta = torch.randn(9, *shape, generator=generator)
    delta *= torch.linspace(0, 1, 9).view(-1, 1, 1, 1) * eps / delta.flatten(1).norm(dim=1).amax()
    side = 3 if shape[0] == 1 else 5
    area = (side - 0.8) ** 2 / (height * width)  # an even side is made odd
    found = move_mass(origin + delta, origin, eps, area, draws)
    for row, u in enumerate(draws.uniform((5 + channels,), "square").tolist()):
        old, new = delta[row], delta[row].clone()
        top, under = (int(v * (height - side + 1)) for v in (u[0], u[2]))
        left, right = (int(v * (width - side + 1)) for v in (u[1], u[3]))
        first = (slice(None), slice(top, top + side), slice(left, left + side))
        second = (slice(None), slice(under, under + side), slice(right, right + side))
        union = torch.zeros_like(old)
        union[first] = union[second] = 1
        unused = eps**2 - old.square().sum()
        available = ((old * union).square().sum((1, 2)) + unused / channels).sqrt()
        bump = two_pyramids(side).T if u[4] < 0.5 else two_pyramids(side)
        inner = old[first] / old[first].flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None]
        mixed = (
            torch.tensor([-1.0 if v < 0.5 else 1.0 for v in u[5:]])[:, None, None] * bump + inner
        )
        new[second] = 0
        new[first] = (available / mixed.flatten(1).norm(dim=1))[:, None, None] * mixed
        expected = origin[row] + eps * new / new.norm()
        assert torch.allclose(found[row], expected, atol=1e-5), row


@pytest.mark.parametrize("noisy", [False, True])
@THREATS
def test_square_returns_the_clean_image_where_nothing_is_better(
    threat: Linf | L2, noisy: bool
) -> None:
    data = grey_images(1)
    clean = data.pixels()

    def logits(x: Tensor) -> Tensor:
        apart = (x - clean).abs().flatten(1).sum(1)
        return torch.stack([1 + apart, 0 * apart], 1)

    class Still(Purifier):
        stochastic = True

        def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
            return x

    crafted = attack_model(
        SQUARE, Defense(Function(logits), Still() if noisy else None), data, threat
    )
    assert torch.equal(crafted.images, clean)


@THREATS
def test_square_needs_no_gradient(
    threat: Linf | L2, classifier: Classifier, test_set: ImageSet
) -> None:
    """Behind fine rounding a gradient attack goes nowhere; fewer queries find less."""

    defense, data = Defense(classifier, Rounded(63)), head(test_set, 100)
    pgd = Pgd(
        kind="pgd", steps=10, step=0.25, restarts=1, random_start=False, early_stop=True, eot=1
    )
    found = [
        fooled(attack_model(attack, defense, data, threat))
        for attack in (pgd, *(Square(kind="square", queries=n, eot=1) for n in (5, 40, 300)))
    ]
    assert found[3] > found[0] + 20
    assert found[1] < found[2] < found[3]


@THREATS
def test_square_compares_under_equal_noise(threat: Linf | L2) -> None:
    """Noise that shifts every margin alike changes no comparison, so it changes no byte.

    An image held by a margin of earlier draws would be the luckiest so far, and hold for ever.
    """
    data = grey_images(12)
    weight = torch.randn(2, 36, generator=torch.Generator().manual_seed(3)).double()
    model = Linear(weight, torch.tensor([300.0, 0]).double())
    still = attack_model(Square(kind="square", queries=50, eot=1), model, data, threat)
    assert not still.success.any()

    class Shifted(Purifier):
        stochastic = True

        def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
            assert draws is not None
            return x.double() + 100 * draws.normal((1, 1, 1), "shift")

    for eot in (1, 3):
        attack = Square(kind="square", queries=50, eot=eot)
        crafted = attack_model(attack, Defense(model, Shifted()), data, threat)
        assert torch.equal(crafted.images, still.images)
        assert (crafted.forward == eot * (1 + 2 * 50 + 2)).all()
    assert (still.forward == 51).all()


def test_square_is_as_strong_as_the_librarys(classifier: Classifier, test_set: ImageSet) -> None:
    data, counts = head(test_set, 200), {}
    for threat in (LINF, BALL):
        tight = threat.scaled(0.6)
        ours = attack_model(Square(kind="square", queries=200, eot=1), classifier, data, tight)
        norm = "Linf" if threat is LINF else "L2"
        attack = torchattacks.Square(
            classifier, norm=norm, eps=tight.eps, n_queries=200, n_restarts=1, seed=0
        )
        theirs = classifier(attack.forward(data.pixels(), data.labels)).argmax(1) != data.labels
        counts[norm] = (fooled(ours), int(theirs.sum()))
    assert all(20 < theirs < 180 and abs(ours - theirs) <= 12 for ours, theirs in counts.values())


def test_square_fools_what_the_authors_fooled(
    recorded: tuple[Defense, ImageSet, dict[str, Any]],
) -> None:
    """Seeds differ, so up to three images do. Under L-inf; L2 takes too long for what it says."""
    model, data, outcomes = recorded
    outcome = outcomes["Linf"]["square"]
    right = model(data.pixels()).argmax(1) == data.labels
    rows = ~torch.tensor(outcome["robust"]).bool() & right
    assert rows.sum() > 45
    attack = Square(kind="square", queries=5000, eot=1)
    wide = Linf(norm="linf", eps_255=51.0)
    crafted = attack_model(attack, model, data[rows.nonzero().flatten()], wide)
    assert (~crafted.success).sum() <= 3


# Flips


def thresholded(model: nn.Module) -> Defense:
    return Defense(model, Threshold(kind="threshold", at=0.5).build((1, 6, 6))).freeze()


def two_classes(count: int = 120) -> tuple[Linear, ImageSet, Tensor]:
    """Return a linear model of two classes, images near 0.5, and what flipping each pixel does to
    the margin (N,P): zero where the ball does not reach across 0.5.
    """
    generator = torch.Generator().manual_seed(4)
    data = grey_images(count)
    weight = torch.randn(2, 36, generator=generator).double()
    model = Linear(weight, torch.zeros(2).double())
    pixels = data.pixels().flatten(1)
    data = ImageSet(data.images, model(pixels > 0.5).argmax(1), data.ids, data.class_names)
    slope = (weight[0] - weight[1]) * (1 - 2 * data.labels[:, None])
    change = torch.where(pixels > 0.5, -slope, slope)
    reach = torch.where(pixels > 0.5, pixels - TIGHT.eps <= 0.5, pixels + TIGHT.eps > 0.5)
    return model, data, change * reach


TIGHT = Linf(norm="linf", eps_255=7.0)


@MODES
@pytest.mark.parametrize("candidates", [36, 5, 1])
def test_flips_find_exactly_what_a_linear_model_has_behind_a_threshold(
    mode: Mode, candidates: int
) -> None:
    """The margin falls by the sum of what the flips do; largest first, the fewest are needed."""
    model, data, change = two_classes()
    defense = thresholded(model)
    logits = defense(data.pixels())
    margin = (logits[:, 0] - logits[:, 1]) * (1 - 2 * data.labels)
    falls = change.clamp(max=0).sort(1).values.cumsum(1)
    fragile = margin + falls[:, -1] <= 0
    needed = ((margin[:, None] + falls) > 0).sum(1) + 1
    assert 30 < fragile.sum() < 90
    attack = Flip(kind="flip", at=0.5, steps=200, candidates=candidates, eot=1)
    crafted = attack_model(attack, defense, data, TIGHT, mode)
    assert torch.equal(crafted.success, fragile)
    if mode == "bpda" or candidates == 36:
        assert torch.equal(crafted.iterations[fragile], needed[fragile])
    moved = (crafted.images > 0.5) != (data.pixels() > 0.5)
    assert not (moved.flatten(1) & (change == 0)).any()
    untouched = crafted.images[~moved] == data.pixels()[~moved]
    assert untouched.all(), "a pixel moved for nothing"


def test_what_a_void_gradient_claims_flips_take_back(
    classifier: Classifier, test_set: ImageSet
) -> None:
    defense, data = thresholded(classifier), head(test_set, 60)
    clean = int((defense(data.pixels()).argmax(1) == data.labels).sum())
    wide = Linf(norm="linf", eps_255=76.5)
    pgd = Pgd(
        kind="pgd", steps=10, step=0.25, restarts=1, random_start=False, early_stop=True, eot=1
    )
    flip = Flip(kind="flip", at=0.5, steps=40, candidates=16, eot=1)
    assert 60 - fooled(attack_model(pgd, defense, data, wide)) == clean
    left = {
        mode: 60 - fooled(attack_model(flip, defense, data, wide, mode))
        for mode in ("full", "bpda")
    }
    bpda = 60 - fooled(attack_model(pgd, defense, data, wide, "bpda"))
    assert left["bpda"] <= bpda and max(left.values()) < clean / 2, (left, bpda, clean)


@pytest.mark.parametrize(("mode", "candidates"), [("full", 3), ("bpda", 1)])
def test_a_flip_is_taken_back_where_that_helps(mode: Mode, candidates: int) -> None:
    """The margin falls by pixel 2, then by 1 and by 0, and to below 0 only without pixel 2."""
    margins = torch.tensor([5.0, 3.0, 4.0, 2.5, 4.0, 2.7, -1.0, 2.0])
    bits = torch.tensor([[code >> bit & 1 for bit in (2, 1, 0)] for code in range(8)])

    def logits(x: Tensor) -> Tensor:
        # Linear in every pixel, so that the gradient is what a flip does.
        weights = torch.where(bits == 1, x.flatten(1)[:, None], 1 - x.flatten(1)[:, None])
        value = (weights.prod(2) * margins).sum(1)
        return torch.stack([value, 0 * value], 1)

    data = ImageSet(
        torch.full((1, 1, 1, 3), 125, dtype=torch.uint8), torch.zeros(1).long(), torch.arange(1),
        tuple("ab"),
    )  # fmt: skip
    attack = Flip(kind="flip", at=0.5, steps=4, candidates=candidates, eot=1)
    crafted = attack_model(attack, thresholded(Function(logits)), data, LINF, mode)
    assert crafted.success.all() and crafted.iterations.item() == 4
    assert ((crafted.images > 0.5).flatten().tolist()) == [True, True, False]
    early = attack.model_copy(update={"steps": 3})
    assert fooled(attack_model(early, thresholded(Function(logits)), data, LINF, mode)) == 0


def test_rounds_go_on_until_every_candidate_was_tried() -> None:
    """One pixel of 36 matters, and no gradient says which: two at a time are 18 rounds at most."""

    def logits(x: Tensor) -> Tensor:
        return torch.stack([(x[:, 0, 3, 4] < 0.5).float(), torch.full((len(x),), 0.5)], 1)

    images = torch.full((50, 1, 6, 6), 120, dtype=torch.uint8)
    images[:, 0, 0, 0] = 60  # out of reach
    data = ImageSet(images, torch.zeros(50).long(), torch.arange(50), tuple("ab"))
    attack = Flip(kind="flip", at=0.5, steps=18, candidates=2, eot=1)
    crafted = attack_model(attack, Function(logits), data, LINF)
    assert crafted.success.all()
    assert len(crafted.iterations.unique()) > 10, "each has an order of its own"
    assert 7 < crafted.iterations.float().mean() < 12
    idle = attack_model(attack, Function(lambda x: logits(0 * x)), data, LINF)
    assert (idle.iterations == 18).all() and (idle.forward == 1 + 18 * 2 + 35).all()
    assert torch.equal(idle.images, data.pixels())


def test_flips_where_there_is_nothing_to_flip(classifier: Classifier, test_set: ImageSet) -> None:
    hair = Linf(norm="linf", eps_255=0.3)
    crafted = attack_model(FLIP, thresholded(classifier), head(test_set, 30), hair)
    assert (crafted.forward == 1).all() and not crafted.backward.any()
    assert torch.equal(crafted.images, head(test_set, 30).pixels())


def test_flips_compare_under_equal_noise() -> None:
    model, data, change = two_classes(30)

    class Shifted(Purifier):
        stochastic = True

        def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
            assert draws is not None
            return (x > 0.5).double() + 50 * draws.normal((1, 1, 1), "shift")

    attack = Flip(kind="flip", at=0.5, steps=100, candidates=9, eot=2)
    crafted = attack_model(attack, Defense(model, Shifted()), data, TIGHT)
    moved = ((crafted.images > 0.5) != (data.pixels() > 0.5)).flatten(1)
    assert torch.equal(moved, change < 0), "all flips that help, no others, and no early end"


def test_flips_need_linf(classifier: Classifier, test_set: ImageSet) -> None:
    with pytest.raises(ValueError, match="for linf threats only, not l2"):
        attack_model(FLIP, classifier, head(test_set, 2), BALL)


# RAND+FGSM


@THREATS
@pytest.mark.parametrize("alpha", [0.25, 0.5])
def test_the_random_step_and_the_step_of_the_gradient_share_the_radius(
    threat: Linf | L2, alpha: float
) -> None:
    data = grey_images(30)
    weight = torch.randn(2, 36, generator=torch.Generator().manual_seed(0))
    weight[1] = -weight[0]
    attack = RFgsm(kind="r_fgsm", alpha=alpha, eot=1)
    crafted = attack_model(attack, Linear(weight, torch.tensor([20.0, 0])), data, threat)
    assert (crafted.iterations == 1).all() and (crafted.backward == 1).all()
    delta = (crafted.images - data.pixels()).flatten(1)
    if threat is LINF:
        rest = delta / LINF.eps + (1 - alpha) * weight[0].sign()
        assert torch.allclose(rest.abs(), torch.full_like(rest, alpha), atol=1e-5)
        assert abs((rest > 0).float().mean() - 0.5) < 0.08
    else:
        rest = delta / BALL.eps + (1 - alpha) * weight[0] / weight[0].norm()
        assert torch.allclose(rest.norm(dim=1), torch.full((30,), alpha), atol=1e-5)
        assert abs(rest.mean()) < 0.02
    assert not torch.allclose(rest[0], rest[1], atol=1e-3)


# What the library lends


def test_mi_fgsm_is_the_librarys_on_what_is_right(
    classifier: Classifier, test_set: ImageSet
) -> None:
    data = head(test_set, 60)
    crafted = attack_model(MI_FGSM, classifier, data, LINF)
    right = classifier(data.pixels()).argmax(1) == data.labels
    attack = torchattacks.MIFGSM(classifier, LINF.eps, 0.25 * LINF.eps, 6, 1.0)
    theirs = attack.forward(data.pixels()[right], data.labels[right])
    assert torch.allclose(crafted.images[right], theirs, atol=1e-5)
    assert (crafted.iterations[right] == 6).all() and (crafted.backward[right] == 6).all()
    assert (crafted.forward[right] == 8).all() and (crafted.forward[~right] == 1).all()
    assert fooled(crafted) > 40


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_mi_fgsm_accumulates_gradients_of_length_one(decay: float) -> None:
    """Two steps lead beyond the kink at 0.56; there the gradient turns, and momentum goes on."""

    def logits(x: Tensor) -> Tensor:
        value = 6 + 10 * (x[:, 0, 0, 0] - 0.56).abs() - x[:, 0, 0, 1]
        return torch.stack([value, 0 * value], 1)

    data = ImageSet(
        torch.tensor([[[[127, 140]]]], dtype=torch.uint8), torch.zeros(1).long(), torch.arange(1),
        tuple("ab"),
    )  # fmt: skip
    attack = MiFgsm(kind="mi_fgsm", steps=3, step=0.3, decay=decay)
    moved = (
        attack_model(attack, Function(logits), data, LINF).images - data.pixels()
    ).flatten() / LINF.eps
    assert moved.tolist() == pytest.approx([0.9 if decay else 0.3, 0.9], abs=1e-5)


def test_an_image_whose_gradient_vanishes_stays_where_it_was() -> None:
    """The library divides by the length of the gradient; nothing of that may reach an image."""

    def logits(x: Tensor) -> Tensor:
        flat = x.flatten(1)
        value = torch.where(flat.mean(1) > 0.55, 1.0 + 0 * flat.sum(1), 40 - 60 * flat.mean(1))
        return torch.stack([value, 0 * value], 1)

    data = grey_images(20)
    crafted = attack_model(MI_FGSM, Function(logits), data, LINF)
    means = crafted.images.mean((1, 2, 3))
    assert crafted.images.isfinite().all() and (means > 0.55).all() and (means < 0.59).all()
    void = attack_model(MI_FGSM, thresholded(Function(logits)), data, LINF)
    assert torch.equal(void.images, data.pixels())


def test_the_traps_of_a_borrowed_attack_cannot_bite(
    classifier: Classifier, test_set: ImageSet
) -> None:
    """It reseeds, trains, leaves gradients and leaves the ball: nothing stays."""

    class Trap(torchattacks.attack.Attack):  # type: ignore[misc]
        def __init__(self, model: nn.Module) -> None:
            super().__init__("Trap", model)

        def forward(self, images: Tensor, labels: Tensor) -> Tensor:
            torch.manual_seed(17)
            self.model.train()
            x = images.clone().requires_grad_()
            logits = self.get_logits(x)
            nn.functional.cross_entropy(logits, labels).backward()
            assert x.grad is not None
            return images + 2 * x.grad.sign()

    data, model = head(test_set, 30), deepcopy(classifier).requires_grad_(True)
    draws = Draws(0, "attack", data.ids)
    target = bind(Defense(model, None).eval(), "full", draws, 1)
    stream = torch.get_rng_state()
    outcome = run_torchattack(Trap, "trap", 1, target, data.pixels(), data.labels, LINF)
    assert torch.equal(torch.get_rng_state(), stream)
    assert not any(module.training for module in model.modules())
    assert not any(p.grad is not None or not p.requires_grad for p in model.parameters())
    assert violations(outcome.images, data.pixels(), LINF) == []
    right = model(data.pixels()).argmax(1) == data.labels
    assert torch.equal(target.passes.backward, right.long())
    assert torch.equal(target.passes.forward, 1 + 2 * right.long())
    logits = model(outcome.images).detach()
    true = logits.gather(1, data.labels[:, None]).squeeze(1)
    rest = logits.scatter(1, data.labels[:, None], -torch.inf).amax(1)
    assert torch.allclose(outcome.margin, true - rest, atol=1e-4), "graded on what it returns"


def test_what_mi_fgsm_is_not_for(classifier: Classifier, test_set: ImageSet) -> None:
    data = head(test_set, 2)
    with pytest.raises(ValueError, match=r"mi_fgsm cannot bind noise .* not for stochastic"):
        attack_model(MI_FGSM, Defense(classifier, Noisy()), data, LINF)
    with pytest.raises(ValueError, match="for linf threats only, not l2"):
        attack_model(MI_FGSM, classifier, data, BALL)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Square, {"kind": "square", "queries": 0, "eot": 1}),
        (Square, {"kind": "square", "queries": 10}),
        (Flip, {"kind": "flip", "at": 1.0, "steps": 1, "candidates": 1, "eot": 1}),
        (Flip, {"kind": "flip", "at": 0.5, "steps": 1, "candidates": 0, "eot": 1}),
        (RFgsm, {"kind": "r_fgsm", "alpha": 1.0, "eot": 1}),
        (RFgsm, {"kind": "r_fgsm", "alpha": 0.0, "eot": 1}),
        (MiFgsm, {"kind": "mi_fgsm", "steps": 5, "step": 0.0, "decay": 1.0}),
        (MiFgsm, {"kind": "mi_fgsm", "steps": 5, "step": 0.1, "decay": -1.0}),
    ],
)
def test_settings_that_make_no_attack_are_refused(
    kind: type[Attack], settings: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError):
        kind.model_validate(settings)


@pytest.mark.parametrize(("attack", "threat", "noisy"), [c for c in CASES if c.values[2]])
def test_no_two_looks_share_their_noise(
    attack: Attack, threat: Linf | L2, noisy: str, classifier: Classifier, test_set: ImageSet
) -> None:
    seen: list[int] = []

    class Listening(Noisy):
        def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
            assert draws is not None and draws.role == "attack"
            seen.append(draws.draw)
            return super().purify(x, draws)

    data = head(test_set, 6)
    target = bind(Defense(classifier, Listening()), "full", Draws(0, "attack", data.ids), 2)
    attack.run(target, data.pixels(), data.labels, threat, target.draws)
    # Five images beside each other at the end of a search are asked under the same noise.
    looks = [draw for draw, _ in groupby(seen)]
    assert looks == list(range(len(looks)))
