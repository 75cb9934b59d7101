"""Gradient attacks: the exact robust accuracy of linear models, and the steps of RAND+FGSM."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from toy_networks import Linear
from toys import (
    BALL,
    LINF,
    THREATS,
    attack_model,
    distances,
    grey_images,
    linear_task,
    parse_attack,
)

from components.attacks import (
    L2,
    Linf,
    craft,
)
from components.attacks.gradient import Noise, RFgsm
from components.data.draws import Draws
from components.data.image_set import ImageSet
from components.models.defense import Defense

# Closed form: a linear model is robust where margin > eps * dual norm of the difference of weights


# Attack, number of classes, settings, tolerance. With more than two classes the gradient of the
# cross-entropy points towards all other classes at once, so it finds less.
CLOSED: list[tuple[str, int, dict[str, Any], float]] = [
    ("pgd", 2, {"steps": 20, "step": 0.2}, 0.002),
    ("apgd_ce", 2, {"steps": 50, "restarts": 1}, 0.002),
    ("apgd_t", 5, {"steps": 40, "targets": 4}, 0.002),
    ("pgd", 5, {"steps": 40, "step": 0.1}, 0.1),
    ("apgd_ce", 5, {"steps": 50, "restarts": 1}, 0.1),
]


@THREATS
@pytest.mark.parametrize(("name", "classes", "changes", "tolerance"), CLOSED)
def test_attacks_find_the_exact_robust_accuracy_of_a_linear_model(
    name: str, classes: int, changes: dict[str, Any], tolerance: float, threat: Linf | L2
) -> None:
    model, data = linear_task(classes, 1200)
    exact = distances(model, data, 1 if threat is LINF else 2)
    eps = exact.quantile(0.5).item()  # half of the images are robust
    tight = Linf(norm="linf", eps_255=255 * eps) if threat is LINF else L2(norm="l2", eps_l2=eps)
    assert 0 < eps < 90 / 255 / 2, "pixels would be clipped to [0,1]"
    crafted = craft(
        parse_attack(name, **changes), Defense(model, None).freeze(), "full", data, tight, 0, 400
    )
    assert not (crafted.success & (exact > eps + 1e-5)).any(), (
        "an image was fooled within its exact distance"
    )
    found = (~crafted.success).float().mean().item()
    assert found == pytest.approx(0.5, abs=tolerance)


@THREATS
@pytest.mark.parametrize("alpha", [0.25, 0.5])
def test_the_random_and_the_gradient_step_of_rand_fgsm_share_the_radius(
    threat: Linf | L2, alpha: float
) -> None:
    data = grey_images(30)
    weight = torch.randn(2, 36, generator=torch.Generator().manual_seed(0))
    weight[1] = -weight[0]
    attack = RFgsm(kind="r_fgsm", alpha=alpha, eot=1)
    crafted = attack_model(attack, Linear(weight, torch.tensor([20.0, 0])), data, threat)
    assert (crafted.iterations == 1).all() and (crafted.backward == 1).all()
    delta = (crafted.images - data.pixels()).flatten(1)
    if threat is LINF:
        rest = delta / LINF.eps + (1 - alpha) * weight[0].sign()
        assert torch.allclose(rest.abs(), torch.full_like(rest, alpha), atol=1e-5)
        assert abs((rest > 0).float().mean() - 0.5) < 0.08
    else:
        rest = delta / BALL.eps + (1 - alpha) * weight[0] / weight[0].norm()
        assert torch.allclose(rest.norm(dim=1), torch.full((30,), alpha), atol=1e-5)
        assert abs(rest.mean()) < 0.02
    assert not torch.allclose(rest[0], rest[1], atol=1e-3)


FIFTH = Linf(norm="linf", eps_255=51.0)


class _Valley(nn.Module):
    """Logits (m, 0) of one pixel x with m = 10 |x - 0.6| - 0.5: class 1 within 0.05 of 0.6."""

    def __init__(self) -> None:
        super().__init__()
        self.centre = nn.Parameter(torch.tensor(0.6))

    def forward(self, x: Tensor) -> Tensor:
        margin = 10 * (x.flatten(1)[:, 0] - self.centre).abs() - 0.5
        return torch.stack([margin, torch.zeros_like(margin)], 1)


@pytest.mark.parametrize("name", ["pgd", "bim"])
@pytest.mark.parametrize(("early_stop", "end", "fooled"), [(True, 0.08, 1), (False, 0.16, 0)])
def test_without_early_stop_the_last_iterate_is_returned_whether_it_fools_or_not(
    name: str, early_stop: bool, end: float, fooled: int
) -> None:
    """Two steps of 0.08 lead from 0.5 into the valley, and out of it."""
    start = {"restarts": 1, "random_start": False} if name == "pgd" else {}
    attack = parse_attack(name, steps=2, step=0.4, early_stop=early_stop, eot=1, **start)
    crafted = attack_model(attack, _Valley(), one_pixel(3), FIFTH)
    assert torch.allclose(crafted.images, torch.full((3, 1, 1, 1), 128 / 255 + end), atol=1e-6)
    assert crafted.success.tolist() == [bool(fooled)] * 3


def test_of_several_restarts_the_last_iterate_of_highest_loss_is_returned() -> None:
    data, draws = one_pixel(40), Draws(0, "attack", torch.arange(40))
    attack = parse_attack("pgd", steps=2, step=0.4, early_stop=False, restarts=3, eot=1)
    ends = []
    for restart in range(3):
        x = FIFTH.start(data.pixels(), draws.redraw(restart), "start")
        for _ in range(2):
            x = (x + 0.08 * (0.6 - x).sign()).clamp(128 / 255 - 0.2, 128 / 255 + 0.2)
        ends.append(x)
    furthest = torch.stack([(x - 0.6).abs().flatten() for x in ends])
    expected = torch.stack(ends).flatten(1).gather(0, furthest.argmin(0)[None])[0]
    crafted = attack_model(attack, _Valley(), data, FIFTH)
    assert torch.allclose(crafted.images.flatten(), expected, atol=1e-5)
    assert (crafted.backward == 6).all() and (crafted.iterations == 6).all()
    assert 0 < crafted.success.sum() < 40


def one_pixel(count: int) -> ImageSet:
    """Return grey images of one pixel at 128/255, all of class 0."""
    images = torch.full((count, 1, 1, 1), 128, dtype=torch.uint8)
    return ImageSet(images, torch.zeros(count, dtype=torch.int64), torch.arange(count), ("0", "1"))


@THREATS
def test_noise_as_drawn_is_returned_whatever_it_does(threat: Linf | L2) -> None:
    """Half of the labels are wrong, so noise heals about as often as it harms."""
    data, wide = grey_images(400), threat.scaled(4)
    weight = torch.randn(2, 36, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(400) % 2
    data = ImageSet(data.images, labels, data.ids, data.class_names)
    model = Linear(weight, -(weight @ torch.full((36,), 128 / 255)))
    plain, drawn = (
        attack_model(Noise(kind="noise", tries=1, as_drawn=as_drawn), model, data, wide)
        for as_drawn in (False, True)
    )
    once = wide.start(data.pixels(), Draws(0, "attack", data.ids), "noise")
    assert torch.equal(drawn.images, once)
    wrong = model(data.pixels()).argmax(1) != labels
    harmed = model(once).argmax(1) != labels
    assert torch.equal(drawn.success, harmed) and torch.equal(plain.success, wrong | harmed)
    healed = wrong & ~harmed
    assert healed.sum() >= 10 and not (healed & drawn.success).any() and plain.success[healed].all()
    assert set(drawn.forward.tolist()) == {1} and not drawn.backward.any()


def test_noise_as_drawn_makes_no_choice() -> None:
    with pytest.raises(ValidationError, match="tries is 1"):
        parse_attack("noise", tries=2, as_drawn=True)
