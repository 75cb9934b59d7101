"""The detector-aware attack fools the classifier and lowers the detector score."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from components.attacks import Linf, craft
from components.attacks.detector_aware import DetectorAware
from components.attacks.gradient import Pgd
from components.data.draws import Draws, NoiseStream
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.defense import Defense, bind
from components.models.purifiers.contract import Purifier

LINF = Linf(norm="linf", eps_255=51.0)


class FirstRow(Purifier):
    """The identity, with a detector score that is the sum of squares of the first row."""

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        return x

    def compute_detector_score(
        self, x: Tensor, stream: NoiseStream | None, purified: Tensor | None
    ) -> Tensor:
        return x[:, 0, 0].square().sum(1)


def attack(**changes: Any) -> DetectorAware:
    section: dict[str, Any] = {
        "kind": "detector_aware", "sees": "defense", "weights": [0.0, 100.0], "steps": 20,
        "step": 0.1, "eot": 1,
    }  # fmt: skip
    return DetectorAware.model_validate({**section, **changes})


def test_it_fools_as_many_images_with_a_lower_detector_score(
    classifier: Classifier, test_set: ImageSet
) -> None:
    data = test_set[torch.arange(64)]
    defense = Defense(classifier, FirstRow()).freeze()
    pgd = Pgd(kind="pgd", steps=20, step=0.1, restarts=1, random_start=False, early_stop=False,
              eot=1)  # fmt: skip
    blind = craft(pgd, defense, "full", data, LINF, 0, 64)
    aware = craft(attack(), defense, "full", data, LINF, 0, 64)
    assert aware.success.sum() >= blind.success.sum() - 1
    purifier = FirstRow()
    scores = purifier.detector_score(blind.images), purifier.detector_score(aware.images)
    # About as low as the radius allows for the first row.
    assert scores[1].mean() < 0.65 * scores[0].mean() and (scores[1] <= scores[0] + 1e-6).all()
    assert (aware.backward == 40).all() and (aware.forward > 80).all()


def test_weight_zero_is_plain_pgd(classifier: Classifier, test_set: ImageSet) -> None:
    data = test_set[torch.arange(32)]
    pgd = Pgd(kind="pgd", steps=20, step=0.1, restarts=1, random_start=False, early_stop=False,
              eot=1)  # fmt: skip
    for purifier in (None, FirstRow()):
        defense = Defense(classifier, purifier).freeze()
        mine = craft(attack(weights=[0.0]), defense, "full", data, LINF, 0, 32).images
        theirs = craft(pgd, defense, "full", data, LINF, 0, 32).images
        assert torch.equal(mine, theirs)


def test_the_step_lowers_the_detector_score() -> None:
    """On one linear logit pair and one step, the first row follows the detector alone."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0]]))
    defense = Defense(network, FirstRow()).freeze()
    x = torch.full((1, 1, 2, 2), 0.5)
    target = bind(defense, "full", Draws(0, "attack", torch.tensor([0])), 1)
    labels = torch.tensor([1])
    found = attack(weights=[100.0], steps=1, step=1.0).run(target, x, labels, LINF, target.draws)
    assert (found.images[0, 0, 0] < 0.5).all(), "the detector score did not fall"
    assert (found.images[0, 0, 1] > 0.5).all(), "the logit of class 0 did not rise"


def test_the_gradient_goes_through_the_purifier_only_if_it_sees_the_defense() -> None:
    class Inverted(FirstRow):
        def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
            return 1 - x

    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0]]))
    defense, x = Defense(network, Inverted()).freeze(), torch.full((1, 1, 2, 2), 0.5)
    found = {}
    for sees in ("classifier", "defense"):
        target = bind(defense, "full", Draws(0, "attack", torch.tensor([0])), 1)
        one = attack(weights=[0.0], steps=1, step=1.0, sees=sees)
        found[sees] = one.run(target, x, torch.tensor([0]), LINF, target.draws).images
    # The first goes in the wrong direction, where it finds nothing better than the clean image.
    assert torch.equal(found["classifier"], x) and (found["defense"] > 0.5).all()


@pytest.mark.parametrize("weights", [[], [-1.0]])
def test_weights_must_be_given_and_not_negative(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        attack(weights=weights)


def test_small_differences_of_the_detector_score_count(
    classifier: Classifier, test_set: ImageSet
) -> None:
    """The order of the weights does not matter, however small the detector scores are."""

    class Faint(FirstRow):
        def compute_detector_score(
            self, x: Tensor, stream: NoiseStream | None, purified: Tensor | None
        ) -> Tensor:
            return 1e-6 * super().compute_detector_score(x, stream, purified)

    data = test_set[torch.arange(48)]
    defense = Defense(classifier, Faint()).freeze()
    ascending, descending = (
        craft(attack(weights=weights), defense, "full", data, LINF, 0, 48)
        for weights in ([0.0, 1e8], [1e8, 0.0])
    )
    both = ascending.success & descending.success
    assert both.sum() > 20
    scores = [Faint().detector_score(found.images[both]) for found in (ascending, descending)]
    assert torch.allclose(scores[0], scores[1])
