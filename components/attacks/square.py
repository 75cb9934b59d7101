"""Square (Andriushchenko et al. 2020): random search with square patches, without any gradient.

In every iteration a random patch of each image is changed, and the change is kept if it lowers the
margin. Under L-inf the patch gets one new colour (algorithm 2); under L2 the perturbation of two
windows is moved into one of them (algorithm 3). Images are attacked in batches, but each has its
own patches, from its own draws. The patch size follows the schedule of the authors' code: one
halving more than in the paper, and iterations rescaled to 10,000, so that patches are small in the
end whatever the number of queries. Where nothing beats the clean image, that is returned.
"""

import math
from functools import lru_cache
from typing import ClassVar, Literal

import torch
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
from components.models.defense import Target

# The fraction of the image that the first patch covers (the paper's p), and the iterations, of
# 10,000, after which it is halved.
AREA = 0.8
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


class Square(Attack):
    """At most `queries` changes tried on each image, each at the cost of one forward pass.

    Against a stochastic target margins are means over `eot` draws, and in each iteration the
    current image is evaluated again under the same draws as its rival, so it costs two evaluations.
    A margin kept from earlier draws would soon be the luckiest of many, and no rival would ever
    beat it.
    """

    early_stopping: ClassVar[bool] = True
    losses: ClassVar[tuple[LossFamily, ...]] = ("margin",)

    kind: Literal["square"]
    queries: Positive
    eot: Positive

    def effort(self, classes: int, stochastic: bool) -> Cost:
        """One forward pass per query; under noise two, and two more to compare with the image."""
        passes = 1 + (2 * (self.queries + 1) if stochastic else self.queries)
        return Cost(passes * self.draws(stochastic), 0)

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return the image of lowest margin: the first fooling one, or the last that was kept."""
        linf = isinstance(threat, Linf)
        start, change = (_stripes, _recolour) if linf else (_tiles, move_mass)
        best, clean = images.clone(), nan_as_fooled(target.margins(images, labels, 0))
        rows, spent = torch.arange(len(images), device=images.device), torch.zeros_like(labels)
        current = clean.clone()
        for query in range(self.queries):
            rows = rows if target.stochastic else rows[current[rows] > 0]
            if not len(rows):
                break
            x, origin, noise = best[rows], images[rows], draws[rows].redraw(query)
            if query:
                rival = change(x, origin, threat.eps, patch_area(query, self.queries), noise)
            else:
                rival = start(origin, threat.eps, noise)
            rival = threat.project(rival, origin)
            if target.stochastic:
                new, old = _paired_margins(target[rows], rival, x, labels[rows], query + 1)
            else:
                margins = target[rows].margins(rival, labels[rows], query + 1)
                new, old = nan_as_fooled(margins), current[rows]
            better = (new < old) | (query == 0)
            current[rows] = torch.where(better, new, old)
            best[rows[better]] = rival[better]
            spent[rows] += 1
        if target.stochastic:
            current, clean = _paired_margins(target, best, images, labels, self.queries + 1)
        worse = current > clean
        best[worse] = images[worse]
        return Outcome(best, torch.minimum(current, clean).float(), spent)


def _paired_margins(
    target: Target, one: Tensor, other: Tensor, labels: Tensor, query: int
) -> tuple[Tensor, Tensor]:
    """Return the margins (N,) of `one` and of `other` (N,C,H,W), both under the same noise."""
    rows = torch.arange(len(one), device=one.device).repeat(2)
    margins = target[rows].margins(torch.cat([one, other]), labels[rows], query)
    first, second = nan_as_fooled(margins).chunk(2)
    return first, second


def patch_area(query: int, queries: int) -> float:
    """Return the fraction of the image that a patch covers at `query` of `queries`."""
    scaled = int(query / queries * 10_000)
    return AREA * 0.5 ** sum(scaled > halving for halving in HALVINGS)


def _stripes(origin: Tensor, eps: float, draws: Draws) -> Tensor:
    """Return the start under L-inf: vertical stripes one pixel wide, at a corner of the ball."""
    channels, _, width = origin.shape[1:]
    return origin + eps * _signs(draws.uniform((channels, 1, width), "square"))


def _recolour(x: Tensor, origin: Tensor, eps: float, area: float, draws: Draws) -> Tensor:
    """Give one square a new colour at a corner of the ball (algorithm 2)."""
    channels, height, width = x.shape[1:]
    side = min(max(round(math.sqrt(area * height * width)), 1), height, width)
    u = draws.uniform((2 + channels,), "square")
    inside, _, _ = _window(u[:, :2], side, x)
    return torch.where(inside, origin + eps * _signs(u[:, 2:, None, None]), x)


def _tiles(origin: Tensor, eps: float, draws: Draws) -> Tensor:
    """Return the start under L2: a grid of `two_pyramids`, five to the shorter side.

    Their signs and orientations are random.
    """
    count, channels, height, width = origin.shape
    side = max(min(height, width) // 5, 1)
    rows, columns = height // side, width // side
    u = draws.uniform((channels + 1, rows, columns, 1, 1), "square")
    bump = two_pyramids(side).to(origin)
    tiles = torch.where(u[:, :1] < 0.5, bump, bump.T) * _signs(u[:, 1:])
    grid = tiles.transpose(3, 4).reshape(count, channels, rows * side, columns * side)
    top, left = (height - rows * side) // 2, (width - columns * side) // 2
    below, right = height - rows * side - top, width - columns * side - left
    delta = F.pad(grid, (left, right, top, below))
    return origin + eps * delta / _length(delta)


def move_mass(x: Tensor, origin: Tensor, eps: float, area: float, draws: Draws) -> Tensor:
    """Move the perturbation of one window into another, as `two_pyramids` (algorithm 3).

    What clipping to [0,1] left unused of the radius is added to it, and the result is scaled to the
    radius.
    """
    channels, height, width = x.shape[1:]
    side = min(max(round(math.sqrt(area * height * width)), 3) | 1, height, width)
    u = draws.uniform((5 + channels,), "square")
    first, row, column = _window(u[:, :2], side, x)
    second, _, _ = _window(u[:, 2:4], side, x)
    delta = x - origin
    unused = (eps**2 - _length(delta) ** 2).clamp_min(0)
    budget = (unused / channels + _channel_length(delta * (first | second)) ** 2).sqrt()
    bump = two_pyramids(side).to(x)
    turned = (u[:, 4] < 0.5).long()[:, None, None]
    placed = torch.stack([bump, bump.T])[turned, row[:, :, None], column[:, None, :]][:, None]
    inner = delta * first
    mixed = (_signs(u[:, 5:, None, None]) * placed + inner / _channel_length(inner)) * first
    moved = torch.where(
        second & ~first, 0, torch.where(first, mixed / _channel_length(mixed) * budget, delta)
    )
    return origin + eps * moved / _length(moved)


def _window(u: Tensor, side: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Put a square window of `side` into each image at a random position, by u (N,2) in [0,1).

    Return the mask (N,1,H,W), and the row (N,H) and column (N,W) inside the window of every row and
    column of the image, clamped to the window's edge outside it.
    """
    within, positions = [], []
    for axis, size in enumerate(x.shape[2:]):
        first = (u[:, axis] * (size - side + 1)).long()
        position = torch.arange(size, device=x.device) - first[:, None]
        within.append((position >= 0) & (position < side))
        positions.append(position.clamp(0, side - 1))
    return (within[0][:, :, None] & within[1][:, None, :])[:, None], positions[0], positions[1]


