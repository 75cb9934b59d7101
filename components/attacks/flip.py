"""Flips: an attack on purifiers that quantise, made in the space of what they let through.

Behind a threshold at `at` only the side counts on which a pixel lies, so the moves are the pixels
that the ball lets change sides, and a gradient through the threshold is no help. This is a greedy
search over these moves: each flip is chosen by what it does to the margin, exactly, by forward
passes; a gradient, where the target has one (mode `bpda`: that of the classifier at the purified
image), only says which pixels to try first. Our own attack, in the spirit of the adaptive attacks
of Tramer et al. 2020.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from components.attacks.contract import L2, Attack, Linf, Outcome, Positive
from components.attacks.square import margins
from components.data.draws import Draws
from components.models.defense import Target, margin


class Flip(Attack):
    """At most `steps` rounds, each trying `candidates` flips and keeping the best one.

    A round without a flip that lowers the margin is followed by one with the next candidates, and
    an image of which no single flip is left to try is done. Flips may be taken back. Against a
    stochastic target margins are means over `eot` draws, the same for all images of a round.
    Raises ValueError for L2.
    """

    stopping: ClassVar[bool] = True

    kind: Literal["flip"]
    at: Annotated[float, Field(gt=0, lt=1)]
    steps: Positive
    candidates: Positive
    eot: Positive

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return the image after the last flip that helped."""
        if not isinstance(threat, Linf):
            raise ValueError("flip moves each pixel by the radius: for linf threats only, not l2")
        above = images > self.at
        far = threat.project(torch.where(above, images - threat.eps, images + threat.eps), images)
        free = ((far > self.at) != above).flatten(1)
        count, held = free.sum(1), margins(target, images, labels, 0)
        flipped, tried = torch.zeros_like(free), torch.zeros_like(labels)
        rows, spent = torch.arange(len(images), device=images.device), torch.zeros_like(labels)
        for step in range(self.steps):
            rows = rows[tried[rows] < count[rows]]
            rows = rows if target.stochastic else rows[held[rows] > 0]
            if not len(rows):
                break
            near, other, state, truth = images[rows], far[rows], flipped[rows], labels[rows]
            x, mine = _mixed(near, other, state), target[rows]
            slope = mine.evaluate(x, truth, margin, 2 * step + 1).gradient
            change = (slope * (other - near).sign()).flatten(1)
            order = _order(change.where(~state, -change), free[rows], draws[rows])
            trials, real = _trials(state, order, tried[rows], count[rows], self.candidates)
            row, found = real.nonzero()[:, 0], held.new_full(real.shape, torch.inf)
            x = _mixed(near[row], other[row], trials[real])
            found[real] = margins(mine[row], x, truth[row], 2 * step + 2)
            held[rows], best = found.min(1)
            flipped[rows] = trials[torch.arange(len(rows), device=rows.device), best]
            tried[rows] = torch.where(best > 0, 0, tried[rows] + self.candidates)
            spent[rows] += 1
        return Outcome(_mixed(images, far, flipped), held.float(), spent)


def _mixed(near: Tensor, far: Tensor, flipped: Tensor) -> Tensor:
    """Take the pixels that are `flipped` (N,P) from `far`, the others from `near` (N,C,H,W)."""
    return torch.where(flipped.reshape(near.shape), far, near)


def _order(change: Tensor, free: Tensor, draws: Draws) -> Tensor:
    """Rank the pixels (N,P) by the change of the margin that the gradient foresees, least first.

    The pixels that are not `free` come last. A gradient that is nowhere usable gives a random
    order, the same in every round.
    """
    blind = ~(change.abs() > 0).any(1, keepdim=True)
    foreseen = torch.where(blind, draws.uniform((free.shape[1],), "flip"), change.nan_to_num(0))
    return foreseen.masked_fill(~free, torch.inf).argsort(dim=1, stable=True)


def _trials(
    state: Tensor, order: Tensor, tried: Tensor, count: Tensor, candidates: int
) -> tuple[Tensor, Tensor]:
    """Return the states (N,1+R,P) to compare, and which of them are real (N,1+R).

    The first is the `state` as it is (N,P), which the others have to beat; they have one pixel
    flipped each, the next `candidates` in `order` after those `tried`, as far as `count` goes.
    """
    places = tried[:, None] + torch.arange(candidates, device=state.device)
    picks = order.gather(1, places.clamp_max(order.shape[1] - 1))
    trials = state[:, None].repeat(1, 1 + candidates, 1)
    trials[:, 1:].scatter_(2, picks[:, :, None], ~state.gather(1, picks)[:, :, None])
    return trials, F.pad(places < count[:, None], (1, 0), value=True)
