"""Square (Andriushchenko et al. 2020): random search with square patches, no gradient at all.

A patch of every image is changed at random, and the change stays where it lowers the margin. The
side of the patch follows the paper's schedule; under L-inf the patch gets one new colour (algorithm
2), under L2 a bump takes over the mass of two windows (algorithm 3). Batched, but every image has
patches of its own, from its own draws. The schedule is that of the authors' code: one halving more
than in the paper, and iterations rescaled to 10,000, so that any number of queries ends small. What
is found has to beat the clean image in the end, or that is what is returned.
"""

import math
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from components.attacks.contract import L2, Attack, Linf, Outcome, Positive
from components.data.draws import Draws
from components.models.defense import Target

AREA = 0.8
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


class Square(Attack):
    """At most `queries` changes tried on each image, each by one forward pass.

    Against a stochastic target margins are means over `eot` draws, and the image held so far is
    looked at again beside its rival, under the same draws: a margin kept from earlier draws would
    soon be the luckiest of many, which no rival beats any more. A query is two looks then.
    """

    stopping: ClassVar[bool] = True

    kind: Literal["square"]
    queries: Positive
    eot: Positive

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return the image held in the end: the fooling one, or the one of least margin."""
        linf = isinstance(threat, Linf)
        start, change = (_stripes, _recolour) if linf else (_tiles, _move_mass)
        best, clean = images.clone(), margins(target, images, labels, 0)
        rows, spent = torch.arange(len(images), device=images.device), torch.zeros_like(labels)
        held = clean.clone()
        for query in range(self.queries):
            rows = rows if target.stochastic else rows[held[rows] > 0]
            if not len(rows):
                break
            x, origin, noise = best[rows], images[rows], draws[rows].redraw(query)
            if query:
                rival = change(x, origin, threat.eps, _area(query, self.queries), noise)
            else:
                rival = start(origin, threat.eps, noise)
            rival = threat.project(rival, origin)
            if target.stochastic:
                new, old = _paired(target[rows], rival, x, labels[rows], query + 1)
            else:
                new, old = margins(target[rows], rival, labels[rows], query + 1), held[rows]
            better = (new < old) | (query == 0)
            held[rows] = torch.where(better, new, old)
            best[rows[better]] = rival[better]
            spent[rows] += 1
        if target.stochastic:
            held, clean = _paired(target, best, images, labels, self.queries + 1)
        worse = held > clean
        best[worse] = images[worse]
        return Outcome(best, torch.minimum(held, clean).float(), spent)


def _paired(
    target: Target, one: Tensor, other: Tensor, labels: Tensor, look: int
) -> tuple[Tensor, Tensor]:
    """Return the margins (N,) of `one` and of `other` (N,C,H,W), both under the same noise."""
    rows = torch.arange(len(one), device=one.device).repeat(2)
    first, second = margins(target[rows], torch.cat([one, other]), labels[rows], look).chunk(2)
    return first, second


def margins(target: Target, x: Tensor, labels: Tensor, look: int) -> Tensor:
    """Return the margins (N,) of look number `look`, minus infinity for logits that are NaN: they
    classify nothing.
    """
    return target.margins(x, labels, look).nan_to_num(-torch.inf, torch.inf, -torch.inf)


def _area(query: int, queries: int) -> float:
    """Return the share of the image a patch covers at `query` of `queries`."""
    scaled = int(query / queries * 10_000)
    return AREA * 0.5 ** sum(scaled > halving for halving in HALVINGS)


def _stripes(origin: Tensor, eps: float, draws: Draws) -> Tensor:
    """Start under L-inf: vertical stripes one pixel wide, each channel at a corner of the ball."""
    channels, _, width = origin.shape[1:]
    return origin + eps * _signs(draws.uniform((channels, 1, width), "square"))


def _recolour(x: Tensor, origin: Tensor, eps: float, area: float, draws: Draws) -> Tensor:
    """Give one square a new colour: each channel moved to a corner of the ball (algorithm 2)."""
    channels, height, width = x.shape[1:]
    side = min(max(round(math.sqrt(area * height * width)), 1), height, width)
    u = draws.uniform((2 + channels,), "square")
    inside, _, _ = _window(u[:, :2], side, x)
    return torch.where(inside, origin + eps * _signs(u[:, 2:, None, None]), x)


def _tiles(origin: Tensor, eps: float, draws: Draws) -> Tensor:
    """Start under L2: a grid of bumps, five to the shorter side, signs and turns at random."""
    count, channels, height, width = origin.shape
    side = max(min(height, width) // 5, 1)
    rows, columns = height // side, width // side
    u = draws.uniform((channels + 1, rows, columns, 1, 1), "square")
    bump = _bump(side).to(origin)
    tiles = torch.where(u[:, :1] < 0.5, bump, bump.T) * _signs(u[:, 1:])
    grid = tiles.transpose(3, 4).reshape(count, channels, rows * side, columns * side)
    top, left = (height - rows * side) // 2, (width - columns * side) // 2
    below, right = height - rows * side - top, width - columns * side - left
    delta = F.pad(grid, (left, right, top, below))
    return origin + eps * delta / _length(delta)


def _move_mass(x: Tensor, origin: Tensor, eps: float, area: float, draws: Draws) -> Tensor:
    """Empty one window into another, where the mass becomes a bump (algorithm 3).

    What clipping to [0,1] left unused of the radius is spent as well, and the result is scaled to
    the radius.
    """
    channels, height, width = x.shape[1:]
    side = min(max(round(math.sqrt(area * height * width)), 3) | 1, height, width)
    u = draws.uniform((5 + channels,), "square")
    first, row, column = _window(u[:, :2], side, x)
    second, _, _ = _window(u[:, 2:4], side, x)
    delta = x - origin
    unused = (eps**2 - _length(delta) ** 2).clamp_min(0)
    budget = (unused / channels + _sides(delta * (first | second)) ** 2).sqrt()
    bump = _bump(side).to(x)
    turned = (u[:, 4] < 0.5).long()[:, None, None]
    placed = torch.stack([bump, bump.T])[turned, row[:, :, None], column[:, None, :]][:, None]
    inner = delta * first
    mixed = (_signs(u[:, 5:, None, None]) * placed + inner / _sides(inner)) * first
    moved = torch.where(
        second & ~first, 0, torch.where(first, mixed / _sides(mixed) * budget, delta)
    )
    return origin + eps * moved / _length(moved)


def _window(u: Tensor, side: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Place a square of `side` in each image, by u (N,2) in [0,1).

    Returns the mask (N,1,H,W) and where in the square a row (N,H) or column (N,W) of the image
    lies, clamped to its edge outside.
    """
    within, places = [], []
    for axis, size in enumerate(x.shape[2:]):
        first = (u[:, axis] * (size - side + 1)).long()
        place = torch.arange(size, device=x.device) - first[:, None]
        within.append((place >= 0) & (place < side))
        places.append(place.clamp(0, side - 1))
    return (within[0][:, :, None] & within[1][:, None, :])[:, None], places[0], places[1]


