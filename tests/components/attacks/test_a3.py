"""A3: its schedule against hand-computed values, what it learns, and which images it gives up."""

from itertools import pairwise

import pytest
import torch
from authors import allowed, recorded, subject
from pydantic import ValidationError
from torch import Tensor, nn
from toy_networks import Function, Linear, Noisy
from toys import (
    LINF,
    THREATS,
    attack_model,
    distances,
    fooled,
    head,
    keyed,
    linear_task,
    parse_attack,
    resized,
)

from components.attacks import L2, Linf, a3, craft
from components.attacks.a3 import Direction, Round, choose, learned_signs, planned, step_lengths
from components.checks.scores import TIERS
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.defense import Defense

A3 = parse_attack("a3")
NEVER = 1e9  # a threshold that no count reaches


# The schedule


def test_steps_fall_along_a_cosine_from_a_radius() -> None:
    short, long = step_lengths(8), step_lengths(32)
    assert len(short) == 8 and len(long) == 32
    assert short[0] == long[0] == 1
    # 0.1 + 0.9 (1 + cos 60 degrees) / 2 and (1 + cos 80 degrees) / 2, cos 80 = 0.173648
    assert short[3] == pytest.approx(0.775) and short[4] == pytest.approx(0.628142, abs=1e-6)
    # 0.001 + 0.999 (1 + cos 60 degrees) / 2, and cos 120 degrees
    assert long[11] == pytest.approx(0.75025) and long[22] == pytest.approx(0.25075)
    assert all(a > b for a, b in pairwise(long))


@pytest.mark.parametrize(
    ("each", "standing", "images", "count", "restarts"),
    [
        (Round(1, 7, 15), 200, 256, 200, 1),
        (Round(0.7, 7, 32), 200, 256, 140, 1),
        (Round(0.7, 7, 32), 197, 256, 138, 1),  # 137.9 images
        (Round(0.03, 7, 67, 50), 200, 256, 6, 50),
        (Round(0.03, 7, 67, 50), 100, 256, 3, 50),
        (Round(0.03, 7, 67, 50), 60, 256, 2, 45),  # 1.8 images 50 times
        (Round(0.03, 7, 67, 50), 1, 1, 1, 2),  # 0.03 images 50 times
        (Round(0.03, 7, 67, 50), 51, 256, 51, 20),  # fewer than a fifth: all of them
        (Round(0.3, 7, 47), 51, 256, 51, 1),
        (Round(0.3, 7, 47), 52, 256, 16, 1),
    ],
)
def test_a_round_attacks_its_fraction_of_the_standing_images(
    each: Round, standing: int, images: int, count: int, restarts: int
) -> None:
    assert planned(each, standing, images) == (count, restarts)


def test_every_image_meets_the_opening_and_then_fewer_and_fewer_are_attacked() -> None:
    assert [each.share for each in a3.OPENING] == [1, 1, 1]
    shares = [each.share for each in a3.BY_MARGIN]
    assert shares == sorted(shares, reverse=True) and shares[0] == 0.7 and shares[-1] == 0.03
    steps = [each.steps for each in a3.BY_MARGIN]
    assert steps == sorted(steps)


def by_distance(count: int = 20) -> tuple[Linear, ImageSet]:
    """Return a linear model of two classes and images of class 0 that have other margins each.

    The smallest margin is that of the last image; nothing in a ball of 0.05 fools any.
    """
    images = torch.full((count, 1, 2, 2), 128, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(count, 0, -1).to(torch.uint8) + 100
    weight = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]])
    data = ImageSet(images, torch.zeros(count).long(), torch.arange(count) * 7, ("a", "b"))
    return Linear(weight, torch.tensor([-0.2, 0.0])), data


