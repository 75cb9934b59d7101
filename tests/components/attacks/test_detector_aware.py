"""The attack that knows the detector: it fools, and it passes where blind attacks are caught."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from components.attacks import Linf, craft
from components.attacks.detector_aware import DetectorAware
from components.attacks.gradient import Pgd
from components.data.draws import Draws
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.defense import Defense, bind
from components.models.purifiers.contract import Purifier

LINF = Linf(norm="linf", eps_255=51.0)


class Watchful(Purifier):
    """Changes nothing, and finds an image odd by the square of what its first row adds up to."""

    def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
        return x

    def compute_detector_score(self, x: Tensor, draws: Draws | None, purified: Tensor | None) -> Tensor:
        return x[:, 0, 0].square().sum(1)


def attack(**changes: Any) -> DetectorAware:
    section: dict[str, Any] = {
        "kind": "detector_aware", "sees": "defense", "weights": [0.0, 100.0], "steps": 20,
        "step": 0.1, "eot": 1,
    }  # fmt: skip
    return DetectorAware.model_validate({**section, **changes})


def test_it_fools_as_many_and_looks_less_odd(classifier: Classifier, test_set: ImageSet) -> None:
    data = test_set[torch.arange(64)]
    defense = Defense(classifier, Watchful()).freeze()
    pgd = Pgd(kind="pgd", steps=20, step=0.1, restarts=1, random_start=False, early_stop=False,
              eot=1)  # fmt: skip
    blind = craft(pgd, defense, "full", data, LINF, 0, 64)
    aware = craft(attack(), defense, "full", data, LINF, 0, 64)
    assert aware.success.sum() >= blind.success.sum() - 1
    watchful = Watchful()
    odd = watchful.detector_score(blind.images), watchful.detector_score(aware.images)
    # As far down as the radius lets the first row go.
    assert odd[1].mean() < 0.65 * odd[0].mean() and (odd[1] <= odd[0] + 1e-6).all()
    assert (aware.backward == 40).all() and (aware.forward > 80).all()


def test_a_weight_of_nothing_is_plain_pgd(classifier: Classifier, test_set: ImageSet) -> None:
    data = test_set[torch.arange(32)]
    pgd = Pgd(kind="pgd", steps=20, step=0.1, restarts=1, random_start=False, early_stop=False,
              eot=1)  # fmt: skip
    for purifier in (None, Watchful()):
        defense = Defense(classifier, purifier).freeze()
        mine = craft(attack(weights=[0.0]), defense, "full", data, LINF, 0, 32).images
        theirs = craft(pgd, defense, "full", data, LINF, 0, 32).images
        assert torch.equal(mine, theirs)


def test_the_suspicion_enters_with_the_sign_that_lowers_it() -> None:
    """On one linear logit pair and one step, the first row follows the detector alone."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0]]))
    defense = Defense(network, Watchful()).freeze()
    x = torch.full((1, 1, 2, 2), 0.5)
    target = bind(defense, "full", Draws(0, "attack", torch.tensor([0])), 1)
    labels = torch.tensor([1])
    found = attack(weights=[100.0], steps=1, step=1.0).run(target, x, labels, LINF, target.draws)
    assert (found.images[0, 0, 0] < 0.5).all(), "less odd"
    assert (found.images[0, 0, 1] > 0.5).all(), "and less like class 1"


def test_what_it_sees_is_what_its_gradient_goes_through() -> None:
    class Flip(Watchful):
        def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
            return 1 - x

    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0]]))
    defense, x = Defense(network, Flip()).freeze(), torch.full((1, 1, 2, 2), 0.5)
    ends = {}
    for sees in ("classifier", "defense"):
        target = bind(defense, "full", Draws(0, "attack", torch.tensor([0])), 1)
        one = attack(weights=[0.0], steps=1, step=1.0, sees=sees)
        ends[sees] = one.run(target, x, torch.tensor([0]), LINF, target.draws).images
    # The first goes the wrong way, and what it found there is worse than the image itself.
    assert torch.equal(ends["classifier"], x) and (ends["defense"] > 0.5).all()


@pytest.mark.parametrize("weights", [[], [-1.0]])
def test_weights_are_there_and_not_negative(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        attack(weights=weights)


def test_small_differences_in_suspicion_count(classifier: Classifier, test_set: ImageSet) -> None:
    """The order of the weights is no matter, however small the numbers of the detector are."""

    class Faint(Watchful):
        def compute_detector_score(
            self, x: Tensor, draws: Draws | None, purified: Tensor | None
        ) -> Tensor:
            return 1e-6 * super().compute_detector_score(x, draws, purified)

    data = test_set[torch.arange(48)]
    defense = Defense(classifier, Faint()).freeze()
    there, back = (
        craft(attack(weights=weights), defense, "full", data, LINF, 0, 48)
        for weights in ([0.0, 1e8], [1e8, 0.0])
    )
    both = there.success & back.success
    assert both.sum() > 20
    odd = [Faint().detector_score(found.images[both]) for found in (there, back)]
    assert torch.allclose(odd[0], odd[1])
