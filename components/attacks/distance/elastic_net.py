"""The elastic-net attack (EAD; Chen et al. 2018, algorithm 1): few pixels rather than small steps.

Minimises c * max(margin + confidence, 0) + beta * |x' - x|_1 + |x' - x|_2^2 over [0,1] by FISTA,
with c found per image by bisection (`searches`; 1 is a fixed c). It has no ball: its result is an
image and a distance. Every image is optimised on its own, and none is given up early.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from components.attacks.contract import L2, Attack, Linf, Outcome, Positive
from components.data.draws import Draws
from components.models.defense import Target, margin


class ElasticNet(Attack):
    """EAD: `c` to start from, `searches` values of c, `steps` of FISTA each.

    Among all fooling iterates the one of least L1 distance counts (`rule: l1`) or that of least
    elastic-net distance (`en`). `beta` is the threshold of a single step, whatever the length of
    that step, as in the paper. Against a stochastic target an iterate fools if its margin does in
    the mean over `eot` draws; since the nearest of many is kept, be generous with the draws.
    """

    bounded: ClassVar[bool] = False

    kind: Literal["elastic_net"]
    rule: Literal["l1", "en"]
    beta: Annotated[float, Field(ge=0)]
    c: Annotated[float, Field(gt=0)]
    searches: Positive
    steps: Positive
    learning_rate: Annotated[float, Field(gt=0)]
    confidence: Annotated[float, Field(ge=0)]
    eot: Positive

    def effort(self) -> int:
        """Every step of every search is one pass."""
        return self.searches * self.steps

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return the nearest fooling image found, or the clean one where there was none."""
        clean = (
            target.margins(images, labels, 0).float().nan_to_num(-torch.inf, torch.inf, -torch.inf)
        )
        # What is wrong already has nothing nearer; but one look at random answers settles nothing.
        work = (clean > 0) | target.stochastic
        found = _Nearest(images[work], clean[work])
        rows = work.nonzero().squeeze(1)
        if len(rows):
            self._bisect(target[rows], labels[rows], found)
        nearest, margins = images.clone(), clean.clone()
        nearest[rows], margins[rows] = found.images, found.margin
        return Outcome(nearest, margins, work.long() * self.searches * self.steps)

    def _bisect(self, target: Target, labels: Tensor, found: "_Nearest") -> None:
        """Run FISTA for `searches` values of c: ten times c until it fools, then the middle."""
        c = torch.full((len(labels),), self.c, device=labels.device)
        low, high = torch.zeros_like(c), torch.full_like(c, torch.inf)
        for search in range(self.searches):
            hit = self._descend(target, labels, c, 1 + 2 * self.steps * search, found)
            high = torch.where(hit, c, high)
            low = torch.where(hit, low, c)
            c = torch.where(high.isinf(), c * 10, (low + high) / 2)

    def _descend(
        self, target: Target, labels: Tensor, c: Tensor, look: int, found: "_Nearest"
    ) -> Tensor:
        """Run FISTA from the clean images at weights `c` (N,); return which were fooled on the way.

        `look` is the number of the first of the two looks of each step.
        """

        def hinge(logits: Tensor, labels: Tensor) -> Tensor:
            return (margin(logits, labels) + self.confidence).clamp_min(0)

        origin, hit = found.origin, torch.zeros_like(labels, dtype=torch.bool)
        x = y = origin
        for k in range(self.steps):
            pull = target.evaluate(y, labels, hinge, look + 2 * k).gradient.nan_to_num(0, 0, 0)
            slope = 2 * (y - origin) + c[:, None, None, None] * pull
            # The paper's "square-root decay", which its code takes for this polynomial.
            rate = self.learning_rate * (1 - k / self.steps) ** 0.5
            previous, x = x, shrink(y - rate * slope, origin, self.beta)
            # Clipped, unlike the paper's: a target is promised pixels in [0,1].
            y = (x + k / (k + 3) * (x - previous)).clamp(0, 1)
            margins = target.margins(x, labels, look + 2 * k + 1)
            # `not (margin > -confidence)`, so that NaN counts as fooled.
            fools = ~(margins > -self.confidence)
            found.update(x, self._distance(x - origin), margins, fools)
            hit |= fools
        return hit

    def _distance(self, delta: Tensor) -> Tensor:
        """Return what the rule compares (N,)."""
        delta = delta.flatten(1)
        taxi = delta.abs().sum(1)
        return taxi if self.rule == "l1" else self.beta * taxi + (delta**2).sum(1)


class _Nearest:
    """The nearest fooling image of each row so far; the clean one until there is one."""

    def __init__(self, origin: Tensor, margins: Tensor) -> None:
        self.origin, self.images, self.margin = origin, origin.clone(), margins.clone()
        self.distance = torch.full_like(margins, torch.inf)

    def update(self, x: Tensor, distance: Tensor, margins: Tensor, fools: Tensor) -> None:
        nearer = fools & (distance < self.distance)
        self.images[nearer] = x[nearer]
        self.margin[nearer] = margins[nearer].float().nan_to_num(-torch.inf)
        self.distance = torch.where(nearer, distance, self.distance)


def shrink(z: Tensor, origin: Tensor, beta: float) -> Tensor:
    """Return the projected shrinkage of `z` towards `origin`, all (N,C,H,W) (equation 8).

    A pixel within `beta` of the origin goes back to it; any other comes nearer by `beta`, and is
    clipped to [0,1].
    """
    delta = z - origin
    return torch.where(delta.abs() <= beta, origin, z - beta * delta.sign()).clamp(0, 1)
