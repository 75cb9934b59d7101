"""`craft` judges what an attack returns: images outside the threat raise, claims are ignored."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from toys import (
    BALL,
    LINF,
    head,
)

from components.attacks import (
    L2,
    Attack,
    Linf,
    craft,
    violations,
)
from components.attacks.contract import Outcome
from components.data.draws import Draws
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.defense import Defense, Target


class Cheat(Attack):
    """Returns what the function `images` makes of the images, and claims to have fooled."""

    kind: str = "cheat"
    images: Callable[[Tensor], Tensor]

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        return Outcome(self.images(images), torch.full((len(images),), -1.0), labels)


FAULTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "twice the radius": (lambda x: (x + 2 * LINF.eps).clamp(0, 1), "linf distance 0.25"),
    "one pixel of one image": (
        lambda x: x.index_put((torch.tensor(3), torch.tensor(0), torch.tensor(2), torch.tensor(2)),
                              (x[3, 0, 2, 2] + 0.2) % 1.0),
        "linf distance",
    ),
    "slightly": (lambda x: torch.where(x > 0.5, x - LINF.eps - 1e-4, x), "linf distance"),
    "below 0": (lambda x: x - 0.01, "outside"),
    "above 1": (lambda x: x + 0.01, "outside"),
    "not finite": (lambda x: x.where(x > 0, torch.nan), "not finite"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_images_outside_the_threat_raise(
    fault: str, classifier: Classifier, test_set: ImageSet
) -> None:
    images, message = FAULTS[fault]
    defense, data = Defense(classifier, None).freeze(), head(test_set, 8)
    with pytest.raises(AssertionError, match=f"Cheat left the threat: .*{message}"):
        craft(Cheat(images=images), defense, "full", data, LINF, 0, 8)


def test_success_is_measured_and_not_claimed(classifier: Classifier, test_set: ImageSet) -> None:
    """The attack claims margin -1 everywhere, but returns the clean images."""
    defense, data = Defense(classifier, None).freeze(), head(test_set, 50)
    crafted = craft(Cheat(images=lambda x: x), defense, "full", data, LINF, 0, 50)
    assert torch.equal(crafted.success, classifier(data.pixels()).argmax(1) != data.labels)


def test_violations_are_named_in_words() -> None:
    clean = torch.full((2, 1, 4, 4), 0.5)
    assert violations(clean + LINF.eps, clean, LINF) == []
    assert violations(clean + LINF.eps + 2e-6, clean, LINF) == [
        "linf distance 0.125492 above 0.125490"
    ]
    assert violations(clean.double(), clean, LINF) == ["stored as torch.float64, not float32"]
    assert violations(clean.half(), clean, LINF) == ["stored as torch.float16, not float32"]
    assert violations(clean + 0.7 / 4, clean, BALL) == []
    assert len(violations(clean + 0.71 / 4, clean, BALL)) == 1
    assert len(violations(clean + 3, clean, LINF)) == 2
