"""The elastic-net attack: its steps by hand, its two rules, and the nearest images in L1."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_networks import Linear
from toys import BALL, distances, head, linear_task, run_on_target

from components.attacks import craft
from components.attacks.distance.cw import CwL2
from components.attacks.distance.elastic_net import ElasticNet, shrink
from components.data.draws import NoiseStream
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.defense import Defense, Target, margin
from components.models.purifiers import Purifier


def l1_distance(images: Tensor, data: ImageSet) -> Tensor:
    return (images.double() - data.pixels().double()).flatten(1).abs().sum(1)


def elastic_net(**changes: Any) -> ElasticNet:
    section: dict[str, Any] = {
        "rule": "l1", "beta": 0.01, "c": 1.0, "searches": 2, "steps": 15, "learning_rate": 0.02,
        "confidence": 0.0, "eot": 2,
    }  # fmt: skip
    return ElasticNet(kind="elastic_net", **{**section, **changes})


def test_shrink_by_hand() -> None:
    z = torch.tensor([0.50, 0.55, 0.45, 0.70, 0.30, 1.40, -0.30, 0.60])
    origin = torch.tensor([0.50, 0.50, 0.50, 0.50, 0.50, 0.50, 0.50, 0.50])
    shrunk = shrink(z, origin, 0.1)
    assert shrunk.tolist() == pytest.approx([0.5, 0.5, 0.5, 0.6, 0.4, 1.0, 0.0, 0.5], abs=1e-6)
    assert (shrunk[:3] == origin[:3]).all(), "not exactly back, so no result would be sparse"
    assert torch.equal(shrink(z, origin, 0.0), z.clamp(0, 1))
    black, white = torch.tensor([0.0, -0.3]), torch.tensor([1.0, 1.25])
    assert shrink(black, torch.zeros(2), 0.1).tolist() == [0, 0]
    assert shrink(white, torch.ones(2), 0.1).tolist() == [1, 1]


def test_the_first_steps_by_hand() -> None:
    """Two pixels (0.5, 0.5), gap 2 x1 + 0.1 x2 - 0.8 > 0, c = 0.5, rate 0.2 sqrt(1 - k/2), beta
    0.05. Step 1: z = (0.3, 0.49), x = (0.35, 0.5): gap -0.05, fooled, L1 0.15. No momentum yet.
    Step 2: the hinge is 0 there, so z = y - 0.141421 * 2 (y - x0) = (0.392426, 0.5) and
    x = (0.442426, 0.5): gap 0.134853, not fooled. The first is returned. The second search
    starts again, with c = 0.25: x = (0.45, 0.5), then z = 0.45 - 0.141421 (0.5 - 0.1) for the first
    pixel, x = (0.443431, 0.5), and none of them fools.
    """
    weight = torch.tensor([[2.0, 0.1], [0.0, 0.0]])
    model = Linear(weight, torch.tensor([-0.8, 0.0]))
    data = ImageSet(
        torch.zeros(1, 1, 1, 2).byte(), torch.zeros(1).long(), torch.arange(1), ("a", "b")
    )
    seen: list[Tensor] = []

    class Listening(Purifier):
        def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
            seen.append(x.detach().clone())
            return x

    attack = elastic_net(beta=0.05, c=0.5, searches=2, steps=2, learning_rate=0.2, eot=1)
    grey = torch.full((1, 1, 1, 2), 0.5)
    _, outcome = run_on_target(attack, Defense(model, Listening()), data, grey)
    path = [(0.5, 0.5), (0.5, 0.5), (0.35, 0.5), (0.35, 0.5), (0.442426, 0.5)]
    path += [(0.5, 0.5), (0.45, 0.5), (0.45, 0.5), (0.443431, 0.5)]
    assert [x.flatten().tolist() for x in seen] == [pytest.approx(p, abs=1e-5) for p in path]
    assert outcome.images.flatten().tolist() == pytest.approx([0.35, 0.5], abs=1e-6)
    assert outcome.margin.item() == pytest.approx(-0.05, abs=1e-6)


def test_momentum_is_the_one_of_the_paper() -> None:
    """A gap of gradient 1 that is never closed: with c = 1, beta = 0 and y the point of step k, x =
    y - rate (2 (y - x0) + 1), and the next y is x + k/(k+3) (x - previous x).
    """
    model = Linear(torch.tensor([[1.0], [0.0]]), torch.tensor([5.0, 0.0]))
    one = torch.ones(1, 1, 1, 1)
    data = ImageSet(one.byte(), torch.zeros(1).long(), torch.arange(1), ("a", "b"))
    seen: list[float] = []

    class Listening(Purifier):
        def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
            seen.append(x.item())
            return x

    attack = elastic_net(beta=0.0, c=1.0, searches=1, steps=5, learning_rate=0.1, eot=1)
    run_on_target(attack, Defense(model, Listening()), data, 0.9 * one)
    x = y = 0.9
    expected = [0.9]
    for k in range(5):
        expected.append(y)
        before, x = x, y - 0.1 * (1 - k / 5) ** 0.5 * (2 * (y - 0.9) + 1)
        y = x + k / (k + 3) * (x - before)
        expected.append(x)
    assert seen == pytest.approx(expected, abs=1e-5)


def test_the_l1_rule_comes_close_to_the_least_l1_distance_of_a_linear_model() -> None:
    """The least L1 distance changes a single pixel: the gap over the largest weight difference."""
    model, data = linear_task(3, 100)
    exact = distances(model, data, torch.inf).clamp_min(0)
    defense = Defense(model, None).freeze()
    attack = elastic_net(beta=0.02, c=1.0, searches=6, steps=60, learning_rate=0.02)
    crafted = craft(attack, defense, "full", data, BALL, 0, 100)
    assert crafted.success.all()
    found = l1_distance(crafted.images, data)
    reach = (exact < 90 / 255) & (exact > 0)  # within the range of a single pixel
    assert reach.sum() > 30
    assert (found >= exact - 1e-5)[reach].all(), "nearer than the exact distance"
    assert (found / exact)[reach].median() < 1.2
    assert (found[exact == 0] == 0).all()


def test_the_l1_rule_changes_fewer_pixels_than_cw() -> None:
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
    assert (l1_distance(sparse.images, data) < l1_distance(dense.images, data))[right].all()
    lengths = [BALL.distance(crafted.images, data.pixels()) for crafted in (sparse, dense)]
    assert lengths[0][right].median() > 1.3 * lengths[1][right].median()


def test_each_rule_keeps_the_best_by_its_own_measure(
    classifier: Classifier, test_set: ImageSet
) -> None:
    """The iterates are the same under both rules; the rules keep different ones."""
    data, defense = head(test_set, 40), Defense(classifier, None).freeze()
    first = {
        rule: craft(elastic_net(rule=rule, beta=0.02, steps=30), defense, "full", data, BALL, 0, 40)
        for rule in ("l1", "en")
    }
    assert torch.equal(first["l1"].success, first["en"].success)
    assert first["l1"].success.float().mean() > 0.9
    differ = (first["l1"].images != first["en"].images).flatten(1).any(1)
    assert differ.any()
    l1 = {rule: l1_distance(crafted.images, data) for rule, crafted in first.items()}
    elastic = {
        rule: 0.02 * l1[rule] + BALL.distance(crafted.images, data.pixels()) ** 2
        for rule, crafted in first.items()
    }
    assert (l1["l1"] < l1["en"])[differ].all()
    assert (elastic["en"] < elastic["l1"])[differ].all()


def test_c_is_bisected_for_each_image_separately() -> None:
    """Images fooled from c = 0.3 and c = 5 on: c is multiplied by ten until then, then bisected."""
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
    run_on_target(attack, Defense(model, None), right)
    assert [a for a, _ in seen] == [1, 0.5, 0.25, 0.375, 0.3125]
    assert [b for _, b in seen] == [1, 10, 5.5, 3.25, 4.375]


def test_more_searches_never_give_a_farther_image(
    classifier: Classifier, test_set: ImageSet
) -> None:
    data, defense = head(test_set, 40), Defense(classifier, None).freeze()
    ladder = [
        craft(elastic_net(c=0.1, searches=n), defense, "full", data, BALL, 0, 40)
        for n in (1, 2, 3, 5)
    ]
    for weak, strong in pairwise(ladder):
        assert strong.success[weak.success].all()
        assert (l1_distance(strong.images, data) <= l1_distance(weak.images, data) + 1e-9)[
            weak.success
        ].all()
    assert ladder[0].success.sum() < 30 < ladder[-1].success.sum()


def test_a_small_budget_does_not_return_the_clean_images(
    classifier: Classifier, test_set: ImageSet
) -> None:
    """40 steps and 3 values of c, with which torchattacks returned its input without a warning."""
    data, defense = head(test_set, 40), Defense(classifier, None).freeze()
    clean = data.pixels().clone()
    crafted = craft(elastic_net(c=0.1, searches=3, steps=40), defense, "full", data, BALL, 0, 40)
    assert crafted.success.float().mean() > 0.9
    right = classifier(clean).argmax(1) == data.labels
    assert torch.equal((crafted.images != clean).flatten(1).any(1), right & crafted.success)


def test_confidence_moves_images_further_and_is_reached(
    classifier: Classifier, test_set: ImageSet
) -> None:
    data, defense = head(test_set, 40), Defense(classifier, None).freeze()
    right = classifier(data.pixels()).argmax(1) == data.labels
    lengths = []
    for confidence in (0.0, 2.0):
        attack = elastic_net(confidence=confidence, steps=40, searches=3)
        crafted = craft(attack, defense, "full", data, BALL, 0, 40)
        assert crafted.success.float().mean() > 0.9
        margins = margin(classifier(crafted.images), data.labels)
        assert (margins[right & crafted.success] <= -confidence + 1e-3).all()
        lengths.append(l1_distance(crafted.images, data))
    assert lengths[1].mean() > 1.1 * lengths[0].mean()


# Planted fault: the margin that multiplies by a mask, which is wrong for negative logits


def masked(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the margin as torchattacks does: by products with a mask, without a selection."""
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
