"""Square (Andriushchenko et al. 2020): random search with square patches, without any gradient.

In every query a random patch of each image is changed, and the change is kept if it lowers the
margin. Under L-inf the patch gets one new colour (algorithm 2); under L2 the perturbation of two
windows is moved into one of them (algorithm 3). Images are attacked in batches, but each has its
own patches, from its own draws. Where nothing beats the clean image, that is returned.

Start, patch sizes and steps are those of the authors' code (fra31/auto-attack), with one halving
more than in the paper. Alone, patches shrink over the number of queries, as by that code's default,
and may lie anywhere, as in the paper. Inside AutoAttack they shrink after fixed numbers of queries
(`rescaled`) and never reach the last row or column (`to_the_edge`), again as in the code; this
leaves many more small images right.

Against a deterministic target no question is asked whose answer is known: under L-inf, the new
colour may be the one that all pixels of a patch have already. And most changes are not kept, so
several successive ones are asked about at once; what follows the first that is kept is asked again
(`_Block`). What the search finds is the same.
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
BLOCK = 128
# At most so many changes of an image are asked about at once: one for every so many that were not
# kept since the last one that was. So few passes are for nothing.
AHEAD = 16
PATIENCE = 4

# Maps the images held so far (N,C,H,W), and M rows of them with the number in the block of a query
# of each, to the rivals of these rows (M,C,H,W) and to whether they are other images (M,) bool.
Propose = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Square(Attack):
    """A start, and at most `queries` changes tried on each image, at one forward pass each.

    Against a stochastic target margins are means over `eot` draws, and with each change the current
    image is evaluated again under the same draws as its rival, so it costs two evaluations. A
    margin kept from earlier draws would soon be the luckiest of many, and no rival would beat it.
    """

    early_stopping: ClassVar[bool] = True
    losses: ClassVar[tuple[LossFamily, ...]] = ("margin",)
    rescaled: ClassVar[bool] = True
    to_the_edge: ClassVar[bool] = True

    kind: Literal["square"]
    queries: Positive
    eot: Positive

    def effort(self, classes: int, stochastic: bool) -> Cost:
        """One pass per change, start and clean image, under noise two; spared ones count."""
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
        waited = torch.zeros_like(labels)
        for queries, side in schedule(self.queries, images, threat, self.rescaled):
            rows = (held > 0).nonzero().squeeze(1)
            if not len(rows):
                break
            propose = self._changes(images[rows], threat, draws[rows], queries, side)
            block = _Block(target[rows], best[rows], held[rows], labels[rows], waited[rows])
            block.run(propose, len(queries))
            best[rows], held[rows], waited[rows] = block.x, block.held, block.waited
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
            rows = torch.arange(len(images), device=images.device)
            for k, query in enumerate(queries):
                rival, _ = propose(x, rows, torch.full_like(labels, k))
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
        make = _recolour if isinstance(threat, Linf) else move_mass
        return make(origin, threat.eps, draws, queries, side, self.to_the_edge)


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

    Of each image, `tried` (N,) changes have been decided on, the last `waited` (N,) of which were
    not kept, and `asked` (N,) were asked about. An image that falls does not change any more.
    """

    def __init__(
        self, target: Target, x: Tensor, held: Tensor, labels: Tensor, waited: Tensor
    ) -> None:
        self.target, self.x, self.held, self.labels = target, x, held, labels
        self.tried, self.asked = torch.zeros_like(labels), torch.zeros_like(labels)
        self.waited, self.every = waited, torch.arange(len(x), device=x.device)

    def run(self, propose: Propose, count: int) -> None:
        """Decide on `count` changes of each image."""
        while True:
            left = (count - self.tried) * (self.held > 0)
            ahead = (self.waited // PATIENCE).clamp(1, AHEAD).minimum(left)
            total = int(ahead.sum())
            if not total:
                return
            self._decide(propose, ahead, total)

    def _decide(self, propose: Propose, ahead: Tensor, total: int) -> None:
        """Ask about the next `ahead` (N,) changes of each image, `total` in all.

        The first of lower margin is kept, and what follows it is not decided on.
        """
        rows = self.every.repeat_interleave(ahead, output_size=total)
        begin = ahead.cumsum(0) - ahead
        step = torch.arange(total, device=rows.device) - begin[rows]
        rivals, other = propose(self.x, rows, self.tried[rows] + step)
        margins = self.held.new_full((len(self.held), AHEAD), torch.inf)
        margins[rows, step] = self._margins(rivals, rows, other)
        better = margins < self.held[:, None]
        kept, first = better.any(1), better.int().argmax(1)
        decided = torch.where(kept, first + 1, ahead)
        self.tried += decided
        self.waited = torch.where(kept, 0, self.waited + decided)
        self.x = _either(kept, rivals[(begin + first).clamp_max(total - 1)], self.x)
        self.held = torch.where(kept, margins[self.every, first], self.held)

    def _margins(self, rivals: Tensor, rows: Tensor, other: Tensor) -> Tensor:
        """Return the margins (M,) of `rivals`, and infinity where there is nothing to ask."""
        if not _picks_rows(rows.device) or bool(other.all()):
            return self._ask(rivals, rows)
        margins, some = self.held.new_full(rows.shape, torch.inf), other.nonzero().squeeze(1)
        if len(some):
            margins[some] = self._ask(rivals[some], rows[some])
        return margins

    def _ask(self, rivals: Tensor, rows: Tensor) -> Tensor:
        self.asked.index_add_(0, rows, torch.ones_like(rows))
        return nan_as_fooled(self.target[rows].margins(rivals, self.labels[rows], 0))


def _picks_rows(device: torch.device) -> bool:
    """Whether rows are picked from the rivals: an accelerator would wait once more each time."""
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
    make = _stripes if isinstance(threat, Linf) else _tiles
    return make(origin, threat.eps, draws)


def _stripes(origin: Tensor, eps: float, draws: Draws) -> Tensor:
    """Return the start under L-inf: vertical stripes one pixel wide, at a corner of the ball."""
    channels, _, width = origin.shape[1:]
    signs = _signs(draws.uniform((channels, 1, width), "square")).to(origin.dtype)
    return (origin + eps * signs).clamp_(0, 1)


def _recolour(
    origin: Tensor, eps: float, draws: Draws, queries: range, side: int, to_the_edge: bool
) -> Propose:
    """Propose a new colour, at a corner of the ball, for one square (algorithm 2)."""
    channels, height, width = origin.shape[1:]
    u = draws.uniform_of(queries, (2 + channels,), "square")
    windows = _Windows(u[..., :2], side, height, width, to_the_edge)
    change = eps * _signs(u[..., 2:, None]).to(origin.dtype)
    # The place in `origin` of the first pixel of each channel.
    begin = torch.arange(0, origin.numel(), height * width, device=origin.device)
    begin, clean = begin.view(-1, channels, 1), origin.flatten()

    def propose(x: Tensor, rows: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        rivals, at = x[rows].flatten(2), windows.pixels(rows, queries, channels)
        colour = (clean.take(begin[rows] + at) + change[rows, queries]).clamp_(0, 1)
        other = (colour != rivals.gather(2, at)).flatten(1).any(1)
        return rivals.scatter_(2, at, colour).view(-1, *x.shape[1:]), other

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

    def propose(x: Tensor, rows: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        first, second = (each.pixels(rows, queries, channels) for each in (firsts, seconds))
        clean = origin[rows]
        delta = (x[rows] - clean).flatten(2)
        rest = delta.scatter(2, first, 0).scatter_(2, second, 0)
        unused = (eps**2 - _length(delta) ** 2).clamp_min(0)
        budget = (unused / channels + _channel_length(delta - rest) ** 2).sqrt()
        inner = delta.gather(2, first)
        placed = signs[rows, queries] * bumps[turned[rows, queries], None]
        mixed = torch.addcdiv(placed, inner, _positive(_channel_length(inner)))
        moved = rest.scatter_(2, first, mixed / _positive(_channel_length(mixed)) * budget)
        found = torch.addcdiv(clean.flatten(2), moved, _positive(_length(moved)), value=eps)
        found = found.clamp_(0, 1).view(clean.shape)
        return found, torch.ones_like(rows, dtype=torch.bool)

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

    def pixels(self, rows: Tensor, queries: Tensor, channels: int) -> Tensor:
        """Return the pixels of some windows (M, `channels`, side^2) as numbers in a flat channel.

        They are those of image `rows` (M,), window `queries` (M,).
        """
        return (self.corners[rows, queries] + self.offsets)[:, None].expand(-1, channels, -1)


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
