"""DeepFool and the elastic-net attack find the nearest image there is, in L2 and in L1."""

from collections.abc import Callable
from itertools import groupby, pairwise
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from toys import (
    BALL,
    LINF,
    Detached,
    Linear,
    Noisy,
    Precise,
    Rounded,
    distances,
    head,
    linear_task,
)

from components.attacks import L2, Attack, Linf, craft
from components.attacks.distance.cw import CwL2
from components.attacks.distance.deepfool import DeepFool, onto_nearest
from components.attacks.distance.elastic_net import ElasticNet, shrink
from components.data.draws import Draws
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.defense import Defense, Mode, Target, bind, margin
from components.models.purifiers import Purifier

BOTH = pytest.mark.parametrize("name", ["deepfool", "elastic_net"])
STOCHASTIC = pytest.mark.parametrize("stochastic", [False, True], ids=["deterministic", "random"])


def deepfool(**changes: Any) -> DeepFool:
    section: dict[str, Any] = {"steps": 20, "overshoot": 0.02, "classes": 10, "eot": 2}
    return DeepFool(kind="deepfool", **{**section, **changes})


def elastic_net(**changes: Any) -> ElasticNet:
    section: dict[str, Any] = {
        "rule": "l1", "beta": 0.01, "c": 1.0, "searches": 2, "steps": 15, "learning_rate": 0.02,
        "confidence": 0.0, "eot": 2,
    }  # fmt: skip
    return ElasticNet(kind="elastic_net", **{**section, **changes})


def nearest_attack(name: str, **changes: Any) -> Attack:
    return deepfool(**changes) if name == "deepfool" else elastic_net(**changes)


