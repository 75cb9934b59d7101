"""Slopes by differences, each with the judgement whether it can be trusted."""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor

from components.data.draws import Draws
from components.models.defense import Defense

Scalar = Callable[[Tensor], Tensor]  # images (N,C,H,W) -> one number each (N,)

# Lengths of steps, shortest first: the first is taken at which rounding does not show.
STEPS = (1e-5, 1e-4, 1e-3, 1e-2)
# Central differences over a step and over its half agree to this fraction, or a kink lies between.
KINK = 0.01
# Differences to both sides agree to this fraction, or the point itself is a kink.
SIDES = 0.02
JITTER = 1e-7


def slopes(scalar: Scalar, x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Return the slopes (N,) of `scalar` at `x` (N,C,H,W) along unit directions; which are sound.

    A slope is not sound where a kink lies within the step, as at ties of a median or at the bend of
    a ReLU, or where rounding makes more than a hundredth of it. Rounding is measured: the second
    difference over a move of 1e-7, to which a smooth function contributes nothing.
    """
    with torch.no_grad():
        here = scalar(x)
        moved = JITTER * direction.sign()
        floor = (scalar(x + moved) + scalar(x - moved) - 2 * here).abs()
        slope, sound = torch.zeros_like(here), torch.zeros_like(here, dtype=torch.bool)
        flat = ~sound
        for step in STEPS:
            ahead, behind, near, before = (
                scalar(x + share * step * direction) for share in (1, -1, 0.5, -0.5)
            )
            whole, half = (ahead - behind) / (2 * step), (near - before) / step
            sides = torch.stack([near - here, here - before]).abs() / (0.5 * step)
            size = torch.maximum(whole.abs(), half.abs())
            fine = (whole - half).abs() <= KINK * size
            fine &= (near - 2 * here + before).abs() / (0.5 * step) <= SIDES * sides.amax(0)
            fine &= floor / (0.5 * step) <= KINK * size
            # Values that do not move at all may be too coarse for the step.
            flat &= size == 0
            fine &= half.isfinite() & (size > 0)
            slope, sound = torch.where(sound, slope, half), sound | fine
            if bool(sound.all()):
                break
    return slope, sound | flat


def precise(defense: Defense, x: Tensor, draws: Draws) -> Defense:
    """Return a float64 copy, or the defense itself if it does not run in float64 (tried on `x`)."""
    copy = deepcopy(defense).double()
    first = torch.arange(1, device=x.device)
    try:
        with torch.no_grad():
            copy(x[first].double(), draws[first])
    except RuntimeError:
        return defense
    return copy


def agree(claimed: Tensor, measured: Tensor, sound: Tensor) -> tuple[Tensor, Tensor]:
    """Compare slopes (D,N) of N images along D directions: which images are judged, which right.

    An image is judged by at least two sound directions. It is right if the cosine of its slopes is
    at least 0.98 and their lengths agree within a quarter, or if all are zero.
    """
    one, two = (torch.where(sound, v.nan_to_num(), 0.0).double() for v in (claimed, measured))
    lengths = one.norm(dim=0), two.norm(dim=0)
    cosine = (one * two).sum(0) / (lengths[0] * lengths[1]).clamp_min(1e-300)
    ratio = lengths[0] / lengths[1].clamp_min(1e-300)
    right = (cosine >= 0.98) & (ratio >= 0.8) & (ratio <= 1.25)
    flat = (lengths[0] == 0) & (lengths[1] == 0)
    return sound.sum(0) >= 2, right | flat
