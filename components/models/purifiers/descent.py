"""Optimisation at test time, shared by the purifiers that need it: checkpointed steps and Adam.

Backpropagation through T unrolled steps needs the memory of T graphs. `descend` keeps only the
inputs of every step and recomputes the step in the backward pass (activation checkpointing). Noise
is keyed, so a recomputed step is the same step. A graph is built only where gradients are enabled.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

State = tuple[Tensor, ...]
Step = Callable[[int, State, State], State]  # index, constants, state -> next state

# Adam's epsilon, inside the root. Kingma and Ba 2015 have it outside, where the derivative is
# infinite at a gradient of zero.
EPSILON = 1e-16


def descend(step: Step, count: int, constants: State, state: State) -> State:
    """Return the state after `count` steps; the gradient reaches `constants` and `state`.

    `step` must be a pure function, and must not return any of its arguments unchanged.
    """
    for index in range(count):
        if torch.is_grad_enabled() and any(part.requires_grad for part in (*constants, *state)):
            state = _Checkpointed.apply(step, index, len(constants), *constants, *state)  # type: ignore[no-untyped-call]
        else:
            with torch.no_grad():
                state = step(index, constants, state)
    return state


def gradient_at(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Return the gradient of sum(loss(at)) at `at`.

    The result is differentiable itself if gradients are enabled.
    """
    keep = torch.is_grad_enabled()
    point = at if keep and at.requires_grad else at.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(loss(point).sum(), point, create_graph=keep)
    return gradient


def adam_direction(
    gradient: Tensor, moments: State, index: int, betas: tuple[float, float], detached: bool = False
) -> tuple[Tensor, State]:
    """Return Adam's direction (Kingma and Ba 2015) and its moments after step `index` (from 0).

    Elementwise, so that images do not depend on their batch. `detached` treats the denominator as
    a constant: its derivative almost cancels that of the numerator.
    """
    first = betas[0] * moments[0] + (1 - betas[0]) * gradient
    second = betas[1] * moments[1] + (1 - betas[1]) * gradient.square()
    if detached:
        second = second.detach()
    mean, square = first / (1 - betas[0] ** (index + 1)), second / (1 - betas[1] ** (index + 1))
    return mean / (square + EPSILON).sqrt(), (first, second)


class _Checkpointed(torch.autograd.Function):
    """One step that saves its inputs, but not its graph."""

    @staticmethod
    def forward(ctx: Any, step: Step, index: int, constants: int, *parts: Tensor) -> State:
        ctx.step, ctx.index, ctx.constants = step, index, constants
        ctx.save_for_backward(*parts)
        return step(index, parts[:constants], parts[constants:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        parts = tuple(part.detach().requires_grad_() for part in ctx.saved_tensors)
        with torch.enable_grad():
            state = ctx.step(ctx.index, parts[: ctx.constants], parts[ctx.constants :])
        differentiable = [(s, g) for s, g in zip(state, gradients, strict=True) if s.requires_grad]
        if not differentiable:
            return (None, None, None, *(None for _ in parts))
        outputs, incoming = zip(*differentiable, strict=True)
        found = torch.autograd.grad(outputs, parts, incoming, allow_unused=True)
        return (None, None, None, *found)