class Gap(nn.Module):
    """Two logits over one pixel: a function of the pixel, and zero."""

    def __init__(self, gap: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gap = gap
        self.anchor = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        gap = self.gap(x.flatten(1).mean(1))
        return torch.stack([gap, 0 * gap], 1)


def taxi(images: Tensor, data: ImageSet) -> Tensor:
    return (images.double() - data.pixels().double()).flatten(1).abs().sum(1)


def run_bound(
    attack: Attack, defense: Defense, data: ImageSet, images: Tensor | None = None
) -> Any:
    """Run an attack without `craft`; return target and outcome."""
    draws = Draws(0, "attack", data.ids)
    target = bind(defense.freeze(), "full", draws, getattr(attack, "eot", 1))
    pixels = data.pixels() if images is None else images
    return target, attack.run(target, pixels, data.labels, LINF, draws)


# The gradients of single logits


@pytest.mark.parametrize("mode", ["full", "bpda"])
@pytest.mark.parametrize("purifier", [None, Noisy(), Rounded(), Detached(1.0)], ids=repr)
def test_a_jacobian_is_what_many_evaluations_say(
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
    dead = mode == "full" and isinstance(purifier, Rounded | Detached)
    assert (slopes.abs().max() == 0) == dead
    assert not (margins.requires_grad or gaps.requires_grad or slopes.requires_grad)


def test_rows_of_a_target_count_the_passes_of_their_jacobians() -> None:
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


# DeepFool where the answer is known


def test_the_move_onto_the_nearest_boundary_by_hand() -> None:
    """Distances 3/5 and 1/2: the second; its foot is 1/4 of its slope (2, 0) away."""
    gaps = torch.tensor([[-3.0, -1.0]])
    slopes = torch.tensor([[3.0, 4.0], [2.0, 0.0]]).view(1, 2, 1, 1, 2)
    assert onto_nearest(gaps, slopes).flatten().tolist() == [0.5, 0.0]
    nearer = onto_nearest(torch.tensor([[-2.0, -1.0]]), slopes)
    assert nearer.flatten().tolist() == pytest.approx([0.24, 0.32])
    behind = onto_nearest(torch.tensor([[-2.0, 0.5]]), slopes)
    assert behind.flatten().tolist() == [0, 0], "that boundary is crossed: nothing is to be done"


def test_the_move_ignores_what_is_no_slope() -> None:
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
def test_on_a_linear_model_one_step_of_deepfool_is_exact(classes: int, overshoot: float) -> None:
    model, data = linear_task(classes)
    exact = distances(model, data, 2).clamp_min(0)
    attack = deepfool(classes=classes, overshoot=overshoot, steps=1)
    crafted = craft(attack, Defense(model, None).freeze(), "full", data, BALL, 0, 64)
    assert crafted.success.all()
    assert crafted.images.min() > 0 and crafted.images.max() < 1, "a clip was met"
    found = BALL.distance(crafted.images, data.pixels())
    assert torch.allclose(found, (1 + overshoot) * exact, rtol=1e-4, atol=1e-6)
    clean = exact == 0
    assert 0 < clean.sum() < len(data) / 4
    assert torch.equal(crafted.iterations, (~clean).long())
    assert torch.equal(crafted.backward, (classes - 1) * (~clean).long())
    assert torch.equal(crafted.forward, 2 + 2 * (~clean).long())


def test_deepfool_never_goes_nearer_than_there_is_anything() -> None:
    """On linear models the closed form is a certificate, wherever pixels are clipped, too."""
    model, data = linear_task(4)
    dark = ImageSet(data.images - 89, data.labels, data.ids, data.class_names)
    labels = model(dark.pixels()).argmax(1)
    dark = ImageSet(dark.images, labels, dark.ids, dark.class_names)
    crafted = craft(
        deepfool(classes=4, steps=30), Defense(model, None).freeze(), "full", dark, BALL, 0, 200
    )
    assert (crafted.images == 0).sum() > (dark.images == 0).sum() + 10, "no clip was met"
    found = BALL.distance(crafted.images, dark.pixels())
    assert crafted.success.float().mean() > 0.9
    assert (found >= distances(model, dark, 2).clamp_min(0) - 1e-5)[crafted.success].all()


def test_deepfool_on_a_curve_is_newton_stretched_once() -> None:
    """Gap x^2 - 1/4 from x = 0.9 by hand. Newton: 0.588889, 0.506709. Stretched by 1.02 the first
    is 0.582667 (true side), the second 0.498843 (across). Stretching each step gives 0.504316.
    """
    grey = torch.full((1, 1, 1, 1), 0.9)
    data = ImageSet(torch.zeros(1, 1, 1, 1).byte(), torch.zeros(1).long(), torch.arange(1), ("a",))
    defense = Defense(Gap(lambda x: x**2 - 0.25), None)
    for steps, expected in ((1, 0.9), (2, 0.498843), (9, 0.498843)):
        _, outcome = run_bound(deepfool(classes=2, steps=steps), defense, data, grey)
        assert outcome.images.item() == pytest.approx(expected, abs=2e-6)
        assert outcome.iterations.item() == min(steps, 2)
    assert outcome.margin.item() == pytest.approx(0.498843**2 - 0.25, abs=5e-6)


def test_deepfool_keeps_a_bare_iterate_that_fools_where_the_stretched_one_does_not() -> None:
    """Only a band around 0.5 fools; its gap |u|^0.9 - 0.05^0.9 sends u = 0.4 to
    0.4 - (0.4 / 0.9) (1 - (0.05 / 0.4)^0.9) = 0.023954, inside; stretched by 1.5, u = -0.164.
    """
    light = torch.full((1, 1, 1, 1), 0.9)
    data = ImageSet(torch.zeros(1, 1, 1, 1).byte(), torch.zeros(1).long(), torch.arange(1), ("a",))
    band = Defense(Gap(lambda x: (x - 0.5).abs() ** 0.9 - 0.05**0.9), None)
    _, outcome = run_bound(deepfool(classes=2, overshoot=0.5, steps=5), band, data, light)
    assert outcome.images.item() == pytest.approx(0.523954, abs=1e-4)
    assert outcome.margin.item() < 0 and outcome.iterations.item() == 2


def test_fewer_classes_find_no_nearer_image() -> None:
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
def test_classes_that_are_not_there_are_refused_with_a_sentence(classes: int) -> None:
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
    assert restored.float().mean() > 0.9, "a tenth of the way back is on the true side again"
    wide = CwL2(
        kind="cw_l2", c=1.0, searches=5, steps=60, learning_rate=0.05, confidence=0.0, eot=1
    )
    least = craft(wide, defense, "full", data, BALL, 0, 100)
    ratio = BALL.distance(crafted.images, data.pixels()) / BALL.distance(
        least.images, data.pixels()
    )
    assert ratio[moved & least.success].median() < 1.05


def test_more_steps_of_deepfool_change_nothing_that_was_found(
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
    assert torch.equal(ladder[0].images[lost], data.pixels()[lost]), "clean where none was found"


# The elastic net where the answer is known


def test_shrinkage_by_hand() -> None:
    z = torch.tensor([0.50, 0.55, 0.45, 0.70, 0.30, 1.40, -0.30, 0.60])
    origin = torch.tensor([0.50, 0.50, 0.50, 0.50, 0.50, 0.50, 0.50, 0.50])
    shrunk = shrink(z, origin, 0.1)
    assert shrunk.tolist() == pytest.approx([0.5, 0.5, 0.5, 0.6, 0.4, 1.0, 0.0, 0.5], abs=1e-6)
    assert (shrunk[:3] == origin[:3]).all(), "exactly back, or no result would be sparse"
    assert torch.equal(shrink(z, origin, 0.0), z.clamp(0, 1))
    black, white = torch.tensor([0.0, -0.3]), torch.tensor([1.0, 1.25])
    assert shrink(black, torch.zeros(2), 0.1).tolist() == [0, 0]
    assert shrink(white, torch.ones(2), 0.1).tolist() == [1, 1]


def test_the_first_steps_of_the_elastic_net_by_hand() -> None:
    """Two pixels (0.5, 0.5), gap 2 x1 + 0.1 x2 - 0.8 > 0, c = 0.5, rate 0.2 sqrt(1 - k/2), beta
    0.05. Step 1: z = (0.3, 0.49), x = (0.35, 0.5): gap -0.05, fooled, L1 0.15. No momentum yet.
    Step 2: the hinge is 0 there, so z = y - 0.141421 * 2 (y - x0) = (0.392426, 0.5) and
    x = (0.442426, 0.5): gap 0.134853, not fooled. The first is what is returned. The second search
    starts anew, with c = 0.25: x = (0.45, 0.5), then z = 0.45 - 0.141421 (0.5 - 0.1) for the first
    pixel, x = (0.443431, 0.5), and none of them fools.
    """
    weight = torch.tensor([[2.0, 0.1], [0.0, 0.0]])
    model = Linear(weight, torch.tensor([-0.8, 0.0]))
    data = ImageSet(
        torch.zeros(1, 1, 1, 2).byte(), torch.zeros(1).long(), torch.arange(1), ("a", "b")
    )
    seen: list[Tensor] = []

    class Listening(Purifier):
        def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
            seen.append(x.detach().clone())
            return x

    attack = elastic_net(beta=0.05, c=0.5, searches=2, steps=2, learning_rate=0.2, eot=1)
    grey = torch.full((1, 1, 1, 2), 0.5)
    _, outcome = run_bound(attack, Defense(model, Listening()), data, grey)
    path = [(0.5, 0.5), (0.5, 0.5), (0.35, 0.5), (0.35, 0.5), (0.442426, 0.5)]
    path += [(0.5, 0.5), (0.45, 0.5), (0.45, 0.5), (0.443431, 0.5)]
    assert [x.flatten().tolist() for x in seen] == [pytest.approx(p, abs=1e-5) for p in path]
    assert outcome.images.flatten().tolist() == pytest.approx([0.35, 0.5], abs=1e-6)
    assert outcome.margin.item() == pytest.approx(-0.05, abs=1e-6)


def test_momentum_is_that_of_the_paper() -> None:
    """A gap of slope 1 that is never closed: with c = 1, beta = 0 and y the point of step k, x =
    y - rate (2 (y - x0) + 1), and the next y is x + k/(k+3) (x - previous x).
    """
    model = Linear(torch.tensor([[1.0], [0.0]]), torch.tensor([5.0, 0.0]))
    one = torch.ones(1, 1, 1, 1)
    data = ImageSet(one.byte(), torch.zeros(1).long(), torch.arange(1), ("a", "b"))
    seen: list[float] = []

    class Listening(Purifier):
        def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
            seen.append(x.item())
            return x

    attack = elastic_net(beta=0.0, c=1.0, searches=1, steps=5, learning_rate=0.1, eot=1)
    run_bound(attack, Defense(model, Listening()), data, 0.9 * one)
    x = y = 0.9
    expected = [0.9]
    for k in range(5):
        expected.append(y)
        before, x = x, y - 0.1 * (1 - k / 5) ** 0.5 * (2 * (y - 0.9) + 1)
        y = x + k / (k + 3) * (x - before)
        expected.append(x)
    assert seen == pytest.approx(expected, abs=1e-5)


def test_on_a_linear_model_the_l1_rule_comes_near_the_least_there_is() -> None:
    """The least L1 moves one pixel alone: the gap over the largest difference of weights."""
    model, data = linear_task(3, 100)
    exact = distances(model, data, torch.inf).clamp_min(0)
    defense = Defense(model, None).freeze()
    attack = elastic_net(beta=0.02, c=1.0, searches=6, steps=60, learning_rate=0.02)
    crafted = craft(attack, defense, "full", data, BALL, 0, 100)
    assert crafted.success.all()
    found = taxi(crafted.images, data)
    reach = (exact < 90 / 255) & (exact > 0)  # one pixel has not more room
    assert reach.sum() > 30
    assert (found >= exact - 1e-5)[reach].all(), "nearer than there is anything"
    assert (found / exact)[reach].median() < 1.2
    assert (found[exact == 0] == 0).all()


def test_the_l1_rule_moves_fewer_pixels_than_carlini_and_wagner() -> None:
    model, data = linear_task(3, 100)
    defense, right = Defense(model, None).freeze(), distances(model, data, 2) > 0
    sparse = craft(elastic_net(searches=5, steps=60), defense, "full", data, BALL, 0, 100)
    cw = CwL2(kind="cw_l2", c=1.0, searches=5, steps=60, learning_rate=0.02, confidence=0.0, eot=1)
    dense = craft(cw, defense, "full", data, BALL, 0, 100)
    assert sparse.success.all() and dense.success.all()
    moved = [
        ((crafted.images - data.pixels()).abs() > 1e-4).flatten(1).sum(1)[right].double().mean()
        for crafted in (sparse, dense)
    ]
    assert moved[0] < 6 and moved[1] > 25, moved
    assert (taxi(sparse.images, data) < taxi(dense.images, data))[right].all()
    lengths = [BALL.distance(crafted.images, data.pixels()) for crafted in (sparse, dense)]
    assert lengths[0][right].median() > 1.3 * lengths[1][right].median()


def test_each_rule_keeps_the_best_by_its_own_measure(
    classifier: Classifier, test_set: ImageSet
) -> None:
    """The iterates are the same under both rules; only what is kept of them differs."""
    data, defense = head(test_set, 40), Defense(classifier, None).freeze()
    first = {
        rule: craft(elastic_net(rule=rule, beta=0.02, steps=30), defense, "full", data, BALL, 0, 40)
        for rule in ("l1", "en")
    }
    assert torch.equal(first["l1"].success, first["en"].success)
    assert first["l1"].success.float().mean() > 0.9
    apart = (first["l1"].images != first["en"].images).flatten(1).any(1)
    assert apart.any()
    ways = {rule: taxi(crafted.images, data) for rule, crafted in first.items()}
    nets = {
        rule: 0.02 * ways[rule] + BALL.distance(crafted.images, data.pixels()) ** 2
        for rule, crafted in first.items()
    }
    assert (ways["l1"] < ways["en"])[apart].all()
    assert (nets["en"] < nets["l1"])[apart].all()


def test_the_weight_is_bisected_for_each_image_by_itself() -> None:
    """Images that fall from c = 0.3 and from c = 5 on: ten times c until then, the middle after."""
    seen: list[list[float]] = []

    class Scripted(ElasticNet):
        def fista(
            self, target: Target, labels: Tensor, c: Tensor, query: int, found: Any
        ) -> Tensor:
            assert query == 1 + 2 * self.steps * len(seen)
            seen.append(c.tolist())
            return c >= torch.tensor([0.3, 5.0])

    model, data = linear_task(3, 60)
    right = data[distances(model, data, 2) > 0][torch.arange(2)]
    attack = Scripted(**elastic_net(c=1.0, searches=5).model_dump())
    run_bound(attack, Defense(model, None), right)
    assert [a for a, _ in seen] == [1, 0.5, 0.25, 0.375, 0.3125]
    assert [b for _, b in seen] == [1, 10, 5.5, 3.25, 4.375]


def test_more_searches_never_keep_a_farther_image(
    classifier: Classifier, test_set: ImageSet
) -> None:
    data, defense = head(test_set, 40), Defense(classifier, None).freeze()
    ladder = [
        craft(elastic_net(c=0.1, searches=n), defense, "full", data, BALL, 0, 40)
        for n in (1, 2, 3, 5)
    ]
    for weak, strong in pairwise(ladder):
        assert strong.success[weak.success].all()
        assert (taxi(strong.images, data) <= taxi(weak.images, data) + 1e-9)[weak.success].all()
    assert ladder[0].success.sum() < 30 < ladder[-1].success.sum()


def test_a_small_budget_does_not_give_the_clean_images_back(
    classifier: Classifier, test_set: ImageSet
) -> None:
    """40 steps and 3 values of c, as where torchattacks silently returned what it was given."""
    data, defense = head(test_set, 40), Defense(classifier, None).freeze()
    clean = data.pixels().clone()
    crafted = craft(elastic_net(c=0.1, searches=3, steps=40), defense, "full", data, BALL, 0, 40)
    assert crafted.success.float().mean() > 0.9
    right = classifier(clean).argmax(1) == data.labels
    assert torch.equal((crafted.images != clean).flatten(1).any(1), right & crafted.success)


def test_confidence_goes_further_and_keeps_it(classifier: Classifier, test_set: ImageSet) -> None:
    data, defense = head(test_set, 40), Defense(classifier, None).freeze()
    right = classifier(data.pixels()).argmax(1) == data.labels
    ways = []
    for confidence in (0.0, 2.0):
        attack = elastic_net(confidence=confidence, steps=40, searches=3)
        crafted = craft(attack, defense, "full", data, BALL, 0, 40)
        assert crafted.success.float().mean() > 0.9
        margins = margin(classifier(crafted.images), data.labels)
        assert (margins[right & crafted.success] <= -confidence + 1e-3).all()
        ways.append(taxi(crafted.images, data))
    assert ways[1].mean() > 1.1 * ways[0].mean()


# Planted: the margin that masks by zero, which is wrong where logits are negative


def masked(logits: Tensor, labels: Tensor) -> Tensor:
    """The margin as torchattacks takes it: products with a mask instead of a choice."""
    mask = torch.nn.functional.one_hot(labels, logits.shape[1])
    return (mask * logits).amax(1) - ((1 - mask) * logits).amax(1)


@pytest.mark.parametrize("planted", [False, True], ids=["ours", "planted fault"])
def test_a_constant_added_to_all_logits_changes_nothing(
    planted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if planted:
        monkeypatch.setattr("components.attacks.distance.elastic_net.margin", masked)
    model, data = linear_task(4, 40)
    shifted = Linear(model.weight, model.bias - 8)
    one, other = (
        craft(elastic_net(searches=3), Defense(m, None).freeze(), "full", data, BALL, 0, 40)
        for m in (model, shifted)
    )
    same = torch.allclose(one.images, other.images, atol=1e-4)
    assert same != planted
    assert planted or (one.success.all() and other.success.all())


# What holds for both


@BOTH
@STOCHASTIC
def test_an_image_is_attacked_on_its_own(
    name: str, stochastic: bool, classifier: Classifier, test_set: ImageSet
) -> None:
    defense = Defense(Precise(classifier), Noisy() if stochastic else None).freeze()
    data, attack = head(test_set, 8), nearest_attack(name, steps=8)
    whole = craft(attack, defense, "full", data, LINF, 0, 8)
    assert not torch.equal(whole.images, data.pixels())
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    for batch in (8, 3, 1):
        shuffled = craft(attack, defense, "full", data[order], LINF, 0, batch)
        assert torch.allclose(shuffled.images, whole.images[order], rtol=0, atol=1e-5)
        for column in ("success", "iterations", "forward", "backward"):
            assert torch.equal(getattr(shuffled, column), getattr(whole, column)[order]), column


@BOTH
def test_no_batch_is_no_work(name: str) -> None:
    model, data = linear_task(10, 5)
    target, outcome = run_bound(nearest_attack(name), Defense(model, None), data[torch.arange(0)])
    assert outcome.images.shape == (0, 1, 6, 6)
    assert len(outcome.margin) == len(outcome.iterations) == len(target.passes.forward) == 0


@BOTH
def test_what_is_wrong_already_is_left_alone_and_costs_nothing(
    name: str, classifier: Classifier, test_set: ImageSet
) -> None:
    data = head(test_set, 12)
    right = classifier(data.pixels()).argmax(1)
    labels = torch.where(torch.arange(12) % 2 == 0, right, (right + 1) % 10)
    mixed = ImageSet(data.images, labels, data.ids, data.class_names)
    crafted = craft(
        nearest_attack(name), Defense(classifier, None).freeze(), "full", mixed, LINF, 0, 12
    )
    wrong = right != labels
    assert crafted.success[wrong].all()
    assert torch.equal(crafted.images[wrong], data.pixels()[wrong])
    assert not crafted.backward[wrong].any() and not crafted.iterations[wrong].any()
    assert crafted.backward[~wrong].all() and crafted.iterations[~wrong].all()


@BOTH
def test_random_answers_settle_nothing_at_the_first_look(
    name: str, classifier: Classifier, test_set: ImageSet
) -> None:
    """Not even where they are wrong: all images get the same attention."""
    data, defense = head(test_set, 20), Defense(classifier, Noisy()).freeze()
    labels = torch.where(torch.arange(20) < 10, data.labels, (data.labels + 1) % 10)
    data = ImageSet(data.images, labels, data.ids, data.class_names)
    crafted = craft(nearest_attack(name, eot=3), defense, "full", data, LINF, 0, 20)
    assert crafted.success.sum() >= 10
    if name == "deepfool":
        # In the end five images are asked again, under 16 draws.
        steps, forward, backward = 20, 3 * (1 + 2 * 20) + 1 + 5 * 16, 3 * 9 * 20
    else:
        steps, forward, backward = 30, 3 * (1 + 2 * 30), 3 * 30
    assert crafted.iterations.tolist() == [steps] * 20
    assert (crafted.backward == backward).all()
    assert (crafted.forward == forward).all()


def test_deepfool_is_not_content_with_one_lucky_draw(
    classifier: Classifier, test_set: ImageSet
) -> None:
    """Under noise it was not chosen by, the image still fools in most draws."""
    data, defense = head(test_set, 40), Defense(classifier, Noisy()).freeze()
    shares = []
    for steps in (1, 20):
        crafted = craft(deepfool(steps=steps, eot=4), defense, "full", data, LINF, 0, 40)
        draws = Draws(0, "score", data.ids)
        shares.append(
            torch.stack([
                defense(crafted.images, draws.redraw(k)).argmax(1) != data.labels for k in range(16)
            ]).float().mean()
        )  # fmt: skip
    assert shares[1] > 0.6 and shares[1] > shares[0] + 0.1, shares


@BOTH
@pytest.mark.parametrize("where", ["everywhere", "off the image", "gradient"])
def test_what_is_not_a_number_stops_nothing(name: str, where: str) -> None:
    """Logits that are no numbers fool, at the image or at the first step off it; a gradient that
    is none leads nowhere, and above all never into the image returned.
    """
    model, data = linear_task(10, 12)
    right = ImageSet(data.images, model(data.pixels()).argmax(1), data.ids, data.class_names)
    clean = right.pixels()

    class Broken(Linear):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            if where == "gradient":
                return logits + 0 * (x - x.detach()).flatten(1).abs().sum(1, keepdim=True).sqrt()
            at_home = (x == clean[: len(x)]).flatten(1).all(1, keepdim=True)
            return logits.where(at_home & (where != "everywhere"), torch.nan)

    defense = Defense(Broken(model.weight, model.bias), None)
    for stochastic in (False, True):
        defense.purifier = Noisy() if stochastic and where != "off the image" else None
        _, outcome = run_bound(nearest_attack(name, steps=4), defense, right)
        assert outcome.images.isfinite().all()
        if where == "gradient":
            assert torch.equal(outcome.images, clean)
        else:
            assert (outcome.margin == -torch.inf).all()
        if where == "off the image":
            assert (outcome.images != clean).flatten(1).any(1).all()


@BOTH
def test_a_gradient_that_is_none_in_one_pixel_leaves_the_others(name: str) -> None:
    class Cracked(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0 * (x - x.detach()).flatten(1)[:, :1].abs().sqrt()

    model, data = linear_task(10, 12)
    right = ImageSet(data.images, model(data.pixels()).argmax(1), data.ids, data.class_names)
    _, outcome = run_bound(
        nearest_attack(name), Defense(Cracked(model.weight, model.bias), None), right
    )
    assert (outcome.margin <= 0).all() and outcome.images.isfinite().all()
    assert torch.equal(outcome.images[:, :, 0, 0], right.pixels()[:, :, 0, 0])


@BOTH
@STOCHASTIC
def test_a_model_without_a_gradient_gives_the_clean_images_back(
    name: str, stochastic: bool
) -> None:
    class Deaf(Noisy):
        def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
            return super().purify(x, draws).detach()

    model, data = linear_task(10, 12)
    right = ImageSet(data.images, model(data.pixels()).argmax(1), data.ids, data.class_names)
    sure = Linear(model.weight, model.bias + 0)
    sure.weight.data /= 100
    sure.bias.data = 9 * torch.eye(10)[0]
    home = ImageSet(right.images, torch.zeros(12).long(), right.ids, right.class_names)
    defense = Defense(sure, Deaf() if stochastic else Detached(1.0))
    _, outcome = run_bound(nearest_attack(name), defense, home)
    assert torch.equal(outcome.images, home.pixels())
    assert (outcome.margin > 0).all()


@BOTH
@pytest.mark.parametrize("threat", [LINF, BALL], ids=["linf", "l2"])
def test_bpda_gets_past_rounding_that_leaves_no_gradient(
    name: str, threat: Linf | L2, classifier: Classifier, test_set: ImageSet
) -> None:
    data, defense = head(test_set, 40), Defense(classifier, Rounded()).freeze()
    full, bpda = (
        int(craft(nearest_attack(name), defense, mode, data, threat, 0, 40).success.sum())
        for mode in ("full", "bpda")
    )
    assert bpda > full + 20


@BOTH
def test_images_in_any_layout_give_the_same(name: str) -> None:
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 16, 10),
    )  # fmt: skip
    images = torch.randint(256, (10, 3, 8, 8), dtype=torch.uint8)
    labels = net(images / 255).argmax(1)
    data = ImageSet(images, labels, torch.arange(10), tuple("0123456789"))
    defense = Defense(net, None)
    attack = deepfool() if name == "deepfool" else elastic_net(c=30.0)
    _, plain = run_bound(attack, defense, data)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for strange in (
        data.pixels().to(memory_format=torch.channels_last),
        data.pixels().transpose(2, 3).contiguous().transpose(2, 3),
    ):
        _, outcome = run_bound(attack, defense, data, strange)
        assert torch.allclose(outcome.images, plain.images, atol=1e-5)
    assert (plain.margin <= 0).all()
    crafted = craft(attack, defense, "full", data, LINF, 0, 10)
    assert torch.allclose(crafted.images, plain.images, atol=1e-5)
    assert crafted.images.min() >= 0 and crafted.images.max() <= 1


@BOTH
def test_no_two_looks_share_their_noise_and_no_global_stream_is_touched(
    name: str, classifier: Classifier, test_set: ImageSet
) -> None:
    seen: list[int] = []

    class Listening(Noisy):
        def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
            assert draws is not None and draws.role == "attack"
            assert x.min() >= 0 and x.max() <= 1
            seen.append(draws.draw)
            return super().purify(x, draws)

    data, state = head(test_set, 6), torch.get_rng_state()
    pixels = data.images.clone()
    run_bound(nearest_attack(name), Defense(classifier, Listening()), data)
    # Five images beside each other at the end of a search are asked under the same noise.
    later = [draw for draw, _ in groupby(seen) if draw]
    assert len(later) == len(set(later)) == max(seen)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(data.images, pixels)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("deepfool", {"steps": 0}),
        ("deepfool", {"overshoot": -0.1}),
        ("deepfool", {"classes": 1}),
        ("deepfool", {"alpha": 1.0}),
        ("elastic_net", {"rule": "l2"}),
        ("elastic_net", {"beta": -0.1}),
        ("elastic_net", {"c": 0.0}),
        ("elastic_net", {"searches": 0}),
        ("elastic_net", {"learning_rate": 0.0}),
        ("elastic_net", {"confidence": -1.0}),
    ],
)
def test_settings_that_make_no_attack_are_refused(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        nearest_attack(name, **changes)


def test_both_say_that_they_have_no_ball() -> None:
    assert not deepfool().bounded and not elastic_net().bounded
