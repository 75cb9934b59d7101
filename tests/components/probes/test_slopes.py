"""Slopes by differences are right where they are called sound, and unsound at kinks."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import keyed

from components.models.defense import Defense
from components.probes.slopes import agree, precise, slopes


def unit(*values: float) -> Tensor:
    direction = torch.tensor(values, dtype=torch.float64)
    return (direction / direction.norm()).view(1, 1, 1, -1)


def images(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, 1, 1, -1)


def test_slopes_of_a_polynomial_are_its_derivative() -> None:
    """f = a^2 + 3 a b at (0.5, 0.2): the gradient is (2a + 3b, 3a) = (1.6, 1.5)."""

    def f(x: Tensor) -> Tensor:
        return x[:, 0, 0, 0] ** 2 + 3 * x[:, 0, 0, 0] * x[:, 0, 0, 1]

    for way, expected in (
        (unit(1, 0), 1.6),
        (unit(0, 1), 1.5),
        (unit(3, 4), 0.6 * 1.6 + 0.8 * 1.5),
    ):
        slope, sound = slopes(f, images(0.5, 0.2), way)
        assert bool(sound) and abs(float(slope) - expected) < 1e-6


def test_a_kink_within_the_step_or_at_the_point_is_unsound() -> None:
    def bend(x: Tensor) -> Tensor:
        return F.relu(x[:, 0, 0, 0] - 0.3)

    for at in (0.3, 0.3 + 3e-7):
        _, sound = slopes(bend, images(at, 0.0), unit(1, 0))
        assert not bool(sound), "the two sides differ, whatever the step"
    slope, sound = slopes(bend, images(0.31, 0.0), unit(1, 0))
    assert bool(sound) and abs(float(slope) - 1) < 1e-6


def test_rounding_widens_the_step() -> None:
    """Around 1000, float32 has steps of 6e-5: a move of 1e-5 by a slope of 0.5 leaves no trace."""

    def f(x: Tensor) -> Tensor:
        return (1000 + 0.5 * x[:, 0, 0, 0].float()).double()

    slope, sound = slopes(f, images(0.5, 0.0), unit(1, 0))
    assert bool(sound) and abs(float(slope) - 0.5) < 0.05
    slope, sound = slopes(lambda x: 0 * f(x), images(0.5, 0.0), unit(1, 0))
    assert bool(sound) and float(slope) == 0, "a constant is flat at every step"


def test_slopes_agree_by_cosine_and_length() -> None:
    measured = torch.tensor([[3.0, 3.0, 3.0, 0.0, 0.0], [4.0, 4.0, 4.0, 0.0, 0.0]])
    claimed = torch.tensor([[3.0, 7.0, -3.0, 0.0, 1.0], [4.0, 9.0, -4.0, 0.0, 1.0]])
    judged, right = agree(claimed, measured, torch.ones(2, 5, dtype=torch.bool))
    assert judged.all()
    assert right.tolist() == [True, False, False, True, False]
    judged, _ = agree(claimed, measured, torch.tensor([[True], [False]]).expand(2, 5))
    assert not judged.any(), "one direction alone judges nothing"


class Casting(nn.Module):
    """A classifier that computes in float32, whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x.flatten(1).float())
        return logits


def test_a_defense_that_does_not_run_in_float64_stands_for_itself() -> None:
    defense = Defense(Casting(), None).freeze()
    x = torch.rand(2, 1, 2, 2)
    assert precise(defense, x, keyed(2)) is defense
    plain = Defense(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), None).freeze()
    assert next(precise(plain, x, keyed(2)).parameters()).dtype == torch.float64
    assert next(plain.parameters()).dtype == torch.float32
