"""CW-L2 (Carlini and Wagner 2017): the nearest misclassified image in L2.

Minimises |x' - x|^2 + c * max(margin + confidence, 0) over w, with x' = (tanh(w) + 1) / 2, by Adam.
The weight c is found per image by bisection over `searches` values; `searches: 1` keeps it fixed.
It has no ball: its result is an image and a distance. Each image is optimised on its own, whatever
the batch.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from components.attacks.contract import L2, Attack, Cost, Linf, LossFamily, Outcome, Positive
from components.data.draws import Draws
from components.models.defense import Target, margin

# atanh is infinite for pixels of 0 and 1: scaling by this keeps w finite, so they can move.
INSIDE = 1 - 1e-6


class CwL2(Attack):
    """CW-L2: `searches` values of c, starting with `c`, and `steps` steps of Adam for each."""

    bounded: ClassVar[bool] = False
    losses: ClassVar[tuple[LossFamily, ...]] = ("margin",)

    kind: Literal["cw_l2"]
    c: Annotated[float, Field(gt=0)]
    searches: Positive
    steps: Positive
    learning_rate: Annotated[float, Field(gt=0)]
    confidence: Annotated[float, Field(ge=0)]
    eot: Positive

    def effort(self, classes: int, stochastic: bool) -> Cost:
        """One gradient per step and value of c, and one query of the clean image."""
        draws, gradients = self.draws(stochastic), self.searches * self.steps
        return Cost((1 + gradients) * draws, gradients * draws)

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return the nearest fooling image found, or the clean one if there was none."""
        found = _Nearest(images, target.margins(images, labels, 0))
        query = 1
        c = torch.full((len(images),), self.c, device=images.device)
        low, high = torch.zeros_like(c), torch.full_like(c, torch.inf)
        for _ in range(self.searches):
            fooled = torch.zeros_like(labels, dtype=torch.bool)
            w = torch.atanh((2 * images - 1) * INSIDE)
            adam = _Adam(w, self.learning_rate)
            for _ in range(self.steps):
                x = (torch.tanh(w) + 1) / 2

                def hinge(logits: Tensor, labels: Tensor) -> Tensor:
                    return (margin(logits, labels) + self.confidence).clamp_min(0)

                evaluation = target.evaluate(x, labels, hinge, query)
                query += 1
                fooled |= found.update(x, images, evaluation.margin, self.confidence)
                gradient = 2 * (x - images) + c[:, None, None, None] * evaluation.gradient
                w = adam.step(w, gradient * (1 - torch.tanh(w) ** 2) / 2)
            high = torch.where(fooled, torch.minimum(high, c), high)
            low = torch.where(fooled, low, torch.maximum(low, c))
            c = torch.where(high.isinf(), c * 10, (low + high) / 2)
        count = torch.full_like(labels, self.searches * self.steps)
        return Outcome(found.images, found.margin, count)


class _Nearest:
    """The nearest fooling image of each row so far; the clean image until there is one."""

    def __init__(self, images: Tensor, margins: Tensor) -> None:
        self.images, self.margin = images.clone(), margins.float()
        wrong = margins <= 0
        self.distance = torch.where(wrong, 0.0, torch.inf).to(images.device)

    def update(self, x: Tensor, images: Tensor, margins: Tensor, confidence: float) -> Tensor:
        """Keep the fooling images that are nearer; return which of `x` (N,C,H,W) fool (N,)."""
        distance = (x - images).flatten(1).norm(dim=1)
        # Written as `not (margin > -confidence)`, so that NaN counts as fooled.
        fools = ~(margins > -confidence) & ~(margins > 0)
        nearer = fools & (distance < self.distance)
        self.images[nearer] = x[nearer].detach()
        self.margin[nearer] = margins[nearer].float()
        self.distance = torch.where(nearer, distance, self.distance)
        return fools


class _Adam:
    """Adam (Kingma and Ba 2015) with its usual constants; no element affects another."""

    def __init__(self, w: Tensor, rate: float) -> None:
        self.rate, self.count = rate, 0
        self.first, self.second = torch.zeros_like(w), torch.zeros_like(w)

    def step(self, w: Tensor, gradient: Tensor) -> Tensor:
        """Return `w` after one step."""
        self.count += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient**2
        first = self.first / (1 - 0.9**self.count)
        second = self.second / (1 - 0.999**self.count)
        return w - self.rate * first / (second.sqrt() + 1e-8)
