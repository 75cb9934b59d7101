"""Descent at test time: checkpointed steps, differentiable gradients, and Adam."""

import gc
import weakref
from functools import partial

import torch
from torch import Tensor

from components.models.purifiers.descent import State, adam_direction, descend, gradient_at

TARGET = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)


def quartic(at: Tensor) -> Tensor:
    return ((at - TARGET) ** 4).sum(1)


def step(rate: float, index: int, constants: State, state: State) -> State:
    (start,) = constants
    (at,) = state
    return (at - rate * (gradient_at(quartic, at) + 0.1 * index * start),)


def descend_by_hand(x: Tensor, rate: float, count: int) -> Tensor:
    """Take the same steps with an ordinary graph and a gradient written by hand."""
    at = x
    for index in range(count):
        at = at - rate * (4 * (at - TARGET) ** 3 + 0.1 * index * x)
    return at


def test_checkpointed_descent_has_the_value_and_gradient_of_a_plain_one() -> None:
    x = torch.tensor([[0.3, 0.1, -0.4], [0.0, 2.0, 1.0]], dtype=torch.float64)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    (checkpointed,) = descend(partial(step, 0.02), 7, (one,), (one,))
    kept = descend_by_hand(two, 0.02, 7)
    assert torch.allclose(checkpointed, kept, rtol=0, atol=1e-14)
    (g1,) = torch.autograd.grad(checkpointed.sin().sum(), one)
    (g2,) = torch.autograd.grad(kept.sin().sum(), two)
    assert torch.allclose(g1, g2, rtol=0, atol=1e-12)


def test_no_graph_is_built_without_gradients() -> None:
    x = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        (end,) = descend(partial(step, 0.02), 3, (x,), (x,))
    assert not end.requires_grad and x.grad is None
    (end,) = descend(partial(step, 0.02), 3, (x.detach(),), (x.detach(),))
    assert not end.requires_grad


def test_descent_saves_states_and_no_graphs_of_steps() -> None:
    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    alive: weakref.WeakSet[Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Kept:
        kept = Kept(tensor)
        alive.add(kept)
        return kept

    x = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        end = descend(partial(step, 0.02), 5, (x,), (x,))
    gc.collect()
    assert end[0].requires_grad and len(alive) == 5 * 2


def test_gradient_at_is_differentiable_only_if_gradients_are_enabled() -> None:
    at = torch.tensor([[0.3, 0.1, -0.4]], dtype=torch.float64, requires_grad=True)
    found = gradient_at(quartic, at)
    assert torch.allclose(found, 4 * (at - TARGET) ** 3)
    (second,) = torch.autograd.grad(found.sum(), at)
    assert torch.allclose(second, 12 * (at - TARGET) ** 2)
    with torch.no_grad():
        assert not gradient_at(quartic, at).requires_grad


def test_adam_direction_matches_torch() -> None:
    gradients = torch.randn(6, 4, dtype=torch.float64)
    parameter = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    theirs = torch.optim.Adam([parameter], lr=0.1, betas=(0.8, 0.9), eps=0)
    ours, moments = torch.zeros(4, dtype=torch.float64), (torch.zeros(4), torch.zeros(4))
    for index, gradient in enumerate(gradients):
        parameter.grad = gradient.clone()
        theirs.step()
        direction, moments = adam_direction(gradient, moments, index, (0.8, 0.9))
        ours = ours - 0.1 * direction
    assert torch.allclose(ours, parameter.detach(), atol=1e-9)


def test_adam_direction_is_zero_and_differentiable_at_a_zero_gradient() -> None:
    gradient = torch.tensor([0.0, 2.0], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(2, dtype=torch.float64)
    direction, _ = adam_direction(gradient, (zero, zero), 0, (0.9, 0.999))
    assert direction.tolist() == [0.0, 1.0]
    (masked,) = torch.autograd.grad(direction.sum(), gradient)
    assert masked.isfinite().all() and abs(float(masked[1])) < 1e-6, "the first step is a sign"
    direction, _ = adam_direction(gradient, (zero, zero), 0, (0.9, 0.999), detached=True)
    (alive,) = torch.autograd.grad(direction.sum(), gradient)
    assert torch.allclose(alive[1], torch.tensor(0.5, dtype=torch.float64))
