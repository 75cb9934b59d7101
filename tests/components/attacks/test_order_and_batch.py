"""An adversarial set is the same bytes in any order, and the same flags in any batch."""

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from components.attacks import AttackConfig, Crafted, Linf, craft
from components.data.draws import Draws
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.defense import Defense, margin
from components.models.purifiers.controls import GaussianNoise

THREAT = Linf(norm="linf", eps_255=25.5)
ATTACKS: dict[str, dict[str, Any]] = {
    "pgd": {"steps": 10, "step": 0.25, "restarts": 2, "random_start": True, "early_stop": True,
            "eot": 2},
    "a3": {},
    "apgd_ce": {"steps": 20, "restarts": 1, "eot": 2},
    "apgd_t": {"steps": 10, "targets": 3, "eot": 1},
    "fab_t": {"steps": 10, "targets": 3, "restarts": 1},
    "square": {"queries": 60, "eot": 1},
    "deepfool": {"steps": 10, "overshoot": 0.02, "classes": 10, "eot": 1},
    "elastic_net": {"rule": "l1", "beta": 0.01, "c": 1, "searches": 2, "steps": 10,
                    "learning_rate": 0.05, "confidence": 0, "eot": 1},
}  # fmt: skip
STOCHASTIC = ("pgd", "apgd_ce", "square")
# They rank the images of a batch, which is a part of the images that no machine changes.
RANKING = ("a3",)
EDGE = 1e-4


@pytest.fixture
def defense(classifier: Classifier) -> Defense:
    return Defense(classifier, None).freeze()


@pytest.fixture
def noisy(classifier: Classifier, test_set: ImageSet) -> Defense:
    noise = GaussianNoise(kind="gaussian_noise", sigma=0.05).build(test_set.shape)
    return Defense(classifier, noise).freeze()


def crafted(kind: str, defense: Defense, data: ImageSet, batch: int) -> Crafted:
    attack = TypeAdapter(AttackConfig).validate_python({"kind": kind, **ATTACKS[kind]})
    return craft(attack, defense, "full", data, THREAT, 0, batch)


def off_the_boundary(defense: Defense, found: Crafted) -> torch.Tensor:
    """Return which images (N,) are not on the decision boundary, where rounding decides."""
    with torch.no_grad():
        logits = defense(found.images, Draws(0, "attack", found.ids))
    return margin(logits, found.labels).abs() > EDGE


@pytest.mark.parametrize("kind", ATTACKS)
def test_the_order_of_images_changes_no_byte(
    kind: str, defense: Defense, noisy: Defense, test_set: ImageSet
) -> None:
    data = test_set[torch.arange(64)]
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    for one in (defense, noisy) if kind in STOCHASTIC else (defense,):
        straight, mixed = (crafted(kind, one, some, 64) for some in (data, data[order]))
        assert torch.equal(straight.images[order], mixed.images)
        assert torch.equal(straight.success[order], mixed.success)


@pytest.mark.parametrize("kind", [kind for kind in ATTACKS if kind not in RANKING])
@pytest.mark.parametrize("batch", [1, 7])
def test_the_batch_size_changes_no_flag_off_the_boundary(
    kind: str, batch: int, defense: Defense, noisy: Defense, test_set: ImageSet
) -> None:
    data = test_set[torch.arange(21)]
    for one in (defense, noisy) if kind in STOCHASTIC else (defense,):
        large, small = (crafted(kind, one, data, size) for size in (64, batch))
        off = off_the_boundary(one, large) & off_the_boundary(one, small)
        # DeepFool and EAD end on the boundary by design: their images agree, not their flags.
        if kind in ("deepfool", "elastic_net"):
            assert (large.images - small.images).abs().max() < 0.02
        else:
            assert off.float().mean() > 0.9
        assert torch.equal(large.success[off], small.success[off])
