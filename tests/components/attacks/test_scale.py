"""The size of logits and gradients changes no outcome, down to the limits of float32."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from toys import BALL, LINF, head, parse_attack

from components.attacks import L2, Linf
from components.attacks.apgd import dlr, targeted_dlr
from components.attacks.contract import normalised
from components.attacks.distance.deepfool import onto_nearest
from components.attacks.gradient import log_odds
from components.data.draws import Draws
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.defense import Defense, Loss, bind

SCALES = (1e-10, 1e-3, 1.0, 5.0, 50.0, 1e3)
# Radii at which every attack here fools many images, and not all.
SMALL: dict[str, Linf | L2] = {
    "linf": Linf(norm="linf", eps_255=30.0),
    "l2": L2(norm="l2", eps_l2=0.5),
}
BY_CROSS_ENTROPY: dict[str, dict[str, Any]] = {
    "pgd": {"steps": 10, "step": 0.25, "restarts": 1},
    "apgd_ce": {"steps": 15, "restarts": 1},
    "mi_fgsm": {"steps": 5},
}
BY_DIFFERENCES: dict[str, dict[str, Any]] = {
    "apgd_dlr": {"steps": 15, "restarts": 1},
    "apgd_t": {"steps": 10, "targets": 2},
    "fab_t": {"steps": 10, "targets": 2, "restarts": 1},
    "square": {"queries": 100},
}


class Scaled(nn.Module):
    """The logits of `network` times `scale`."""

    def __init__(self, network: nn.Module, scale: float) -> None:
        super().__init__()
        self.network, self.scale = deepcopy(network), scale

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.scale * self.network(x)
        return logits


def left_right(
    name: str, settings: dict[str, Any], model: nn.Module, data: ImageSet, threat: Linf | L2,
    dtype: torch.dtype,
) -> int:  # fmt: skip
    """Return how many images an attack in `dtype` leaves right."""
    defense = Defense(model, None).to(dtype).freeze()
    draws = Draws(0, "attack", data.ids)
    target = bind(defense, "full", draws, 1)
    attack = parse_attack(name, **settings)
    outcome = attack.run(target, data.pixels().to(dtype), data.labels, threat, draws)
    return int((outcome.margin > 0).sum())


@pytest.mark.parametrize(
    ("name", "norm"),
    [("pgd", "linf"), ("pgd", "l2"), ("apgd_ce", "linf"), ("apgd_ce", "l2"), ("mi_fgsm", "linf")],
)
def test_in_float32_as_many_images_are_left_right_as_in_float64(
    name: str, norm: str, classifier: Classifier, test_set: ImageSet
) -> None:
    data, settings, threat = head(test_set, 80), BY_CROSS_ENTROPY[name], SMALL[norm]
    for scale in SCALES:
        single, double = (
            left_right(name, settings, Scaled(classifier, scale), data, threat, dtype)
            for dtype in (torch.float32, torch.float64)
        )
        assert abs(single - double) <= 1, f"logits times {scale}"
        assert 0 < double < 70, "too few or too many are left to see a difference"


@pytest.mark.parametrize("norm", SMALL)
@pytest.mark.parametrize("name", BY_DIFFERENCES)
def test_attacks_by_differences_of_logits_leave_as_many_images_right_at_every_scale(
    name: str, norm: str, classifier: Classifier, test_set: ImageSet
) -> None:
    data, settings, threat = head(test_set, 80), BY_DIFFERENCES[name], SMALL[norm]
    counts = [
        left_right(name, settings, Scaled(classifier, scale), data, threat, torch.float32)
        for scale in (*SCALES, 1e-20)
    ]
    assert max(counts) - min(counts) <= 1 and 0 < counts[2] < 75


def slopes(loss: Loss, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient of a loss in the logits."""
    point = logits.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(point, labels).sum(), point)
    return found