@lru_cache
def _bump(side: int) -> Tensor:
    """Return two pyramids of opposite sign, one below the other (side, side), of length 1."""
    halves = _pyramid(side // 2, side), -_pyramid(side - side // 2, side)
    bump = torch.cat([half / half.norm().clamp_min(1e-12) for half in halves])
    length: Tensor = bump.norm()
    return bump / length


def _pyramid(height: int, width: int) -> Tensor:
    """Sum 1/j^2 over j from 1 + the distance (in steps of a king) from the centre (equation 2)."""
    steps = max(height // 2, width // 2) + 1
    heights = (1 / torch.arange(steps, 0, -1) ** 2).cumsum(0).flip(0)
    rows = (torch.arange(height) - height // 2).abs()
    columns = (torch.arange(width) - width // 2).abs()
    return heights[torch.maximum(rows[:, None], columns[None, :])]


def _signs(u: Tensor) -> Tensor:
    return torch.where(u < 0.5, -1.0, 1.0)


def _length(delta: Tensor) -> Tensor:
    """Return the length of each image (N,1,1,1)."""
    lengths: Tensor = delta.flatten(1).norm(dim=1)
    return lengths.clamp_min(1e-12)[:, None, None, None]


def _sides(delta: Tensor) -> Tensor:
    """Return the length of each channel (N,C,1,1)."""
    lengths: Tensor = delta.flatten(2).norm(dim=2)
    return lengths.clamp_min(1e-12)[:, :, None, None]
