"""Flip: an adaptive attack on purifiers that threshold the image.

Behind a threshold at `at` all that matters of a pixel is its side of the threshold, and the
gradient through the threshold is zero. So the moves are flips: a pixel is taken to the other side,
where the ball lets it. This is a greedy search over flips; each is chosen by its exact effect on
the margin, measured by a forward pass. The gradient, where the target has one (mode `bpda`: the
classifier's gradient at the purified image), only decides which pixels are tried first. Our own
attack, in the spirit of the adaptive attacks of Tramer et al. 2020.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from components.attacks.contract import (
    L2,
    Attack,
    Cost,
    Linf,
    LossFamily,
    Outcome,
    Positive,
    nan_as_fooled,
)
from components.data.draws import Draws
from components.models.defense import Target, margin


class Flip(Attack):
    """At most `steps` rounds; each tries `candidates` flips and keeps the best one.

    If none lowers the margin, the next round tries the next candidates; once every single flip was
    tried in vain, the image is done. A flip may be taken back later. Against a stochastic target
    margins are means over `eot` draws, the same draws for all images compared in a round. Raises
    ValueError for L2.
    """

    early_stopping: ClassVar[bool] = True
    losses: ClassVar[tuple[LossFamily, ...]] = ("margin",)
    # It moves each pixel by the radius.
    norms: ClassVar[tuple[str, ...]] = ("linf",)

    kind: Literal["flip"]
    at: Annotated[float, Field(gt=0, lt=1)]
    steps: Positive
    candidates: Positive
    eot: Positive

    def effort(self, classes: int, stochastic: bool) -> Cost:
        """One query: an image without a pixel near the threshold has no flip to try."""
        return Cost(self.draws(stochastic), 0)

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return the image after the last flip that lowered its margin."""
        self.require_norm(threat)
        above = images > self.at
        far = threat.project(torch.where(above, images - threat.eps, images + threat.eps), images)
        free = ((far > self.at) != above).flatten(1)
        count, current = free.sum(1), nan_as_fooled(target.margins(images, labels, 0))
        flipped, tried = torch.zeros_like(free), torch.zeros_like(labels)
        rows, spent = torch.arange(len(images), device=images.device), torch.zeros_like(labels)
        for step in range(self.steps):
            rows = rows[tried[rows] < count[rows]]
            rows = rows if target.stochastic else rows[current[rows] > 0]
            if not len(rows):
                break
            near, other, state, truth = images[rows], far[rows], flipped[rows], labels[rows]
            x, active = _mixed(near, other, state), target[rows]
            slope = active.evaluate(x, truth, margin, 2 * step + 1).gradient
            change = (slope * (other - near).sign()).flatten(1)
            order = _order(change.where(~state, -change), free[rows], draws[rows])
            trials, real = _trials(state, order, tried[rows], count[rows], self.candidates)
            row, found = real.nonzero()[:, 0], current.new_full(real.shape, torch.inf)
            x = _mixed(near[row], other[row], trials[real])
            found[real] = nan_as_fooled(active[row].margins(x, truth[row], 2 * step + 2))
            current[rows], best = found.min(1)
            flipped[rows] = trials[torch.arange(len(rows), device=rows.device), best]
            tried[rows] = torch.where(best > 0, 0, tried[rows] + self.candidates)
            spent[rows] += 1
        return Outcome(_mixed(images, far, flipped), current.float(), spent)


def _mixed(near: Tensor, far: Tensor, flipped: Tensor) -> Tensor:
    """Return pixels from `far` where they are `flipped` (N,P), else from `near` (N,C,H,W)."""
    return torch.where(flipped.reshape(near.shape), far, near)


def _order(change: Tensor, free: Tensor, draws: Draws) -> Tensor:
    """Return the pixels (N,P) in the order to try them: lowest predicted `change` first.

    Pixels that are not `free` come last. If the gradient is zero or NaN in all pixels, the order is
    random, and the same in every round.
    """
    blind = ~(change.abs() > 0).any(1, keepdim=True)
    predicted = torch.where(blind, draws.uniform((free.shape[1],), "flip"), change.nan_to_num(0))
    return predicted.masked_fill(~free, torch.inf).argsort(dim=1, stable=True)


def _trials(
    state: Tensor, order: Tensor, tried: Tensor, count: Tensor, candidates: int
) -> tuple[Tensor, Tensor]:
    """Return the states (N,1+R,P) to compare, and which of them are real (N,1+R); R = `candidates`.

    The first is the current `state` (N,P), which the others have to beat. Each of the others flips
    one more pixel: the next R in `order` (N,P) after the `tried` (N,). Beyond the `count` (N,) of
    free pixels there is nothing to flip: those states are not real.
    """
    ranks = tried[:, None] + torch.arange(candidates, device=state.device)
    picks = order.gather(1, ranks.clamp_max(order.shape[1] - 1))
    trials = state[:, None].repeat(1, 1 + candidates, 1)
    trials[:, 1:].scatter_(2, picks[:, :, None], ~state.gather(1, picks)[:, :, None])
    return trials, F.pad(ranks < count[:, None], (1, 0), value=True)
