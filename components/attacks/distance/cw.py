"""The attack of Carlini and Wagner 2017 in L2: the nearest image that is classified otherwise.

Minimises |x' - x|^2 + c * max(margin + confidence, 0) over w, x' = (tanh(w) + 1) / 2, by Adam,
with c found per image by bisection (`searches`; 1 is the papers' fixed c). It has no ball: its
result is an image and a distance. Every image is optimised on its own, whatever its batch.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from components.attacks.contract import L2, Attack, Linf, Outcome, Positive
from components.data.draws import Draws
from components.models.defense import Target, margin

# tanh reaches neither 0 nor 1: pixels are pulled in by this much so that they can move at all.
INSIDE = 1 - 1e-6


class CwL2(Attack):
    """Carlini and Wagner in L2: `c` to start from, `searches` values of c, `steps` of Adam each."""

    bounded: ClassVar[bool] = False

    kind: Literal["cw_l2"]
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
        found = _Found(images, target.margins(images, labels, 0))
        looks = 1
        c = torch.full((len(images),), self.c, device=images.device)
        low, high = torch.zeros_like(c), torch.full_like(c, torch.inf)
        for _ in range(self.searches):
            hit = torch.zeros_like(labels, dtype=torch.bool)
            w = torch.atanh((2 * images - 1) * INSIDE)
            adam = _Adam(w, self.learning_rate)
            for _ in range(self.steps):
                x = (torch.tanh(w) + 1) / 2

                def hinge(logits: Tensor, labels: Tensor) -> Tensor:
                    return (margin(logits, labels) + self.confidence).clamp_min(0)

                seen = target.evaluate(x, labels, hinge, looks)
                looks += 1
                hit |= found.update(x, images, seen.margin, self.confidence)
                slope = 2 * (x - images) + c[:, None, None, None] * seen.gradient
                w = adam.step(w, slope * (1 - torch.tanh(w) ** 2) / 2)
            high = torch.where(hit, torch.minimum(high, c), high)
            low = torch.where(hit, low, torch.maximum(low, c))
            c = torch.where(high.isinf(), c * 10, (low + high) / 2)
        count = torch.full_like(labels, self.searches * self.steps)
        return Outcome(found.images, found.margin, count)


class _Found:
    """The nearest fooling image of each row so far."""

    def __init__(self, images: Tensor, margins: Tensor) -> None:
        self.images, self.margin = images.clone(), margins.float()
        wrong = margins <= 0
        self.distance = torch.where(wrong, 0.0, torch.inf).to(images.device)

    def update(self, x: Tensor, images: Tensor, margins: Tensor, confidence: float) -> Tensor:
        distance = (x - images).flatten(1).norm(dim=1)
        # `not (margin > -confidence)`, so that NaN counts as fooled.
        hit = ~(margins > -confidence) & ~(margins > 0)
        nearer = hit & (distance < self.distance)
        self.images[nearer] = x[nearer].detach()
        self.margin[nearer] = margins[nearer].float()
        self.distance = torch.where(nearer, distance, self.distance)
        return hit


class _Adam:
    """Adam over a batch (Kingma and Ba 2015); every element is its own problem."""

    def __init__(self, w: Tensor, rate: float) -> None:
        self.rate, self.count = rate, 0
        self.first, self.second = torch.zeros_like(w), torch.zeros_like(w)

    def step(self, w: Tensor, slope: Tensor) -> Tensor:
        self.count += 1
        self.first = 0.9 * self.first + 0.1 * slope
        self.second = 0.999 * self.second + 0.001 * slope**2
        first = self.first / (1 - 0.9**self.count)
        second = self.second / (1 - 0.999**self.count)
        return w - self.rate * first / (second.sqrt() + 1e-8)
