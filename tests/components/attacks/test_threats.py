"""Threat models: projection, random starts, steepest steps, radii."""

import pytest
import torch
from pydantic import ValidationError
from toys import (
    BALL,
    LINF,
    THREATS,
)

from components.attacks import (
    L2,
    Linf,
    violations,
)
from components.data.draws import Draws


@pytest.mark.parametrize("eps", [0.0, -1.0, 256.0, float("nan")])
def test_an_invalid_radius_is_refused(eps: float) -> None:
    with pytest.raises(ValidationError):
        Linf(norm="linf", eps_255=eps)
    if eps != 256:
        with pytest.raises(ValidationError):
            L2(norm="l2", eps_l2=eps)


@THREATS
def test_projection_lands_inside_and_does_not_move_inner_points(threat: Linf | L2) -> None:
    generator = torch.Generator().manual_seed(0)
    origin = torch.rand(50, 3, 8, 8, generator=generator)
    wild = origin + torch.randn(origin.shape, generator=generator)
    projected = threat.project(wild, origin)
    assert violations(projected, origin, threat) == []
    assert torch.allclose(threat.project(projected, origin), projected, atol=1e-6)
    inside = origin + (0.5 * (projected - origin))
    assert torch.allclose(threat.project(inside, origin), inside, atol=1e-7)


@pytest.mark.parametrize("eps", [0.01, 0.5, 5.0, 40.0])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 224, 224)])
def test_an_l2_projection_stays_in_the_ball_despite_rounding(
    eps: float, shape: tuple[int, int, int]
) -> None:
    threat, generator = L2(norm="l2", eps_l2=eps), torch.Generator().manual_seed(0)
    origin = torch.rand(8, *shape, generator=generator)
    wild = origin + torch.randn(origin.shape, generator=generator)
    assert violations(threat.project(wild, origin), origin, threat) == []


def test_random_starts_fill_the_ball() -> None:
    many, grey = Draws(0, "attack", torch.arange(2000)), torch.full((2000, 1, 6, 6), 0.5)
    start = LINF.start(grey, many, "start") - grey
    assert abs(start.mean()) < 5 * LINF.eps / (3 * start.numel()) ** 0.5
    assert abs(start.std() - LINF.eps / 3**0.5) < 0.001
    length = (BALL.start(grey, many, "start") - grey).flatten(1).norm(dim=1)
    assert length.max() <= 0.7 + 1e-6
    assert ((length / 0.7).sort().values - torch.linspace(0, 1, 2000)).abs().max() < 0.05
    others = LINF.start(grey, many.redraw(1), "start") - grey
    assert not torch.allclose(start, others)


def test_steps_follow_the_steepest_ascent_of_their_norm() -> None:
    gradient = torch.tensor([3.0, -4.0, 0.0, 0.0]).view(1, 1, 2, 2)
    zero = torch.zeros_like(gradient)
    assert LINF.ascend(zero, gradient, 0.1).flatten().tolist() == pytest.approx([0.1, -0.1, 0, 0])
    assert BALL.ascend(zero, gradient, 0.1).flatten().tolist() == pytest.approx([0.06, -0.08, 0, 0])
    assert BALL.ascend(zero, zero, 0.1).isfinite().all(), "a zero gradient gives no step"


def test_scaled_multiplies_the_radius() -> None:
    assert LINF.scaled(0.5).eps == pytest.approx(16 / 255) and LINF.scaled(100).eps == 1
    assert BALL.scaled(2).eps == pytest.approx(1.4)