@lru_cache
def two_pyramids(side: int) -> Tensor:
    """Return two pyramids of opposite sign, one below the other (side, side), with L2 norm 1.

    The paper calls this eta.
    """
    halves = pyramid(side // 2, side), -pyramid(side - side // 2, side)
    bump = torch.cat([half / half.norm().clamp_min(1e-12) for half in halves])
    length: Tensor = bump.norm()
    return bump / length


def pyramid(height: int, width: int) -> Tensor:
    """Return heights (height, width): sums of 1/j^2 from j = 1 + the distance from the centre.

    The distance is the larger of those in rows and columns (equation 2).
    """
    steps = max(height // 2, width // 2) + 1
    heights = (1 / torch.arange(steps, 0, -1) ** 2).cumsum(0).flip(0)
    rows = (torch.arange(height) - height // 2).abs()
    columns = (torch.arange(width) - width // 2).abs()
    return heights[torch.maximum(rows[:, None], columns[None, :])]


def _signs(u: Tensor) -> Tensor:
    """Return random signs for uniform `u` in [0,1)."""
    return torch.where(u < 0.5, -1.0, 1.0)


def _length(delta: Tensor) -> Tensor:
    """Return the L2 norm of each image (N,1,1,1)."""
    lengths: Tensor = delta.flatten(1).norm(dim=1)
    return lengths.clamp_min(1e-12)[:, None, None, None]


def _channel_length(delta: Tensor) -> Tensor:
    """Return the L2 norm of each channel (N,C,1,1)."""
    lengths: Tensor = delta.flatten(2).norm(dim=2)
    return lengths.clamp_min(1e-12)[:, :, None, None]
