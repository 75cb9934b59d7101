"""Flip finds the flips that a threshold lets through, exactly where a model is linear."""

import pytest
import torch
from torch import Tensor
from toy_networks import Function, Linear
from toys import BALL, LINF, attack_model, fooled, grey_images, head, thresholded

from components.attacks import Linf
from components.attacks.flip import Flip
from components.attacks.gradient import Pgd
from components.data.draws import NoiseStream
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.defense import Defense, Mode
from components.models.purifiers import Purifier

MODES = pytest.mark.parametrize("mode", ["full", "bpda"])
FLIP = Flip(kind="flip", at=0.5, steps=6, candidates=4, eot=2)
TIGHT = Linf(norm="linf", eps_255=7.0)


def two_classes(count: int = 120) -> tuple[Linear, ImageSet, Tensor]:
    """Return a linear model of two classes, images near 0.5, and the change of the margin (N,P) by
    each flip: zero where the ball does not reach across 0.5.
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


@MODES
@pytest.mark.parametrize("candidates", [36, 5, 1])
def test_flip_finds_the_exact_robust_accuracy_of_a_linear_model_behind_a_threshold(
    mode: Mode, candidates: int
) -> None:
    """The margin falls by the sum over the flips; taken largest first, the fewest are needed."""
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
    assert untouched.all(), "a pixel changed without a flip"


def test_flips_break_a_defense_whose_gradient_is_zero(
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
def test_a_flip_is_taken_back_if_that_lowers_the_margin(mode: Mode, candidates: int) -> None:
    """The margin falls with pixel 2, then 1, then 0; below 0 only after taking back pixel 2."""
    margins = torch.tensor([5.0, 3.0, 4.0, 2.5, 4.0, 2.7, -1.0, 2.0])
    bits = torch.tensor([[code >> bit & 1 for bit in (2, 1, 0)] for code in range(8)])

    def logits(x: Tensor) -> Tensor:
        # Linear in every pixel, so that the gradient predicts a flip exactly.
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
    """One pixel of 36 matters, and no gradient says which: two a round take at most 18 rounds."""

    def logits(x: Tensor) -> Tensor:
        return torch.stack([(x[:, 0, 3, 4] < 0.5).float(), torch.full((len(x),), 0.5)], 1)

    images = torch.full((50, 1, 6, 6), 120, dtype=torch.uint8)
    images[:, 0, 0, 0] = 60  # out of reach
    data = ImageSet(images, torch.zeros(50).long(), torch.arange(50), tuple("ab"))
    attack = Flip(kind="flip", at=0.5, steps=18, candidates=2, eot=1)
    crafted = attack_model(attack, Function(logits), data, LINF)
    assert crafted.success.all()
    assert len(crafted.iterations.unique()) > 10, "images do not have orders of their own"
    assert 7 < crafted.iterations.float().mean() < 12
    idle = attack_model(attack, Function(lambda x: logits(0 * x)), data, LINF)
    assert (idle.iterations == 18).all() and (idle.forward == 1 + 18 * 2 + 35).all()
    assert torch.equal(idle.images, data.pixels())


def test_a_ball_that_allows_no_flip_costs_one_forward_pass(
    classifier: Classifier, test_set: ImageSet
) -> None:
    tiny = Linf(norm="linf", eps_255=0.3)
    crafted = attack_model(FLIP, thresholded(classifier), head(test_set, 30), tiny)
    assert (crafted.forward == 1).all() and not crafted.backward.any()
    assert torch.equal(crafted.images, head(test_set, 30).pixels())


def test_flips_are_compared_under_equal_noise() -> None:
    model, data, change = two_classes(30)

    class Shifted(Purifier):
        stochastic = True

        def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
            assert stream is not None
            return (x > 0.5).double() + 50 * stream.normal((1, 1, 1), "shift")

    attack = Flip(kind="flip", at=0.5, steps=100, candidates=9, eot=2)
    crafted = attack_model(attack, Defense(model, Shifted()), data, TIGHT)
    moved = ((crafted.images > 0.5) != (data.pixels() > 0.5)).flatten(1)
    assert torch.equal(moved, change < 0), "not exactly the flips that lower the margin"


def test_flip_refuses_l2(classifier: Classifier, test_set: ImageSet) -> None:
    with pytest.raises(ValueError, match="for linf threats only, not l2"):
        attack_model(FLIP, classifier, head(test_set, 2), BALL)
