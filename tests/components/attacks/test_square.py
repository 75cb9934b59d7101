"""Square: its patches by the paper and its search without gradients."""

import pytest
import torch
import torchattacks
from torch import Tensor
from toy_networks import Function, Linear, Rounded
from toys import BALL, LINF, THREATS, attack_model, fooled, grey_images, head, parse_attack

from components.attacks import L2, Linf, craft, violations
from components.attacks.autoattack import AuthorsSquare, AutoAttack
from components.attacks.gradient import Pgd
from components.attacks.square import (
    Square,
    move_mass,
    patch_area,
    pyramid,
    schedule,
    two_pyramids,
)
from components.data.draws import Draws, NoiseStream
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.defense import Defense
from components.models.purifiers import Purifier

SQUARE = Square(kind="square", queries=30, eot=2)


@THREATS
def test_square_fools_more_images_than_noise(
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
    right = Defense(classifier, None)(data.pixels()).argmax(1) == data.labels
    assert torch.equal(square.forward + square.spared - spent, 1 + right.long()), (
        "besides the changes, one pass for the clean image and one for the start"
    )


def test_patches_shrink_as_in_the_authors_code() -> None:
    """Change i of n, from 0, counts as 10,000 i / n; after 10, 50, 200, ... the area is halved."""
    expected = {0: 1, 5: 1, 6: 2, 25: 2, 26: 4, 100: 4, 101: 8, 250: 8, 251: 16, 501: 32, 1001: 64}
    expected |= {2000: 64, 2001: 128, 3000: 128, 3001: 256, 4000: 256, 4001: 512, 4999: 512}
    for change, divisor in expected.items():
        assert patch_area(change, 5000) == 0.8 / divisor, change
    assert [patch_area(change, 4) for change in range(4)] == [0.8 / d for d in (1, 64, 128, 256)]
    model = Function(lambda x: x)
    library = torchattacks.Square(model, n_queries=777)
    assert all(library.p_selection(change) == patch_area(change, 777) for change in range(777))


def test_inside_autoattack_patches_shrink_by_the_query_alone() -> None:
    *_, inside = AutoAttack(kind="autoattack", version="standard").ensemble(10)
    assert isinstance(inside, Square) and not inside.rescaled and SQUARE.rescaled
    last = {10: 1, 50: 2, 200: 4, 500: 8, 1000: 16, 2000: 32, 4000: 64, 6000: 128, 8000: 256}
    for change, divisor in last.items():
        assert patch_area(change, None) == 0.8 / divisor
        assert patch_area(change + 1, None) == 0.4 / divisor
    assert patch_area(0, None) == 0.8 and patch_area(10**6, None) == 0.8 / 512


# The first change, from 0, of every side, computed by hand from the areas.
SIDES: dict[tuple[str, int, bool], dict[int, int]] = {
    ("linf", 28, False): {
        0: 25, 11: 18, 51: 13, 201: 9, 501: 6, 1001: 4, 2001: 3, 4001: 2,
    },
    ("linf", 28, True): {
        0: 25, 6: 18, 26: 13, 101: 9, 251: 6, 501: 4, 1001: 3, 2001: 2, 4001: 1,
    },
    ("linf", 32, False): {
        0: 29, 11: 20, 51: 14, 201: 10, 501: 7, 1001: 5, 2001: 4, 4001: 3,
    },
    ("l2", 28, False): {0: 25, 11: 19, 51: 13, 201: 9, 501: 7, 1001: 5, 2001: 3},
    ("l2", 28, True): {0: 25, 6: 19, 26: 13, 101: 9, 251: 7, 501: 5, 1001: 3},
    ("l2", 32, False): {0: 29, 11: 21, 51: 15, 201: 11, 501: 7, 1001: 5, 4001: 3},
}  # fmt: skip


@pytest.mark.parametrize(("norm", "size", "rescaled"), SIDES)
def test_each_of_5000_changes_has_the_authors_patch(norm: str, size: int, rescaled: bool) -> None:
    images, threat = torch.zeros(1, 3, size, size), LINF if norm == "linf" else BALL
    blocks = list(schedule(5000, images, threat, rescaled))
    assert [query for queries, _ in blocks for query in queries] == list(range(1, 5001))
    assert max(len(queries) for queries, _ in blocks) == 128
    sides = [side for queries, side in blocks for _ in queries]
    first = {side: sides.index(side) for side in dict.fromkeys(sides)}
    assert {change: side for side, change in first.items()} == SIDES[norm, size, rescaled]
    assert sides == sorted(sides, reverse=True)


@THREATS
@pytest.mark.parametrize("kind", [Square, AuthorsSquare])
def test_patches_reach_the_last_row_and_column_but_inside_autoattack(
    kind: type[Square], threat: Linf | L2
) -> None:
    images, rows = torch.full((40, 1, 12, 12), 0.5), torch.arange(40)
    changed = torch.zeros(12, 12, dtype=torch.bool)
    propose = kind(kind="square", queries=9, eot=1)._changes(
        images, threat, Draws(0, "attack", rows), range(1, 51), 3
    )
    for k in range(50):
        changed |= (propose(images, rows, torch.full((40,), k))[0] != images).any(0)[0]
    assert changed[:-1, :-1].all()
    edge = torch.cat([changed[-1], changed[:, -1]])
    assert edge.all() if kind is Square else not edge.any()


def test_two_pyramids_are_the_eta_of_the_paper() -> None:
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
def test_square_uses_the_whole_radius_and_whole_patches(threat: Linf | L2) -> None:
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
        assert torch.allclose(delta.abs(), torch.tensor(LINF.eps), atol=1e-6), (
            "a pixel is not at a corner of the ball"
        )
        neighbours = (delta[:, :, 1:] * delta[:, :, :-1] > 0).float().mean()
        assert neighbours > 0.65, "single pixels changed instead of stripes and patches"
    else:
        assert torch.allclose(delta.flatten(1).norm(dim=1), torch.tensor(BALL.eps), atol=1e-5)
        assert (delta.abs() < 1e-7).flatten(1).any(1).all(), "no window was emptied"
    clean = (data.pixels().flatten(1) @ (weight[0] - weight[1])) + 1e3
    after = (crafted.images.flatten(1) @ (weight[0] - weight[1])) + 1e3
    assert (after < clean).all()


@pytest.mark.parametrize("shape", [(1, 9, 9), (3, 8, 12)])
def test_move_mass_is_algorithm_3(shape: tuple[int, int, int]) -> None:
    """Computed again image by image, with the windows that the draws choose."""
    channels, height, width = shape
    generator, draws, eps = torch.Generator().manual_seed(0), Draws(0, "attack", torch.arange(9)), 2
    origin = torch.rand(9, *shape, generator=generator)
    delta = torch.randn(9, *shape, generator=generator)
    delta *= torch.linspace(0, 1, 9).view(-1, 1, 1, 1) * eps / delta.flatten(1).norm(dim=1).amax()
    side = 3 if shape[0] == 1 else 5
    propose = move_mass(origin, eps, draws, range(4, 7), side, True)
    found, _ = propose(origin + delta, torch.arange(9), torch.ones(9, dtype=torch.int64))
    draws = draws.redraw(5)
    for row, u in enumerate(draws.uniform((5 + channels,), "square").tolist()):
        old, new = delta[row], delta[row].clone()
        top, below = (int(v * (height - side + 1)) for v in (u[0], u[2]))
        left, right = (int(v * (width - side + 1)) for v in (u[1], u[3]))
        first = (slice(None), slice(top, top + side), slice(left, left + side))
        second = (slice(None), slice(below, below + side), slice(right, right + side))
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
        expected = (origin[row] + eps * new / new.norm()).clamp(0, 1)
        assert torch.allclose(found[row], expected, atol=1e-5), row


@pytest.mark.parametrize("noisy", [False, True])
@THREATS
def test_square_returns_the_clean_image_if_nothing_is_better(
    threat: Linf | L2, noisy: bool
) -> None:
    data = grey_images(1)
    clean = data.pixels()

    def logits(x: Tensor) -> Tensor:
        distance = (x - clean).abs().flatten(1).sum(1)
        return torch.stack([1 + distance, 0 * distance], 1)

    class Still(Purifier):
        stochastic = True

        def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
            return x

    crafted = attack_model(
        SQUARE, Defense(Function(logits), Still() if noisy else None), data, threat
    )
    assert torch.equal(crafted.images, clean)


@THREATS
def test_square_needs_no_gradient(
    threat: Linf | L2, classifier: Classifier, test_set: ImageSet
) -> None:
    """Behind fine rounding a gradient attack finds nothing; more queries find more."""

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
def test_square_compares_images_under_equal_noise(threat: Linf | L2) -> None:
    """Noise that shifts all margins equally changes no comparison, and so no byte.

    If margins of earlier draws were kept, the luckiest image so far would never be replaced.
    """
    data = grey_images(12)
    weight = torch.randn(2, 36, generator=torch.Generator().manual_seed(3)).double()
    model = Linear(weight, torch.tensor([300.0, 0]).double())
    fixed = attack_model(Square(kind="square", queries=50, eot=1), model, data, threat)
    assert not fixed.success.any()

    class Shifted(Purifier):
        stochastic = True

        def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
            assert stream is not None
            return x.double() + 100 * stream.normal((1, 1, 1), "shift")

    for eot in (1, 3):
        attack = Square(kind="square", queries=50, eot=eot)
        crafted = attack_model(attack, Defense(model, Shifted()), data, threat)
        assert torch.equal(crafted.images, fixed.images)
        assert (crafted.forward == eot * (2 * 50 + 2)).all() and not crafted.spared.any()
    assert (fixed.forward + fixed.spared == 52).all()


def test_square_is_as_strong_as_that_of_torchattacks(
    classifier: Classifier, test_set: ImageSet
) -> None:
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
