"""The elastic-net attack (EAD; Chen et al. 2018, algorithm 1): sparse perturbations, near in L1.

Minimises c * max(margin + confidence, 0) + beta * |x' - x|_1 + |x' - x|_2^2 over [0,1] by FISTA.
The weight c is found per image by bisection over `searches` values; `searches: 1` keeps it fixed.
It has no ball: its result is an image and a distance. Each image is optimised on its own, without
early stop.
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
    nan_as_fooled,
)
from components.data.draws import Draws
from components.models.defense import Target, margin


class ElasticNet(Attack):
    """EAD: `searches` values of c, starting with `c`, and `steps` steps of FISTA for each.

    Of all fooling iterates the one of least L1 distance is returned (`rule: l1`) or that of least
    elastic-net distance (`en`). `beta` is the threshold of every shrinkage whatever the length of
    the step, as in the paper. Against a stochastic target an iterate fools if its mean margin over
    `eot` draws is not positive; since the nearest of many iterates is kept, choose a large `eot`.
    """

    bounded: ClassVar[bool] = False
    losses: ClassVar[tuple[LossFamily, ...]] = ("margin",)

    kind: Literal["elastic_net"]
    rule: Literal["l1", "en"]
    beta: Annotated[float, Field(ge=0)]
    c: Annotated[float, Field(gt=0)]
    searches: Positive
    steps: Positive
    learning_rate: Annotated[float, Field(gt=0)]
    confidence: Annotated[float, Field(ge=0)]
    eot: Positive

    def effort(self, classes: int, stochastic: bool) -> Cost:
        """One gradient and one query per step and value of c, and one query of the clean image."""
        draws, steps = self.draws(stochastic), self.searches * self.steps
        return Cost((1 + 2 * steps) * draws, steps * draws)

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return the nearest fooling image found, or the clean one if there was none."""
        clean = nan_as_fooled(target.margins(images, labels, 0).float())
        # Nothing is nearer than a clean image that is misclassified; under noise, one query does
        # not settle that it is.
        active = (clean > 0) | target.stochastic
        found = _Nearest(images[active], clean[active])
        rows = active.nonzero().squeeze(1)
        if len(rows):
            self._bisect(target[rows], labels[rows], found)
        nearest, margins = images.clone(), clean.clone()
        nearest[rows], margins[rows] = found.images, found.margin
        return Outcome(nearest, margins, active.long() * self.searches * self.steps)

    def _bisect(self, target: Target, labels: Tensor, found: "_Nearest") -> None:
        """Run FISTA for `searches` values of c: times ten until one fools, then by bisection."""
        c = torch.full((len(labels),), self.c, device=labels.device)
        low, high = torch.zeros_like(c), torch.full_like(c, torch.inf)
        for search in range(self.searches):
            fooled = self.fista(target, labels, c, 1 + 2 * self.steps * search, found)
            high = torch.where(fooled, c, high)
            low = torch.where(fooled, low, c)
            c = torch.where(high.isinf(), c * 10, (low + high) / 2)

    def fista(
        self, target: Target, labels: Tensor, c: Tensor, query: int, found: "_Nearest"
    ) -> Tensor:
        """Run FISTA from the clean images with weights `c` (N,); return which were fooled (N,).

        `query` is the number of its first query; every step takes two.
        """

        def hinge(logits: Tensor, labels: Tensor) -> Tensor:
            return (margin(logits, labels) + self.confidence).clamp_min(0)

        origin, fooled = found.origin, torch.zeros_like(labels, dtype=torch.bool)
        x = y = origin
        for k in range(self.steps):
            slope = target.evaluate(y, labels, hinge, query + 2 * k).gradient.nan_to_num(0, 0, 0)
            gradient = 2 * (y - origin) + c[:, None, None, None] * slope
            # The paper says "square-root decay"; this polynomial is what its code computes.
            rate = self.learning_rate * (1 - k / self.steps) ** 0.5
            previous, x = x, shrink(y - rate * gradient, origin, self.beta)
            # Clipped, unlike in the paper, because a target takes pixels in [0,1] only.
            y = (x + k / (k + 3) * (x - previous)).clamp(0, 1)
            margins = target.margins(x, labels, query + 2 * k + 1)
            # Written as `not (margin > -confidence)`, so that NaN counts as fooled.
            fools = ~(margins > -self.confidence)
            found.update(x, self._distance(x - origin), margins, fools)
            fooled |= fools
        return fooled

    def _distance(self, delta: Tensor) -> Tensor:
        """Return the distance (N,) that the rule compares."""
        delta = delta.flatten(1)
        l1 = delta.abs().sum(1)
        return l1 if self.rule == "l1" else self.beta * l1 + (delta**2).sum(1)


class _Nearest:
    """The nearest fooling image of each row so far; the clean image until there is one."""

    def __init__(self, origin: Tensor, margins: Tensor) -> None:
        self.origin, self.images, self.margin = origin, origin.clone(), margins.clone()
        self.distance = torch.full_like(margins, torch.inf)

    def update(self, x: Tensor, distance: Tensor, margins: Tensor, fools: Tensor) -> None:
        """Keep those of `x` (N,C,H,W) that fool at a smaller `distance` (N,)."""
        nearer = fools & (distance < self.distance)
        self.images[nearer] = x[nearer]
        self.margin[nearer] = margins[nearer].float().nan_to_num(-torch.inf)
        self.distance = torch.where(nearer, distance, self.distance)


def shrink(z: Tensor, origin: Tensor, beta: float) -> Tensor:
    """Shrink `z` towards `origin`, all (N,C,H,W), and clip it to [0,1] (equation 8).

    A pixel within `beta` of the origin is set to it; any other moves towards it by `beta`.
    """
    delta = z - origin
    return torch.where(delta.abs() <= beta, origin, z - beta * delta.sign()).clamp(0, 1)
