"""Square (Andriushchenko et al. 2020): random search with square patches, without any gradient.

In every query a random patch of each image is changed, and the change is kept if it lowers the
margin. Under L-inf the patch gets one new colour (algorithm 2); under L2 the perturbation of two
windows is moved into one of them (algorithm 3). Images are attacked in batches, but each has its
own patches, from its own draws. Where nothing beats the clean image, that is returned.

Start, patch sizes and steps are those of the authors' code (fra31/auto-attack), with one halving
more than in the paper. Alone, the attack takes its default: the schedule of the patch sizes is
stretched from 10,000 changes to their number, so that patches are small in the end whatever that
is. Inside AutoAttack it is not stretched (`rescaled`). Where code and paper differ in the place of
a window, we follow the paper: it may lie anywhere. In the code it never reaches the last row or
column (`to_the_edge`), which leaves many more small images right; inside AutoAttack so do we.

Against a deterministic target no question is asked whose answer is known: under L-inf, the new
colour may be the one that all pixels of a patch have already.
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import groupby
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

# The fraction of the image that the first patch covers (the paper's p), and the numbers of the
# changes, from 0, after which it is halved.
AREA = 0.8
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
# Noise is drawn, and fooled images are taken out of the batch, once in at most so many queries.
BLOCK = 64

# Maps the images held so far (N,C,H,W), and the number of a query in its block, to their rivals
# (N,C,H,W) and to whether these are other images (N,) bool.
Propose = Callable[[Tensor, int], tuple[Tensor, Tensor]]


class Square(Attack):
    """A start, and at most `queries` changes tried on each image, at one forward pass each.

    Against a stochastic target margins are means over `eot` draws, and with each change the current
    image is evaluated again under the same draws as its rival, so it costs two evaluations. A
    margin kept from earlier draws would soon be the luckiest of many, and no rival would ever beat
    it. `rescaled` says whether the patch sizes depend on the number of queries, `to_the_edge`
    whether patches may reach the last row and column.
    """

    early_stopping: ClassVar[bool] = True
    losses: ClassVar[tuple[LossFamily, ...]] = ("margin",)
    rescaled: ClassVar[bool] = True
    to_the_edge: ClassVar[bool] = True

    kind: Literal["square"]
    queries: Positive
    eot: Positive

    def effort(self, classes: int, stochastic: bool) -> Cost:
        """One forward pass per change, one for the start and one for the clean image.

        Under noise two per change, and two in the end. Passes that were spared count.
        """
        passes = 2 * (self.queries + 1) if stochastic else self.queries + 2
        return Cost(passes * self.draws(stochastic), 0)

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return the image of lowest margin: the first fooling one, or the last that was kept."""
        if target.stochastic:
            return self._under_noise(target, images, labels, threat, draws)
        clean = nan_as_fooled(target.margins(images, labels, 0))
        best, held, tried = images.contiguous().clone(), clean.clone(), torch.zeros_like(labels)
        rows = (held > 0).nonzero().squeeze(1)
        if len(rows):
            best[rows] = _start(best[rows], threat, draws[rows])
            held[rows] = nan_as_fooled(target[rows].margins(best[rows], labels[rows], 0))
        for queries, side in schedule(self.queries, images, threat, self.rescaled):
            rows = (held > 0).nonzero().squeeze(1)
            if not len(rows):
                break
            propose = self._changes(images[rows], threat, draws[rows], queries, side)
            block = _Block(target[rows], best[rows], held[rows], labels[rows])
            for k in range(len(queries)):
                block.compare(*propose(block.x, k))
            best[rows], held[rows] = block.x, block.held
            tried[rows] += block.tried
            target[rows].spare(block.tried - block.asked)
        best = _either(held > clean, images, best)
        return Outcome(best, torch.minimum(held, clean).float(), tried)

    def _under_noise(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Attack a stochastic target, where every image stays to the end."""
        x = _start(images, threat, draws)
        for queries, side in schedule(self.queries, images, threat, self.rescaled):
            propose = self._changes(images, threat, draws, queries, side)
            for k, query in enumerate(queries):
                rival, _ = propose(x, k)
                new, old = _paired_margins(target, rival, x, labels, query - 1)
                x = _either(new < old, rival, x)
        held, clean = _paired_margins(target, x, images, labels, self.queries)
        x = _either(held > clean, images, x)
        tried = torch.full_like(labels, self.queries)
        return Outcome(x, torch.minimum(held, clean).float(), tried)

    def _changes(
        self, origin: Tensor, threat: Linf | L2, draws: Draws, queries: range, side: int
    ) -> Propose:
        """Return what proposes the changes of some `queries`, with patches of one `side`."""
        if isinstance(threat, Linf):
            low, high = _bounds(origin, threat.eps)
            return _recolour(low, high, draws, queries, side, self.to_the_edge)
        return move_mass(origin, threat.eps, draws, queries, side, self.to_the_edge)


def schedule(
    queries: int, images: Tensor, threat: Linf | L2, rescaled: bool
) -> Iterator[tuple[range, int]]:
    """Yield blocks of at most `BLOCK` successive queries, from 1, and the side of their patches.

    It depends on the size of the `images` (N,C,H,W); `rescaled` is as in `Square`.
    """
    height, width = images.shape[2:]

    def side(query: int) -> int:
        area = patch_area(query - 1, queries if rescaled else None)
        return patch_side(area, height, width, threat)

    for each, group in groupby(range(1, queries + 1), side):
        same = list(group)
        for first in range(same[0], same[-1] + 1, BLOCK):
            yield range(first, min(first + BLOCK, same[-1] + 1)), each


def patch_area(change: int, queries: int | None) -> float:
    """Return the fraction of the image that a patch covers at `change`, counted from 0.

    With `queries` the schedule is stretched from 10,000 changes to so many.
    """
    at = change if queries is None else int(change / queries * 10_000)
    return AREA * 0.5 ** sum(at > halving for halving in HALVINGS)


def patch_side(area: float, height: int, width: int, threat: Linf | L2) -> int:
    """Return the side in pixels of a patch that covers about `area` of an image.

    Under L2 it is odd, and at least 3. It is never longer than a side of the image.
    """
    side = round(math.sqrt(area * height * width))
    side = max(side, 1) if isinstance(threat, Linf) else max(side, 3) | 1
    return min(side, height, width)


class _Block:
    """Images `x` (N,C,H,W) of a deterministic target, and their margins `held` (N,), in one block.

    `tried` and `asked` (N,) count the rivals of each, and those of them that were asked about. An
    image that falls stays in the block and does not change any more.
    """

    def __init__(self, target: Target, x: Tensor, held: Tensor, labels: Tensor) -> None:
        self.target, self.x, self.held, self.labels = target, x, held, labels
        self.tried, self.asked = torch.zeros_like(labels), torch.zeros_like(labels)

    def compare(self, rivals: Tensor, other: Tensor) -> None:
        """Keep the `rivals` (N,C,H,W) of lower margin; `other` (N,) marks those that differ."""
        standing = self.held > 0
        margins = self._margins(rivals, standing, other)
        better = (margins < self.held) & standing
        self.x, self.held = _either(better, rivals, self.x), torch.where(better, margins, self.held)
        self.tried += standing

    def _margins(self, rivals: Tensor, standing: Tensor, other: Tensor) -> Tensor:
        """Return the margins (N,) of `rivals`, and the held ones where there is nothing to ask."""
        if not _picks_rows(rivals.device):
            self.asked += standing
            return nan_as_fooled(self.target.margins(rivals, self.labels, 0))
        asked = standing & other
        self.asked += asked
        rows = asked.nonzero().squeeze(1)
        if not len(rows):
            return self.held
        if len(rows) == len(rivals):
            return nan_as_fooled(self.target.margins(rivals, self.labels, 0))
        margins = self.target[rows].margins(rivals[rows], self.labels[rows], 0)
        return self.held.index_copy(0, rows, nan_as_fooled(margins))


def _picks_rows(device: torch.device) -> bool:
    """Whether some rows of a batch may be picked in every query.

    An accelerator would wait for the host each time, for a batch of another size.
    """
    return device.type == "cpu"


def _either(first: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Return images (N,C,H,W): those of `one` where `first` (N,) is true, else those of `other`."""
    # It is exact, since the weights are 0 and 1, and several times faster than `where` on a CPU.
    return torch.lerp(other, one, first.to(one.dtype)[:, None, None, None])


def _paired_margins(
    target: Target, one: Tensor, other: Tensor, labels: Tensor, query: int
) -> tuple[Tensor, Tensor]:
    """Return the margins (N,) of `one` and of `other` (N,C,H,W), both under the same noise."""
    rows = torch.arange(len(one), device=one.device).repeat(2)
    margins = target[rows].margins(torch.cat([one, other]), labels[rows], query)
    first, second = nan_as_fooled(margins).chunk(2)
    return first, second


def _start(origin: Tensor, threat: Linf | L2, draws: Draws) -> Tensor:
    """Return the images (N,C,H,W) from which the search starts."""
    if isinstance(threat, Linf):
        return _stripes(*_bounds(origin, threat.eps), draws)
    return _tiles(origin, threat.eps, draws)


def _bounds(origin: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the lowest and the highest pixels (N,C,H,W) of the L-inf ball, within [0,1]."""
    return (origin - eps).clamp_(0, 1), (origin + eps).clamp_(0, 1)


def _stripes(low: Tensor, high: Tensor, draws: Draws) -> Tensor:
    """Return the start under L-inf: vertical stripes one pixel wide, at a corner of the ball."""
    channels, _, width = low.shape[1:]
    return torch.where(draws.uniform((channels, 1, width), "square") < 0.5, low, high)


def _recolour(
    low: Tensor, high: Tensor, draws: Draws, queries: range, side: int, to_the_edge: bool
) -> Propose:
    """Propose a new colour, at a corner of the ball, for one square (algorithm 2)."""
    channels, height, width = low.shape[1:]
    u = draws.uniform_of(queries, (2 + channels,), "square")
    windows = _Windows(u[..., :2], side, height, width, to_the_edge)
    down = u[..., 2:, None] < 0.5

    def propose(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        at = windows.pixels(k, channels)
        colour = torch.where(
            down[:, k], low.flatten(2).gather(2, at), high.flatten(2).gather(2, at)
        )
        other = (colour != x.flatten(2).gather(2, at)).flatten(1).any(1)
        return x.flatten(2).scatter(2, at, colour).view(x.shape), other

    return propose


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
    scale = eps / _positive(_length(delta))
    return (origin + delta * scale[..., None]).clamp_(0, 1)


def move_mass(
    origin: Tensor, eps: float, draws: Draws, queries: range, side: int, to_the_edge: bool
) -> Propose:
    """Propose to move the perturbation of one window into another, as `two_pyramids` (algorithm 3).

    What clipping to [0,1] left unused of the radius is added to it, and the result is scaled to the
    radius.
    """
    channels, height, width = origin.shape[1:]
    u = draws.uniform_of(queries, (5 + channels,), "square")
    firsts = _Windows(u[..., :2], side, height, width, to_the_edge)
    seconds = _Windows(u[..., 2:4], side, height, width, to_the_edge)
    bump = two_pyramids(side).to(origin)
    bumps, turned = torch.stack([bump, bump.T]).flatten(1), (u[..., 4] < 0.5).long()
    signs = _signs(u[..., 5:, None])
    other = torch.ones(len(origin), dtype=torch.bool, device=origin.device)

    def propose(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        first, second = firsts.pixels(k, channels), seconds.pixels(k, channels)
        delta = (x - origin).flatten(2)
        rest = delta.scatter(2, first, 0).scatter_(2, second, 0)
        unused = (eps**2 - _length(delta) ** 2).clamp_min(0)
        budget = (unused / channels + _channel_length(delta - rest) ** 2).sqrt()
        inner = delta.gather(2, first)
        placed = signs[:, k] * bumps[turned[:, k], None]
        mixed = torch.addcdiv(placed, inner, _positive(_channel_length(inner)))
        moved = rest.scatter_(2, first, mixed / _positive(_channel_length(mixed)) * budget)
        found = torch.addcdiv(origin.flatten(2), moved, _positive(_length(moved)), value=eps)
        return found.clamp_(0, 1).view(x.shape), other

    return propose


class _Windows:
    """Square windows of one `side` at random positions in images, by u (N,k,2) in [0,1).

    Unless `to_the_edge`, the positions at the last row and column are left out.
    """

    def __init__(self, u: Tensor, side: int, height: int, width: int, to_the_edge: bool) -> None:
        places = (n - side + to_the_edge for n in (height, width))
        top, left = ((u[..., i] * count).long() for i, count in enumerate(places))
        steps = torch.arange(side, device=u.device)
        self.corners = (top * width + left)[..., None]
        self.offsets = (steps[:, None] * width + steps).flatten()

    def pixels(self, k: int, channels: int) -> Tensor:
        """Return the pixels of window k (N, `channels`, side^2) as numbers in a flat channel."""
        return (self.corners[:, k] + self.offsets)[:, None].expand(-1, channels, -1)


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
    """Return the L2 norm of each image (N,1,1)."""
    lengths: Tensor = delta.flatten(1).norm(dim=1)
    return lengths[:, None, None]


def _channel_length(delta: Tensor) -> Tensor:
    """Return the L2 norm of each channel (N,C,1) of flat images or windows (N,C,P)."""
    lengths: Tensor = delta.norm(dim=2, keepdim=True)
    return lengths


def _positive(length: Tensor) -> Tensor:
    """Return lengths that can be divided by."""
    return length.clamp_min(1e-12)
