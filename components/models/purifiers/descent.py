"""What purifiers share that descend at test time: replayed steps, slopes, Adam.

A descent of T steps whose graph is kept costs memory for all T. `descend` keeps only what enters
each step and replays it when the gradient comes back (activation checkpointing): noise is keyed,
so a replayed step is the same step. A graph is built only where the caller has gradients on.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

State = tuple[Tensor, ...]
Step = Callable[[int, State, State], State]  # index, constants, state -> next state

# Inside the root, unlike in Kingma and Ba 2015, so that the derivative is finite where a gradient
# is zero.
TINY = 1e-16


def descend(step: Step, count: int, constants: State, state: State) -> State:
    """Return the state after `count` steps; the gradient reaches `constants` and `state`.

    `step` must be a pure function of its arguments and must not return any of them as they are.
    """
    for index in range(count):
        if torch.is_grad_enabled() and any(part.requires_grad for part in (*constants, *state)):
            state = _Replayed.apply(step, index, len(constants), *constants, *state)  # type: ignore[no-untyped-call]
        else:
            with torch.no_grad():
                state = step(index, constants, state)
    return state


def slope(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Return the gradient of sum(loss(at)) at `at`, itself differentiable if gradients are on."""
    keep = torch.is_grad_enabled()
    point = at if keep and at.requires_grad else at.detach().requires_grad_()
    with torch.enable_grad():
        (found,) = torch.autograd.grad(loss(point).sum(), point, create_graph=keep)
    return found


def adam(
    gradient: Tensor, moments: State, index: int, betas: tuple[float, float], detached: bool = False
) -> tuple[Tensor, State]:
    """Return Adam's direction (Kingma and Ba 2015) and its moments after step `index` (from 0).

    Elementwise, so that nothing depends on the batch. With `detached`, no derivative is taken of
    the denominator, whose derivative all but cancels that of the numerator.
    """
    first = betas[0] * moments[0] + (1 - betas[0]) * gradient
    second = betas[1] * moments[1] + (1 - betas[1]) * gradient.square()
    if detached:
        second = second.detach()
    mean, square = first / (1 - betas[0] ** (index + 1)), second / (1 - betas[1] ** (index + 1))
    return mean / (square + TINY).sqrt(), (first, second)


class _Replayed(torch.autograd.Function):
    """One step whose inputs are kept and whose graph is not."""

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
        kept = [(out, g) for out, g in zip(state, gradients, strict=True) if out.requires_grad]
        if not kept:
            return (None, None, None, *(None for _ in parts))
        outs, incoming = zip(*kept, strict=True)
        found = torch.autograd.grad(outs, parts, incoming, allow_unused=True)
        return (None, None, None, *found)
