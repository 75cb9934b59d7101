"""DeepFool crosses the nearest boundary: by hand, in closed form, and on a trained classifier."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_networks import Detached, Noisy, Rounded
from toys import BALL, LINF, distances, head, linear_task, parse_attack, run_on_target

from components.attacks import craft
from components.attacks.distance.cw import CwL2
from components.attacks.distance.deepfool import DeepFool, onto_nearest
from components.data.draws import Draws
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.defense import Defense, Mode, bind
from components.models.purifiers import Purifier


def deepfool(**changes: Any) -> DeepFool:
    attack: DeepFool = parse_attack("deepfool", **{"steps": 20, **changes})
    return attack


class Gap(nn.Module):
    """Two logits over one pixel: a function of the pixel, and zero."""

    def __init__(self, gap: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gap = gap
        self.anchor = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        gap = self.gap(x.flatten(1).mean(1))
        return torch.stack([gap, 0 * gap], 1)


@pytest.mark.parametrize("mode", ["full", "bpda"])
@pytest.mark.parametrize("purifier", [None, Noisy(), Rounded(), Detached(1.0)], ids=repr)
def test_a_jacobian_equals_the_gradients_of_single_evaluations(
    purifier: Purifier | None, mode: Mode, classifier: Classifier, test_set: ImageSet
) -> None:
    data = head(test_set, 6)
    x, y, draws = data.pixels(), data.labels, Draws(0, "attack", data.ids)
    others = (y[:, None] + torch.tensor([4, 1, 7])) % 10
    defense = Defense(classifier, purifier).freeze()
    target = bind(defense, mode, draws, 3)
    margins, gaps, slopes = target.jacobian(x, y, others, 5)
    eot = 3 if isinstance(purifier, Noisy) else 1
    assert target.passes.forward.tolist() == [eot] * 6
    assert target.passes.backward.tolist() == [3 * eot] * 6
    for k in range(3):

        def gap(logits: Tensor, labels: Tensor, k: int = k) -> Tensor:
            return (logits.gather(1, others[:, [k]]) - logits.gather(1, labels[:, None]))[:, 0]

        seen = bind(defense, mode, draws, 3).evaluate(x, y, gap, 5)
        assert torch.allclose(gaps[:, k], seen.loss, atol=1e-6)
        assert torch.allclose(slopes[:, k], seen.gradient, atol=1e-5)
        assert torch.equal(margins, seen.margin)
    no_gradient = mode == "full" and isinstance(purifier, Rounded | Detached)
    assert (slopes.abs().max() == 0) == no_gradient
    assert not (margins.requires_grad or gaps.requires_grad or slopes.requires_grad)


def test_a_jacobian_counts_its_passes_on_the_rows_of_the_target() -> None:
    model, data = linear_task(4, 5)
    target = bind(Defense(model, None).freeze(), "full", Draws(0, "attack", data.ids), 1)
    rows = torch.tensor([3, 1])
    classes = torch.tensor([[0, 1], [2, 3]])
    _, gaps, slopes = target[rows].jacobian(data.pixels()[rows], data.labels[rows], classes, 0)
    assert target.passes.backward.tolist() == [0, 2, 0, 2, 0]
    logits = model(data.pixels()[rows])
    true = data.labels[rows]
    assert torch.allclose(gaps, logits.gather(1, classes) - logits.gather(1, true[:, None]))
    expected = model.weight[classes] - model.weight[true][:, None]
    assert torch.allclose(slopes.flatten(2), expected, atol=1e-6)


def test_the_move_onto_the_nearest_boundary_by_hand() -> None:
    """Distances 3/5 and 1/2: onto the second, by 1/4 of its gradient (2, 0)."""
    gaps = torch.tensor([[-3.0, -1.0]])
    slopes = torch.tensor([[3.0, 4.0], [2.0, 0.0]]).view(1, 2, 1, 1, 2)
    assert onto_nearest(gaps, slopes).flatten().tolist() == [0.5, 0.0]
    nearer = onto_nearest(torch.tensor([[-2.0, -1.0]]), slopes)
    assert nearer.flatten().tolist() == pytest.approx([0.24, 0.32])
    behind = onto_nearest(torch.tensor([[-2.0, 0.5]]), slopes)
    assert behind.flatten().tolist() == [0, 0], "that boundary is crossed already"


def test_the_move_ignores_zero_and_nan_gradients() -> None:
    slopes = torch.tensor([[3.0, 4.0], [0.0, 0.0], [torch.nan, 1.0]]).view(1, 3, 1, 1, 2)
    gaps = torch.tensor([[-5.0, -1e-3, -2.0]])
    assert onto_nearest(gaps, slopes).flatten().tolist() == pytest.approx([0.6, 0.8])
    assert onto_nearest(gaps[:, 1:], slopes[:, 1:]).flatten().tolist() == [0, 2]
    assert onto_nearest(gaps[:, 1:2], slopes[:, 1:2]).flatten().tolist() == [0, 0]
    unlikely = torch.tensor([[-5.0, -torch.inf, -torch.inf]])
    assert onto_nearest(unlikely, slopes).flatten().tolist() == pytest.approx([0.6, 0.8])
    for gone in (slice(1, 2), slice(1, 3)):
        assert onto_nearest(unlikely[:, gone], slopes[:, gone]).isfinite().all()
    assert not onto_nearest(torch.tensor([[-5.0, -1.0, torch.nan]]), slopes).any()


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("overshoot", [0.02, 0.2])
def test_one_step_of_deepfool_is_exact_on_a_linear_model(classes: int, overshoot: float) -> None:
    model, data = linear_task(classes)
    exact = distances(model, data, 2).clamp_min(0)
    attack = deepfool(classes=classes, overshoot=overshoot, steps=1)
    crafted = craft(attack, Defense(model, None).freeze(), "full", data, BALL, 0, 64)
    assert crafted.success.all()
    assert crafted.images.min() > 0 and crafted.images.max() < 1, "pixels were clipped to [0,1]"
    found = BALL.distance(crafted.images, data.pixels())
    assert torch.allclose(found, (1 + overshoot) * exact, rtol=1e-4, atol=1e-6)
    clean = exact == 0
    assert 0 < clean.sum() < len(data) / 4
    assert torch.equal(crafted.iterations, (~clean).long())
    assert torch.equal(crafted.backward, (classes - 1) * (~clean).long())
    assert torch.equal(crafted.forward, 2 + 2 * (~clean).long())


def test_deepfool_never_reports_less_than_the_exact_distance() -> None:
    """On linear models the closed form is a lower bound, even where pixels are clipped."""
    model, data = linear_task(4)
    dark = ImageSet(data.images - 89, data.labels, data.ids, data.class_names)
    labels = model(dark.pixels()).argmax(1)
    dark = ImageSet(dark.images, labels, dark.ids, dark.class_names)
    crafted = craft(
        deepfool(classes=4, steps=30), Defense(model, None).freeze(), "full", dark, BALL, 0, 200
    )
    assert (crafted.images == 0).sum() > (dark.images == 0).sum() + 10, (
        "too few pixels were clipped to [0,1]"
    )
    found = BALL.distance(crafted.images, dark.pixels())
    assert crafted.success.float().mean() > 0.9
    assert (found >= distances(model, dark, 2).clamp_min(0) - 1e-5)[crafted.success].all()


def test_deepfool_on_a_curve_is_newton_with_one_overshoot() -> None:
    """Gap x^2 - 1/4 from x = 0.9 by hand. Newton: 0.588889, 0.506709. Scaled by 1.02 the first is
    0.582667 (true side), the second 0.498843 (across). Scaling each step would give 0.504316.
    """
    grey = torch.full((1, 1, 1, 1), 0.9)
    data = ImageSet(torch.zeros(1, 1, 1, 1).byte(), torch.zeros(1).long(), torch.arange(1), ("a",))
    defense = Defense(Gap(lambda x: x**2 - 0.25), None)
    for steps, expected in ((1, 0.9), (2, 0.498843), (9, 0.498843)):
        _, outcome = run_on_target(deepfool(classes=2, steps=steps), defense, data, grey)
        assert outcome.images.item() == pytest.approx(expected, abs=2e-6)
        assert outcome.iterations.item() == min(steps, 2)
    assert outcome.margin.item() == pytest.approx(0.498843**2 - 0.25, abs=5e-6)


def test_deepfool_keeps_an_unscaled_iterate_if_only_that_one_fools() -> None:
    """Only a band around 0.5 fools. Its gap |u|^0.9 - 0.05^0.9, with u = x - 0.5, moves u = 0.4 to
    0.4 - (0.4 / 0.9) (1 - (0.05 / 0.4)^0.9) = 0.023954, inside; scaled by 1.5 that is -0.164.
    """
    light = torch.full((1, 1, 1, 1), 0.9)
    data = ImageSet(torch.zeros(1, 1, 1, 1).byte(), torch.zeros(1).long(), torch.arange(1), ("a",))
    band = Defense(Gap(lambda x: (x - 0.5).abs() ** 0.9 - 0.05**0.9), None)
    _, outcome = run_on_target(deepfool(classes=2, overshoot=0.5, steps=5), band, data, light)
    assert outcome.images.item() == pytest.approx(0.523954, abs=1e-4)
    assert outcome.margin.item() < 0 and outcome.iterations.item() == 2


def test_fewer_classes_never_give_a_nearer_image() -> None:
    model, data = linear_task(6)
    far = []
    for classes in (2, 4, 6):
        attack = deepfool(classes=classes, steps=1)
        crafted = craft(attack, Defense(model, None).freeze(), "full", data, BALL, 0, 200)
        assert crafted.success.all()
        far.append(BALL.distance(crafted.images, data.pixels()))
        assert crafted.backward.max() == classes - 1
    for fewer, more in pairwise(far):
        assert (more <= fewer + 1e-5).all()
    assert (far[2] < 0.95 * far[0]).any()


@pytest.mark.parametrize("classes", [5, 11])
def test_too_many_classes_are_refused_with_the_numbers(classes: int) -> None:
    model, data = linear_task(4, 6)
    with pytest.raises(ValueError, match=f"classes: {classes}, but there are 4 classes here"):
        craft(deepfool(classes=classes), Defense(model, None), "full", data, LINF, 0, 6)


def test_deepfool_goes_just_across_the_boundary_of_a_trained_classifier(
    classifier: Classifier, test_set: ImageSet
) -> None:
    data, defense = head(test_set, 100), Defense(classifier, None).freeze()
    crafted = craft(deepfool(), defense, "full", data, BALL, 0, 100)
    assert crafted.success.float().mean() >= 0.98
    moved = BALL.distance(crafted.images, data.pixels()) > 0
    assert torch.equal(moved, classifier(data.pixels()).argmax(1) == data.labels)
    back = data.pixels() + (crafted.images - data.pixels()) * 0.9
    restored = (classifier(back).argmax(1) == data.labels)[moved]
    assert restored.float().mean() > 0.9, "a tenth of the way back is still across"
    cw = CwL2(kind="cw_l2", c=1.0, searches=5, steps=60, learning_rate=0.05, confidence=0.0, eot=1)
    nearest = craft(cw, defense, "full", data, BALL, 0, 100)
    ratio = BALL.distance(crafted.images, data.pixels()) / BALL.distance(
        nearest.images, data.pixels()
    )
    assert ratio[moved & nearest.success].median() < 1.05


def test_more_steps_of_deepfool_keep_the_images_found_before(
    classifier: Classifier, test_set: ImageSet
) -> None:
    data, defense = head(test_set, 60), Defense(classifier, None).freeze()
    ladder = [
        craft(deepfool(steps=n), defense, "full", data, BALL, 0, 60) for n in (1, 2, 3, 6, 20)
    ]
    for weak, strong in pairwise(ladder):
        assert strong.success[weak.success].all()
        assert torch.equal(strong.images[weak.success], weak.images[weak.success])
    assert ladder[0].success.sum() < ladder[-1].success.sum()
    lost = ~ladder[0].success
    assert torch.equal(ladder[0].images[lost], data.pixels()[lost]), (
        "not the clean image where none fooled"
    )


def test_deepfool_fools_under_most_draws_and_not_by_one_lucky_draw(
    classifier: Classifier, test_set: ImageSet
) -> None:
    """The noise that measures this is not the noise that selected the image."""
    data, defense = head(test_set, 40), Defense(classifier, Noisy()).freeze()
    fractions = []
    for steps in (1, 20):
        crafted = craft(deepfool(steps=steps, eot=4), defense, "full", data, LINF, 0, 40)
        draws = Draws(0, "score", data.ids)
        fractions.append(
            torch.stack([
                defense(crafted.images, draws.redraw(k)).argmax(1) != data.labels for k in range(16)
            ]).float().mean()
        )  # fmt: skip
    assert fractions[1] > 0.6 and fractions[1] > fractions[0] + 0.1, fractions