def test_the_easiest_images_go_on_and_the_hardest_are_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The passes of each image by hand: what nothing fools costs the more, the nearer it was."""
    model, data = by_distance()
    monkeypatch.setattr(a3, "BY_MARGIN", (Round(0.5, 2, 3), Round(0.2, 0, 4, 3)))
    crafted = attack_model(A3, model, data, resized(LINF, 0.05))
    assert not crafted.success.any()
    opening = A3.effort(2, False)
    # A clean pass, one to rank classes; 8 + 22 + 22 gradients; the last iterate of each restart.
    assert (opening.forward, opening.backward) == (1 + 1 + 52 + 3, 52)
    half = 5 + 1
    # Four images three times, side by side.
    fifth = 3 * (4 + 1)
    nearest = [fifth + half] * 4 + [half] * 6 + [0] * 10
    assert (crafted.forward - opening.forward).tolist() == nearest[::-1]
    assert (crafted.backward - opening.backward).tolist() == [0] * 10 + [5] * 6 + [5 + 12] * 4
    assert crafted.iterations.tolist() == crafted.backward.tolist()


def test_copies_of_an_image_stop_when_one_is_fooled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a gradient a copy is fooled where it starts, or never."""
    weight = torch.randn(16, generator=torch.Generator().manual_seed(0))

    def logits(x: Tensor) -> Tensor:
        beyond = (x.flatten(1) - 128 / 255) @ weight > 0.17
        return torch.stack([0 * x.flatten(1).sum(1), beyond.float() - 0.5], 1)

    grey = torch.full((10, 1, 4, 4), 128, dtype=torch.uint8)
    data = ImageSet(grey, torch.zeros(10).long(), torch.arange(10), ("a", "b"))
    monkeypatch.setattr(a3, "LEADING", NEVER)
    monkeypatch.setattr(a3, "OPENING", (Round(1, 0, 1),) * 3)
    monkeypatch.setattr(a3, "BY_MARGIN", (Round(0.1, 0, 8),))
    monkeypatch.setattr(
        a3, "planned", lambda each, standing, images: (1, 400) if each.steps == 8 else (standing, 1)
    )
    crafted = attack_model(A3, Function(logits), data, resized(LINF, 0.05))
    late = crafted.success & (crafted.backward > 3)
    assert late.any()
    # Ten copies of one image at a time: eight gradients each, or one where some copy is fooled.
    assert ((crafted.backward[late] - 3) % 80 == 10).all()


# Directions


@pytest.mark.parametrize(
    ("true", "other", "low", "high", "weight"),
    [
        (0.0, 0.0, -0.5, 0.1, 0.8),  # nothing learned: the natural one
        (-2.0, 3.0, -0.5, 0.1, 0.8),
        (2.0, 3.0, -0.1, 0.5, 0.8),
        (2.0, -3.0, -0.1, 0.5, -0.8),
        (-2.0, -3.0, -0.5, 0.1, -0.8),
    ],
)
def test_directions_have_the_signs_that_fooled_images(
    true: float, other: float, low: float, high: float, weight: float
) -> None:
    assert choose(10, true, other, leads=False, last=False) == Direction(low, high, weight, 9)


def test_directions_go_by_the_number_of_classes() -> None:
    def nearest(classes: int, last: bool = False, leads: bool = False) -> int:
        return choose(classes, 1.0, 1.0, leads, last).nearest

    assert [nearest(k) for k in (2, 3, 10, 11, 20, 100, 1000)] == [1, 2, 9, 10, 14, 14, 20]
    assert [nearest(k, last=True) for k in (2, 5, 10, 20, 100, 1000)] == [1, 4, 4, 14, 14, 20]
    assert nearest(10, last=True, leads=True) == 9
    # The two weights grow with the number of the others; many classes learn no signs.
    assert choose(50, 1.0, -1.0, False, False) == Direction(-0.5, 2.5, -4.0, 14)
    assert choose(100, 1.0, -1.0, False, False) == Direction(-5.0, 1.0, 8.0, 14)
    assert choose(2, -1.0, -1.0, False, False) == Direction(-0.5, 0.1, -0.8, 1)
    # Where directions alone fool images, and in the last rounds, signs are fixed.
    assert choose(10, -1.0, -1.0, True, False) == Direction(-0.1, 0.5, 0.8, 9)
    assert choose(10, 1.0, -1.0, True, True) == Direction(0.0, 0.0, 0.8, 9)
    assert choose(10, 1.0, -1.0, False, True) == Direction(-0.8, 0.1, 0.8, 4)


def test_weights_are_those_of_the_true_class_one_runner_up_and_noise() -> None:
    draws, labels = keyed(40), torch.arange(40) % 5
    ranked = torch.stack([(labels + shift) % 5 for shift in (3, 1, 4, 2, 0)], 1)
    direction = Direction(-0.5, 0.1, 0.8, 3)
    for restart, shift in ((1, 3), (2, 1), (3, 4), (4, 3)):
        weights = direction.weights(draws.redraw(restart), labels, ranked, restart)
        true, others = weights.gather(1, labels[:, None]), (labels + shift)[:, None] % 5
        assert true.min() >= -0.5 and true.max() <= 0.1 and true.unique().numel() > 30
        assert (weights.gather(1, others) == 0.8).all()
        rest = weights.scatter(1, labels[:, None], torch.nan).scatter(1, others, torch.nan)
        rest = rest[rest.isfinite()]
        assert len(rest) == 120 and rest.abs().max() <= 1 and rest.min() < -0.8 < 0.8 < rest.max()


