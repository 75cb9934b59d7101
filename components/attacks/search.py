"""The bookkeeping of iterative attacks: the images still attacked, and the best one of each."""

from collections.abc import Iterator
from copy import copy
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from components.attacks.contract import L2, Cost, Linf, Outcome, Projection, nan_as_fooled
from components.models.defense import Evaluation, Loss, Target, margin

# A search against a stochastic target ends by evaluating this many of its best images once more,
# besides the last one, under at least and at most so many fresh draws.
FINALISTS = 4
FINAL_DRAWS = (2, 16)
# Copies of images that run side by side hold at most so many values, or as many as the batch does.
ROOM = 1 << 20
# On an accelerator fooled rows are dropped at every so many calls.
DROPS = 8


class Search:
    """The active rows of the batch, and the image of lowest margin of each row.

    `rows` are the indices of the active rows, `origin` their clean images; all tensors passed in
    and returned belong to them. The image of lowest margin is kept, so against a deterministic
    target more effort never gives a weaker result. With `early_stop`, a row is done once it is
    fooled: its image is kept, and the row is dropped.

    Against a stochastic target every row stays active, and the lowest margin of many queries is
    biased: an early, weaker iterate can beat the last one by its noise alone. So `outcome`
    evaluates the `FINALISTS` images of lowest margin and the last one again, all under the same
    fresh draws.
    """

    rows: Tensor
    origin: Tensor
    # Of the active rows: the best image and its margin, labels, the target, the projection.
    _image: Tensor
    _low: Tensor
    _true: Tensor
    _asked: Target
    _ball: Projection | None
    # Evaluations and calls of `drop_fooled` since these rows became active.
    _steps: int
    _calls: int

    def __init__(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, early_stop: bool
    ) -> None:
        self.target, self.images, self.labels, self.threat = target, images, labels, threat
        self.early_stop = early_stop and not target.stochastic
        self.queries = 0
        self.finalists = _Finalists(images) if target.stochastic else None
        self._best = images.clone()
        self._margin = torch.full((len(images),), torch.inf, device=images.device)
        self._iterations = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        # Copies of one image have the same group; see `copies`.
        self._groups: Tensor | None = None
        self._every = torch.arange(len(images), device=images.device)
        self._activate(self._every)
        self.query(images)
        self.restart()

    @property
    def project(self) -> Projection:
        """The projection onto the ball around each active row."""
        if self._ball is None:
            self._ball = self.threat.ball(self.origin)
        return self._ball

    @property
    def margin(self) -> Tensor:
        """The lowest margin of every row (N,)."""
        self._store()
        return self._margin

    @property
    def best(self) -> Tensor:
        """The image of lowest margin of every row (N,C,H,W)."""
        self._store()
        return self._best

    def restart(self) -> None:
        """Make all rows active again; with `early_stop`, only those that are not fooled yet."""
        self._store()
        self._activate(self._every[self._margin > 0] if self.early_stop else self._every)

    def select(self, chosen: Tensor) -> None:
        """Keep only some of the active rows active: a mask or positions among them."""
        self._store()
        self._activate(self.rows[chosen])

    def query(self, x: Tensor) -> Tensor:
        """Evaluate `x` without gradient, record it, return the margins."""
        margin = self._asked.margins(x, self._true, self.queries)
        self.record(x, margin)
        return margin

    def evaluate(self, x: Tensor, loss: Loss) -> Evaluation:
        """Evaluate `x` with the gradient of `loss`, record it, return the evaluation."""
        found = self._asked.evaluate(x, self._true, loss, self.queries)
        self._steps += 1
        self.record(x, found.margin)
        return found

    def jacobian(self, x: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate and record `x`; return gaps (n,k) and their input gradients (n,k,C,H,W).

        A gap is the logit of one of `classes` (n,k) less the true one.
        """
        margin, gaps, gradients = self._asked.jacobian(x, self._true, classes, self.queries)
        self._steps += 1
        self.record(x, margin)
        return gaps, gradients

    def drop_fooled(self, *tensors: Tensor) -> list[Tensor]:
        """With `early_stop`, drop the rows that are fooled; return what is left of `tensors`.

        These belong to the active rows. A row goes with the first of its copies that is fooled. On
        an accelerator most calls drop nothing, and what was fooled is attacked a little longer, for
        nothing.
        """
        self._calls += 1
        if not self.early_stop or self._calls % _drops_every(self.images.device):
            return list(tensors)
        fooled = self._low <= 0
        if not bool(fooled.any()):
            return list(tensors)
        if self._groups is not None:
            mine = self._groups[self.rows]
            fooled = torch.isin(mine, mine[fooled])
        stay = (~fooled).nonzero()[:, 0]
        self.select(stay)
        return [tensor[stay] for tensor in tensors]

    def copies(self, count: int) -> Iterator[tuple["Search", Tensor, Tensor]]:
        """Yield searches of `count` copies of each active row, for as many aims.

        With each come the rows (n,) that its images are copies of, and which copy each is (n,).
        What it found is recorded here before the next one. Against a stochastic target, where no
        row is ever done, the copies run one after the other, in this search.
        """
        if not self.early_stop:
            for index in range(count):
                yield self, self.rows, torch.full_like(self.rows, index)
            return
        room = max(ROOM // max(self.images[:1].numel(), 1), len(self.images))
        for rows in self.rows.split(max(room // count, 1)):  # type: ignore[no-untyped-call]
            of = rows.repeat_interleave(count)
            runs = self._copied(of)
            yield runs, of, torch.arange(count, device=of.device).repeat(len(rows))
            self._absorb(rows, runs, count)

    def outcome(self) -> Outcome:
        """Return the best image of every row; for a stochastic target, chosen under fresh draws."""
        self._store()
        if self.finalists:
            used = self.queries * self.target.eot
            count = final_draws(self.queries, self.target.eot)
            self._best, self._margin = strongest(
                self.target, self.finalists.candidates(), self.labels, range(used, used + count)
            )
        return Outcome(self._best, self._margin, self._iterations)

    def record(self, x: Tensor, margin: Tensor) -> None:
        """Count a query, and keep the images `x` of the active rows whose `margin` is a new low."""
        self.queries += 1
        x, margin = x.detach(), nan_as_fooled(margin.float())
        if self.finalists:
            self.finalists.enter(self.rows, x, margin)
        # Nothing is below the limit of a row that is done.
        limit = F.threshold(self._low, 0, -torch.inf) if self.early_stop else self._low
        better = margin < limit
        self._image = torch.where(better[:, None, None, None], x, self._image)
        self._low = torch.where(better, margin, self._low)

    def _activate(self, rows: Tensor) -> None:
        """Make these rows the active ones, and gather what belongs to them."""
        self.rows, self.origin, self._true = rows, self.images[rows], self.labels[rows]
        self._image, self._low = self._best[rows], self._margin[rows]
        self._asked, self._ball = self.target[rows], None
        self._steps = self._calls = 0

    def _store(self) -> None:
        """Write what was found for the active rows back to all rows."""
        self._best[self.rows], self._margin[self.rows] = self._image, self._low
        self._iterations[self.rows] += self._steps
        self._steps = 0

    def _copied(self, of: Tensor) -> Self:
        """Return a search of copies of the rows `of` (n,), each as often as it is named."""
        self._store()
        runs = copy(self)
        runs.target, runs.images, runs.labels = self.target[of], self.images[of], self.labels[of]
        runs._best, runs._margin = self._best[of], self._margin[of]
        runs._iterations = torch.zeros_like(of)
        runs._groups, runs._every = of, torch.arange(len(of), device=of.device)
        runs._activate(runs._every)
        return runs

    def _absorb(self, rows: Tensor, runs: "Search", count: int) -> None:
        """Record the best of `count` copies of each of these rows, and what all of them took."""
        runs._store()
        low, which = runs._margin.view(len(rows), count).min(1)
        best = runs._best[which + count * torch.arange(len(rows), device=rows.device)]
        better = low < self._margin[rows]
        self._best[rows] = torch.where(better[:, None, None, None], best, self._best[rows])
        self._margin[rows] = torch.where(better, low, self._margin[rows])
        self._iterations[rows] += runs._iterations.view(len(rows), count).sum(1)
        self.queries = max(self.queries, runs.queries)
        self._activate(self.rows)


def _drops_every(device: torch.device) -> int:
    """Return at every how many calls fooled rows are dropped: an accelerator waits each time."""
    return 1 if device.type == "cpu" else DROPS


def final_draws(queries: int, eot: int) -> int:
    """Return under how many draws the finalists of a search of so many queries are compared.

    It is a fifth of the draws that the search has used, within bounds, and never less than `eot`.
    """
    return max(eot, FINAL_DRAWS[0], min(queries * eot // 5, FINAL_DRAWS[1]))


def search_cost(gradients: int, margins: int, draws: int, stochastic: bool) -> Cost:
    """Return what a `Search` costs that takes so many gradients and asks for so many margins.

    It asks for those of the clean images besides, and compares its finalists if the target is
    stochastic. `draws` is the number of draws of each query.
    """
    queries = 1 + gradients + margins
    final = (FINALISTS + 1) * final_draws(queries, draws) if stochastic else 0
    return Cost(queries * draws + final, gradients * draws)


class _Finalists:
    """For each row the `FINALISTS` images of lowest margin under noise, and the last image."""

    def __init__(self, images: Tensor) -> None:
        self.last = images.clone()
        self.images = images.repeat(FINALISTS, *[1] * images.ndim).view(FINALISTS, *images.shape)
        self.margins = torch.full((FINALISTS, len(images)), torch.inf, device=images.device)

    def enter(self, rows: Tensor, x: Tensor, margins: Tensor) -> None:
        """Let `x` of `rows` replace the finalist of largest margin, where its margin is lower."""
        largest, slot = self.margins[:, rows].max(0)
        lower, allowed = margins < largest, margins < torch.inf
        self.margins[slot[lower], rows[lower]] = margins[lower]
        self.images[slot[lower], rows[lower]] = x[lower]
        self.last[rows[allowed]] = x[allowed]

    def candidates(self) -> Tensor:
        """Return the images (`FINALISTS` + 1, N, C, H, W)."""
        return torch.cat([self.images, self.last[None]])


def strongest(
    target: Target, candidates: Tensor, labels: Tensor, draws: range
) -> tuple[Tensor, Tensor]:
    """Return the strongest of M `candidates` (M,N,C,H,W) per row, and its mean margin (N,).

    All are evaluated under the same `draws` of the defense's noise, which should be unused so far.
    The strongest is classified correctly under the fewest draws; ties go to the lower mean margin.
    A NaN margin counts as minus infinity, as in `nan_as_fooled`.
    """
    with torch.no_grad():
        by_draw = [torch.stack([margin(target(x, k), labels) for x in candidates]) for k in draws]
    # The bound keeps means finite: infinity marks the candidates that are out.
    margins = torch.stack(by_draw).float().nan_to_num(-torch.inf).clamp(max=1e30)
    means, right = margins.mean(0), (margins > 0).sum(0)
    best = means.masked_fill(right > right.amin(0), torch.inf).argmin(0)
    rows = torch.arange(len(labels), device=labels.device)
    return candidates[best, rows], means[best, rows]