def test_the_cross_entropy_is_the_softplus_of_the_log_odds() -> None:
    """So it rises with them, and its gradient is theirs times 1 - p."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(50, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(7, (50,), generator=generator)

    def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits, labels, reduction="none")

    odds, expected = log_odds(logits, labels), cross_entropy(logits, labels)
    assert torch.allclose(functional.softplus(odds), expected, rtol=1e-12)
    wrong = 1 - logits.softmax(1).gather(1, labels[:, None])
    mine, theirs = (slopes(loss, logits, labels) for loss in (log_odds, cross_entropy))
    assert torch.allclose(wrong * mine, theirs, rtol=1e-9, atol=1e-15)
    assert (functional.cosine_similarity(mine, theirs) > 1 - 1e-12).all()


def test_the_log_odds_by_hand() -> None:
    """Probabilities 1/8, 5/8 and 1/4 of the true class: odds of 7, 3/5 and 3 against it."""
    logits = torch.tensor([[1.0, 5, 2]]).log().expand(3, 3)
    odds = log_odds(logits, torch.arange(3)).exp()
    assert odds.tolist() == pytest.approx([7, 3 / 5, 3])
    two = log_odds(torch.tensor([[2.0, -1.0]]), torch.tensor([0]))
    assert two.tolist() == [-3], "with two classes they are the difference of the logits"


@pytest.mark.parametrize("size", [1e-30, 1e4, 1e30])
def test_the_log_odds_have_a_gradient_however_large_or_small_the_logits_are(size: float) -> None:
    logits = size * torch.tensor([[3.0, 1.0, -2.0, 0.5]])
    found = slopes(log_odds, logits, torch.tensor([0]))
    assert found.dtype == torch.float32 and found[0, 0] == -1
    others = [1, 0, 0] if size > 1 else [1 / 3] * 3
    assert found[0, 1:].tolist() == pytest.approx(others)


def test_small_logits_change_the_log_odds() -> None:
    """In float32 the difference would vanish beside log 9, and APGD would see no step succeed."""
    logits = 1e-10 * torch.arange(10.0).expand(2, 10).clone()
    logits[1, 3] += 1e-12
    first, second = log_odds(logits, torch.zeros(2).long()).tolist()
    assert 0 < second - first < 1e-12


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-20, 1.0, 1e20, 3e38])
def test_an_l2_step_is_as_long_as_asked_whatever_the_size_of_the_gradient(size: float) -> None:
    direction = torch.tensor([3.0, -4.0, 0.0, 0.0]).view(1, 1, 2, 2)
    gradient = size * direction.sign() if size < 1e-37 else size / 4 * direction
    moved = BALL.ascend(torch.zeros_like(gradient), gradient, 0.1).flatten()
    expected = [0.1 / 2**0.5, -0.1 / 2**0.5, 0, 0] if size < 1e-37 else [0.06, -0.08, 0, 0]
    assert moved.tolist() == pytest.approx(expected, rel=1e-6)
    assert moved.norm().item() == pytest.approx(0.1, rel=1e-6)


def test_a_gradient_that_is_zero_moves_nothing_and_one_image_does_not_scale_another() -> None:
    x = torch.full((3, 1, 1, 2), 0.5)
    gradient = torch.tensor([[0.0, 0.0], [1e-30, 0.0], [0.0, -1e30]]).view(3, 1, 1, 2)
    moved = BALL.ascend(x, gradient, 0.25).flatten(1)
    assert moved.tolist() == [[0.5, 0.5], [0.75, 0.5], [0.5, 0.25]]


def test_nan_in_a_gradient_counts_as_zero_and_infinity_outweighs_what_is_finite() -> None:
    nan, inf = torch.nan, torch.inf
    gradient = torch.tensor([[nan, nan], [nan, 2.0], [-inf, 2.0], [inf, -inf]]).view(4, 1, 1, 2)
    half = 0.5**0.5
    expected = [[0, 0], [0, 1], [-1, 0], [half, -half]]
    assert torch.allclose(normalised(gradient).flatten(1), torch.tensor(expected), atol=1e-6)
    still = LINF.ascend(torch.zeros(4, 1, 1, 2), gradient, 1.0)
    assert still.isfinite().all(), "a step along the sign is finite, too"


@pytest.mark.parametrize("scale", [1e-25, 1e-10, 1e3])
def test_dlr_losses_and_deepfool_do_not_see_the_scale(scale: float) -> None:
    logits = torch.tensor([[5.0, 1.0, 6.0, 3.0, -2.0]])
    label, other = torch.tensor([2]), torch.tensor([1])
    assert dlr(scale * logits, label).item() == pytest.approx(-1 / 3)
    assert targeted_dlr(scale * logits, label, other).item() == pytest.approx(-5 / 4)
    gaps = torch.tensor([[-2.0, -1.0]])
    gradients = torch.tensor([[3.0, 4.0], [2.0, 0.0]]).view(1, 2, 1, 1, 2)
    move = onto_nearest(scale * gaps, scale * gradients)
    assert move.flatten().tolist() == pytest.approx([0.24, 0.32])


def test_dlr_losses_of_equal_logits_have_a_finite_gradient() -> None:
    logits, label = torch.ones(1, 5), torch.tensor([0])
    for loss in (dlr, lambda z, y: targeted_dlr(z, y, torch.tensor([3]))):
        assert loss(logits, label).item() == 0
        found = slopes(loss, logits, label)
        assert found.isfinite().all() and found[0, 0] == -1
