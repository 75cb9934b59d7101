"""APGD on its three losses: the losses by hand and its steps."""

import pytest
import torch
from torch import Tensor, nn
from toy_networks import Linear
from toys import LINF, THREATS, distances, fooled, head, linear_task, parse_attack, resized

from components.attacks import (
    L2,
    Linf,
    craft,
)
from components.attacks.apgd import ApgdDlr, dlr, targeted_dlr
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.defense import Defense


def test_more_steps_of_apgd_fool_no_fewer_images(
    classifier: Classifier, test_set: ImageSet
) -> None:
    data, defense = head(test_set, 120), Defense(classifier, None).freeze()
    tight = Linf(norm="linf", eps_255=20.0)
    for name, changes in (("apgd_ce", {"restarts": 1}), ("apgd_t", {"targets": 2})):
        counts = [
            fooled(
                craft(
                    parse_attack(name, steps=steps, **changes), defense, "full", data, tight, 0, 120
                )
            )
            for steps in (5, 25, 100)
        ]
        assert counts[0] - 1 <= counts[1] <= counts[2] + 1 and 10 < counts[2] < 120


def test_targeted_apgd_tries_every_class_in_turn() -> None:
    """The runner-up has the weights of the true class and cannot be reached; the next class can."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(90, 166, (50, 1, 6, 6), generator=generator, dtype=torch.uint8)
    weight, bias = torch.zeros(4, 36), torch.tensor([1.0, 0.9, 0.5, -3.0])
    weight[2] = torch.randn(36, generator=generator)
    bias[2] -= (weight[2] * 128 / 255).sum()
    model, labels = Linear(weight, bias), torch.zeros(50).long()
    data = ImageSet(images, labels, torch.arange(50), tuple("abcd"))
    ranks = model(data.pixels()).argsort(1, descending=True)
    data = data[(ranks[:, 0] == 0) & (ranks[:, 1] == 1) & (ranks[:, 2] == 2)]
    assert len(data) > 5
    wide = Linf(norm="linf", eps_255=40.0)
    counts = [
        fooled(
            craft(
                parse_attack("apgd_t", targets=n), Defense(model, None), "full", data, wide, 0, 50
            )
        )
        for n in (1, 2)
    ]
    assert counts[0] < len(data) / 2 and counts[1] == len(data)


def test_apgd_shortens_its_steps_where_fixed_steps_overshoot() -> None:
    """This model is fooled only close to a hidden point of the ball; its gradient leads there, but
    steps of fixed length jump over it.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(90, 166, (60, 1, 4, 4), generator=generator, dtype=torch.uint8)
    data = ImageSet(images, torch.zeros(60).long(), torch.arange(60), tuple("ab"))
    offsets = LINF.eps * (1.4 * torch.rand(60, 1, 4, 4, generator=generator) - 0.7)
    hidden = data.pixels() + offsets

    class Valley(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = nn.Parameter(hidden, requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            nearest = (x[:, None] - self.hidden[None]).flatten(2).norm(dim=2).amin(1)
            return torch.stack([20 * nearest - 1, 0 * nearest], 1)

    defense = Defense(Valley(), None).freeze()
    assert fooled(craft(parse_attack("noise"), defense, "full", data, LINF, 0, 60)) == 0
    for name, changes in (("apgd_ce", {"steps": 100, "restarts": 1}), ("pgd", {"steps": 100})):
        found = fooled(craft(parse_attack(name, **changes), defense, "full", data, LINF, 0, 60))
        assert found > 30 if name == "apgd_ce" else found < 5


@pytest.mark.parametrize(("classes", "targets"), [(3, 1), (3, 2), (5, 5)])
def test_too_many_targets_are_refused_with_the_numbers(classes: int, targets: int) -> None:
    model, data = linear_task(classes, 10)
    with pytest.raises(ValueError, match=f"needs 4 classes and at most {classes - 1} targets here"):
        craft(
            parse_attack("apgd_t", targets=targets), Defense(model, None), "full", data, LINF, 0, 10
        )


def test_the_targeted_dlr_loss_is_the_one_of_the_paper() -> None:
    """Equation 7: -(z_y - z_t) / (z_1 - (z_3 + z_4) / 2), the largest four being 6, 5, 3, 1."""
    logits = torch.tensor([[5.0, 1.0, 6.0, 3.0, -2.0]])
    right, wrong = torch.tensor([2]), torch.tensor([0])
    for target, expected in ((0, -1 / 4), (1, -5 / 4), (4, -8 / 4)):
        found = targeted_dlr(logits, right, torch.tensor([target]))
        assert found.item() == pytest.approx(expected)
    assert targeted_dlr(logits, wrong, torch.tensor([2])).item() == pytest.approx(1 / 4)
    shifted = targeted_dlr(7 * logits + 3, right, torch.tensor([0]))
    assert shifted.item() == pytest.approx(-1 / 4), "scaling and shifting logits changes nothing"


def test_the_dlr_loss_is_the_one_of_the_paper() -> None:
    """Equation 6: -(z_y - max of the others) / (z_1 - z_3), the largest three being 6, 5, 3."""
    logits = torch.tensor([[5.0, 1.0, 6.0, 3.0, -2.0]])
    for label, expected in ((2, -1 / 3), (0, 1 / 3), (3, 3 / 3), (4, 8 / 3)):
        assert dlr(logits, torch.tensor([label])).item() == pytest.approx(expected)
        moved = dlr(7 * logits + 3, torch.tensor([label])).item()
        assert moved == pytest.approx(expected), "scaling and shifting logits changes nothing"


def test_dlr_needs_three_classes() -> None:
    model, data = linear_task(2, 10)
    with pytest.raises(ValueError, match="apgd_dlr needs 3 classes, but the classifier has 2"):
        craft(parse_attack("apgd_dlr"), Defense(model, None), "full", data, LINF, 0, 10)


@THREATS
def test_dlr_works_where_large_logits_flatten_the_cross_entropy(threat: Linf | L2) -> None:
    model, data = linear_task(3, 400)
    sharp = Linear(1e4 * model.weight, 1e4 * model.bias)
    exact = distances(model, data, 1 if threat is LINF else 2)
    eps = exact.quantile(0.5).item()
    attack = ApgdDlr(kind="apgd_dlr", steps=50, restarts=1, eot=1)
    crafted = craft(
        attack, Defense(sharp, None).freeze(), "full", data, resized(threat, eps), 0, 400
    )
    assert not (crafted.success & (exact > eps + 1e-5)).any(), (
        "an image was fooled within its exact distance"
    )
    assert (~crafted.success).float().mean().item() == pytest.approx(0.5, abs=0.02)
