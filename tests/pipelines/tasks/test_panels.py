"""Panels show the stored images, and what the defense makes of them as it is scored."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from toy_networks import Shaken

from components.data.draws import Draws
from components.data.image_set import ImageSet
from components.models.accuracy import count_correct
from components.models.classifiers import Classifier
from components.models.defense import Defense
from components.models.purifiers.controls import GaussianNoise
from pipelines.tasks.panels import Panel, render

NOISE = GaussianNoise(kind="gaussian_noise", sigma=0.3)


def tiles(panel: Panel) -> dict[str, Tensor]:
    """Cut a panel's PNG into rows of pictures (S,H,W) in [0,1]."""
    png = base64.b64decode(panel.sprite.removeprefix("data:image/png;base64,"))
    whole = torch.from_numpy(np.array(Image.open(io.BytesIO(png)))).float() / 255
    grid = whole.unflatten(0, (len(panel.rows), -1)).unflatten(2, (len(panel.labels), -1))
    return dict(zip(panel.rows, grid.permute(0, 2, 1, 3), strict=True))


@pytest.fixture
def noisy(classifier: Classifier, test_set: ImageSet) -> Defense:
    return Defense(classifier, NOISE.build(test_set.shape)).freeze()


def test_purified_pictures_are_those_that_are_scored(noisy: Defense, test_set: ImageSet) -> None:
    few = test_set[torch.arange(4)]
    sets = {"full/a": few.pixels().flip(3), "full/b": few.pixels() * 0.8}
    panels = render(noisy, few, sets, 7, 3)
    assert list(panels) == list(sets)
    for name, x in sets.items():
        shown = tiles(panels[name])
        purified = noisy.purify(x, Draws(7, "score", few.ids))
        assert torch.allclose(shown["clean"], few.pixels()[:, 0], atol=0.003)
        assert torch.allclose(shown["adversarial"], x[:, 0], atol=0.003)
        assert torch.allclose(shown["purified"], purified[:, 0], atol=0.003)
        # Under the first draw of role `score` the defense answers as the captions say.
        counted = count_correct(noisy, x, few.labels, few.ids, 7, "score", 1, 4)
        assert [right for _, right in panels[name].rows["purified"]] == list(counted > 0)


def test_captions_of_a_random_classifier_are_answers_under_the_scored_noise(
    classifier: Classifier, test_set: ImageSet
) -> None:
    few, defense = test_set[torch.arange(8)], Defense(Shaken(classifier, 0.5), None).freeze()
    x = few.pixels().flip(3)
    state = torch.get_rng_state()
    (panel,) = render(defense, few, {"full/a": x}, 7, 8).values()
    assert torch.equal(torch.get_rng_state(), state)
    counted = count_correct(defense, x, few.labels, few.ids, 7, "score", 1, 8)
    assert [right for _, right in panel.rows["adversarial"]] == list(counted > 0)


def test_the_difference_is_amplified_and_labelled_with_the_factor(
    classifier: Classifier, test_set: ImageSet
) -> None:
    few = test_set[torch.arange(2)]
    moved = (few.pixels() + 0.12).clamp(0, 1)
    (panel,) = render(Defense(classifier, None), few, {"full/a": moved}, 0, 4).values()
    assert list(panel.rows) == ["clean", "adversarial", "|difference|, 8 times"]
    shown = tiles(panel)["|difference|, 8 times"]
    assert torch.allclose(shown, 8 * (moved - few.pixels())[:, 0], atol=0.03)
    length, right = panel.rows["|difference|, 8 times"][0]
    assert length == f"L2 {float((moved - few.pixels())[0].norm()):.2f}" and right is None


def test_captions_name_the_answer_and_its_confidence(
    classifier: Classifier, test_set: ImageSet
) -> None:
    few = test_set[torch.arange(5)]
    (panel,) = render(Defense(classifier, None), few, {"full/a": few.pixels()}, 0, 4).values()
    sure, answers = classifier(few.pixels()).softmax(1).max(1)
    expected = [
        (f"{few.class_names[a]} ({100 * s:.0f} %)", a == y)
        for a, s, y in zip(answers.tolist(), sure.tolist(), few.labels.tolist(), strict=True)
    ]
    assert panel.rows["clean"] == panel.rows["adversarial"] == expected


def test_there_are_no_panels_without_images(classifier: Classifier, test_set: ImageSet) -> None:
    none = test_set[torch.arange(0)]
    assert render(Defense(classifier, None), none, {"full/a": none.pixels()}, 0, 4) == {}