def test_signs_are_those_of_the_weights_that_fooled() -> None:
    weights = torch.tensor([[0.5, -1.0, 0.25], [-0.25, 0.75, 1.0]])
    true, other = learned_signs(weights, torch.tensor([0, 2]), torch.tensor([1, 1]))
    assert (true, other) == (0.5 + 1.0, -1.0 + 0.75)


def misled(images: int) -> tuple[nn.Module, ImageSet]:
    """Return a model whose margin falls one way, and whose labels change the other way only.

    With t from -1 to 1 across a ball of 0.05, the runner-up is class 2, and class 1 wins from
    t = 0.6 on.
    """

    def logits(x: Tensor) -> Tensor:
        t = (x - 128 / 255).flatten(1).sum(1) / (36 * 0.05)
        return torch.stack([5 + t, 2 + 6 * t, 4.8 + 0.9 * t, torch.zeros_like(t)], 1)

    grey = torch.full((images, 1, 6, 6), 128, dtype=torch.uint8)
    return Function(logits), ImageSet(
        grey, torch.zeros(images).long(), torch.arange(images), tuple("0123")
    )


def test_later_starts_go_where_earlier_ones_fooled_other_images() -> None:
    model, data = misled(40)
    ball = resized(LINF, 0.05)
    by_margin = attack_model(parse_attack("apgd_dlr", restarts=3), model, data, ball)
    assert not by_margin.success.any()
    crafted = attack_model(A3, model, data, ball)
    assert crafted.success.all()
    # Random weights fool about half of the images in the second round, ...
    spent, random = crafted.backward, 8 + 7 + 1
    assert 8 < int((spent <= random).sum()) < 32
    # ... and their signs fool all the others as soon as they lead.
    assert (spent <= 8 + 22 + 7 + 1).all()


def test_where_directions_alone_fool_images_they_are_tried_more(
    classifier: Classifier, test_set: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a saturated softmax the gradient of the margin is mostly rounded to zero."""
    saturated = Function(lambda x: (15 * classifier(x)).softmax(1))
    data = head(test_set, 60)
    found = fooled(attack_model(A3, saturated, data, LINF))
    monkeypatch.setattr(a3, "LEADING", NEVER)
    assert found >= fooled(attack_model(A3, saturated, data, LINF)) + 2


# Truth


@THREATS
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_a3_finds_the_exact_robust_accuracy_of_a_linear_model(
    classes: int, threat: Linf | L2
) -> None:
    model, data = linear_task(classes, 400)
    exact = distances(model, data, 1 if threat is LINF else 2)
    eps = exact.quantile(0.5).item()
    assert 0 < eps < 90 / 255 / 2, "pixels would be clipped to [0,1]"
    crafted = attack_model(A3, model, data, resized(threat, eps))
    assert not (crafted.success & (exact > eps + 1e-5)).any()
    assert (~crafted.success).float().mean().item() == pytest.approx(0.5, abs=0.003)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a3_leaves_no_more_right_than_the_authors_autoattack(norm: str) -> None:
    model = subject("digits8")
    crafted = craft(A3, model.defense, "full", model.data, model.threat(norm), 0, len(model.data))
    assert int((~crafted.success).sum()) <= allowed(recorded("digits8", norm, "standard"))[-1]


# Parts, and what it is not for


def test_random_defenses_are_refused(classifier: Classifier, test_set: ImageSet) -> None:
    defense, data = Defense(classifier, Noisy()).freeze(), head(test_set, 4)
    with pytest.raises(ValueError, match="a3 is not for stochastic defenses"):
        craft(A3, defense, "full", data, LINF, 0, 4)
    # With its noise known and fixed the same defense is deterministic.
    assert len(craft(A3, defense, "fixed_noise", data, LINF, 0, 4).images) == 4


def test_an_image_fares_by_its_part_alone(classifier: Classifier, test_set: ImageSet) -> None:
    """The parts of a set are its batches, and no part sees another."""
    data, defense = head(test_set, 24), Defense(classifier, None).freeze()
    both = craft(A3, defense, "full", data, LINF, 0, 12)
    second = craft(A3, defense, "full", data[torch.arange(12, 24)], LINF, 0, 12)
    assert torch.equal(both.images[12:], second.images)
    assert torch.equal(both.forward[12:], second.forward)


def test_a3_carries_no_claim_and_has_no_rank() -> None:
    assert not A3.strong() and "a3" not in TIERS
    with pytest.raises(ValidationError):
        parse_attack("a3", steps=5)
