"""DeepFool (Moosavi-Dezfooli et al. 2016, algorithm 2): across the nearest linearised boundary.

At each step every boundary between the true class and another is replaced by its tangent, and the
image is moved onto the nearest one in L2; the sum of the moves, stretched by 1 + `overshoot`,
carries it across. It has no ball: its result is an image and a distance.

Three departures from the paper: iterates are clipped to [0,1], as is usual; the stretched image is
looked at in every step, not only once the bare iterate is across, which on a flat boundary would
hang on a rounding; and it runs from the true class, so that what is wrong already is left alone.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from components.attacks.contract import L2, Attack, Linf, Outcome, Positive, Search
from components.data.draws import Draws
from components.models.defense import Target


class DeepFool(Attack):
    """At most `steps` moves among the `classes` likeliest classes, the true one included.

    Against a stochastic target gradients and margins are means over `eot` draws, every image is
    looked at in all steps, moves whenever it is found on the true side, and the strongest of
    several counts (`Search`), whether it fools more often than not or less.
    """

    bounded: ClassVar[bool] = False

    kind: Literal["deepfool"]
    steps: Positive
    overshoot: Annotated[float, Field(ge=0)]
    classes: Annotated[int, Field(ge=2)]
    eot: Positive

    def effort(self) -> int:
        """Every step is one pass for each other class."""
        return self.steps * (self.classes - 1)

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return the first fooling image, or the clean one where there was none.

        Raises ValueError for more `classes` than the target knows.
        """
        rivals = _rivals(target, images, labels, self.classes)
        search = _Search(target, images, labels, drop=True)
        clean = search.margin.clone()
        x = search.origin
        for _ in range(self.steps):
            if not len(search.rows):
                break
            gaps, slopes = search.jacobian(x, rivals)
            x = (x + onto_nearest(gaps, slopes)).clamp(0, 1)
            stretched = search.origin + (1 + self.overshoot) * (x - search.origin)
            search.query(stretched.clamp(0, 1))
            x = x[search.alive()]
        found = search.outcome()
        if target.stochastic:
            return found
        fooled = found.margin <= 0
        nearest = torch.where(fooled[:, None, None, None], found.images, images)
        return Outcome(nearest, torch.where(fooled, found.margin, clean), found.iterations)


class _Search(Search):
    """A search that also asks how single logits change."""

    def jacobian(self, x: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return gaps and slopes of `classes` (all rows of the batch) at `x`; keep what is better.

        The bare iterate may be across where the stretched one is across and out again.
        """
        margin, gaps, slopes = self.target[self.rows].jacobian(
            x, self.labels[self.rows], classes[self.rows], self.looks
        )
        self._keep(x, margin)
        self.iterations[self.rows] += 1
        return gaps, slopes


def _rivals(target: Target, images: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the `classes` - 1 likeliest other classes (N,k) of the clean images."""
    with torch.no_grad():
        logits = target(images, 0)
    if classes > logits.shape[1]:
        raise ValueError(
            f"deepfool was given classes: {classes}, but there are {logits.shape[1]} classes here"
        )
    return logits.scatter(1, labels[:, None], -torch.inf).topk(classes - 1).indices


def onto_nearest(gaps: Tensor, slopes: Tensor) -> Tensor:
    """Return the move (N,C,H,W) onto the nearest of k linearised boundaries (algorithm 2, 5-9).

    `gaps` (N,k) are logits less the true one, `slopes` (N,k,C,H,W) their gradients. A boundary
    that is behind already, or whose gap is not a number, asks for no move; a boundary without a
    slope is infinitely far, and a slope that is not a number counts as zero.
    """
    short = -gaps.to(slopes.dtype).clamp_max(0)
    slopes = slopes.nan_to_num(0, 0, 0)
    length = slopes.flatten(2).norm(dim=2).clamp_min(1e-12)
    nearest = (short / length).argmin(1)
    rows = torch.arange(len(gaps), device=gaps.device)
    stride: Tensor = (short / length**2)[rows, nearest]
    return (stride[:, None, None, None] * slopes[rows, nearest]).nan_to_num(0, 0, 0)
