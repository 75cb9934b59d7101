"""DeepFool (Moosavi-Dezfooli et al. 2016, algorithm 2): step across the nearest boundary.

In each step the boundary between the true class and every other class is linearised, and the image
moves onto the nearest one in L2. The sum of the moves, scaled by 1 + `overshoot`, takes it across.
It has no ball: its result is an image and a distance.

Departures from the paper: iterates are clipped to [0,1], as is usual. The scaled image is evaluated
in every step, not only once the unscaled iterate is across, which on a flat boundary would depend
on rounding. And the moves start from the true class instead of the predicted one, so an image that
is misclassified already is left alone.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from components.attacks.contract import (
    L2,
    Attack,
    Cost,
    Linf,
    LossFamily,
    Outcome,
    Positive,
    normalised,
)
from components.attacks.search import Search, search_cost
from components.data.draws import Draws
from components.models.defense import Target


class DeepFool(Attack):
    """At most `steps` moves, among the `classes` most likely classes including the true one.

    Against a stochastic target gradients and margins are means over `eot` draws. Every image then
    runs through all steps and moves whenever it is on the true side, and the strongest of several
    images is returned (`Search`), even if it fools in less than half of the draws.
    """

    bounded: ClassVar[bool] = False
    losses: ClassVar[tuple[LossFamily, ...]] = ("margin",)

    kind: Literal["deepfool"]
    steps: Positive
    overshoot: Annotated[float, Field(ge=0)]
    classes: Annotated[int, Field(ge=2)]
    eot: Positive

    def effort(self, classes: int, stochastic: bool) -> Cost:
        """Per step one gradient for each other class, from one forward pass, and one query.

        One pass ranks the classes.
        """
        cost = search_cost(self.steps, self.steps, self.draws(stochastic), stochastic)
        return Cost(1 + cost.forward, cost.backward * (self.classes - 1))

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return the first fooling image, or the clean one if there was none.

        Raises ValueError if there are fewer than `classes` classes.
        """
        others = _likeliest_others(target, images, labels, self.classes)
        search = Search(target, images, labels, threat, early_stop=True)
        clean = search.margin.clone()
        x = search.origin
        for _ in range(self.steps):
            if not len(search.rows):
                break
            gaps, gradients = search.jacobian(x, others[search.rows])
            x = (x + onto_nearest(gaps, gradients)).clamp(0, 1)
            scaled = search.origin + (1 + self.overshoot) * (x - search.origin)
            search.query(scaled.clamp(0, 1))
            (x,) = search.drop_fooled(x)
        found = search.outcome()
        if target.stochastic:
            return found
        fooled = found.margin <= 0
        nearest = torch.where(fooled[:, None, None, None], found.images, images)
        return Outcome(nearest, torch.where(fooled, found.margin, clean), found.iterations)


def _likeliest_others(target: Target, images: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the `classes` - 1 most likely other classes (N,k) of the clean images."""
    with torch.no_grad():
        logits = target(images, 0)
    if classes > logits.shape[1]:
        raise ValueError(
            f"deepfool was given classes: {classes}, but there are {logits.shape[1]} classes here"
        )
    return logits.scatter(1, labels[:, None], -torch.inf).topk(classes - 1).indices


def onto_nearest(gaps: Tensor, gradients: Tensor) -> Tensor:
    """Return the move (N,C,H,W) onto the nearest of k boundaries (algorithm 2, lines 5 to 9).

    `gaps` (N,k) are logits less the true one, `gradients` (N,k,C,H,W) theirs. There is no move if
    the nearest boundary is crossed already or its gap is NaN. A boundary with a zero gradient is
    infinitely far away; NaN in a gradient counts as zero.
    """
    missing = -gaps.to(gradients.dtype).clamp_max(0)
    gradients = gradients.nan_to_num(0, 0, 0)
    directions = normalised(gradients.flatten(0, 1)).view_as(gradients)
    slopes = (directions * gradients).flatten(2).sum(2)
    away = torch.where(missing > 0, missing / slopes, missing)
    nearest = away.argmin(1)
    rows = torch.arange(len(gaps), device=gaps.device)
    moves = away[rows, nearest][:, None, None, None] * directions[rows, nearest]
    return moves.nan_to_num(0, 0, 0)
