"""CW finds the nearest fooling image in L2."""

import pytest
from toys import (
    BALL,
    distances,
    head,
    linear_task,
    parse_attack,
    true_margins,
)

from components.attacks import (
    craft,
)
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.defense import Defense


def test_cw_finds_the_nearest_point_across_a_linear_boundary() -> None:
    model, data = linear_task(4, 200)
    exact = distances(model, data, 2).clamp_min(0)
    attack = parse_attack("cw_l2", c=0.1, steps=100, searches=8, learning_rate=0.01)
    crafted = craft(attack, Defense(model, None).freeze(), "full", data, BALL, 0, 200)
    found = BALL.distance(crafted.images, data.pixels())
    assert crafted.success.all()
    assert (found >= exact - 1e-5).all(), "nearer than the exact distance"
    assert found.mean() == pytest.approx(exact.mean().item(), rel=0.02)
    assert (found[exact == 0] == 0).all()


def test_confidence_moves_images_further_across_the_boundary(
    classifier: Classifier, test_set: ImageSet
) -> None:
    data, defense = head(test_set, 40), Defense(classifier, None).freeze()
    far = []
    for confidence in (0.0, 2.0):
        attack = parse_attack("cw_l2", confidence=confidence, steps=40, searches=3)
        crafted = craft(attack, defense, "full", data, BALL, 0, 40)
        clean = classifier(data.pixels()).argmax(1) == data.labels
        assert crafted.success.float().mean() > 0.95
        far.append(BALL.distance(crafted.images, data.pixels())[clean])
        margins = true_margins(defense, crafted)
        assert (margins[clean & crafted.success] <= -confidence + 1e-3).all()
    assert far[1].mean() > far[0].mean() + 0.05
