"""A detector-aware attack: fool the classifier while keeping the detector score low.

For every weight it ascends the `log_odds` less `weight` times the detector score of the purifier,
and it returns the fooling image of lowest detector score. With `sees: classifier` the log odds are
those of the bare classifier, so purification is ignored: counter-attack B of APuDAE (Kalaria et
al., equation 15, where the cross-entropy stands: it is flat while the classifier is confident, and
then the detector score alone would be followed). With `sees: defense` the gradient goes through the
purification too. The detector score is in the purifier's own units, so the same weight means
something else for every purifier: give a wide range. Without a purifier this is plain PGD.
"""

from collections.abc import Iterator
from itertools import count
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
)
from components.attacks.gradient import Factor, log_odds
from components.attacks.search import FINAL_DRAWS
from components.data.draws import Draws
from components.models.defense import Target


class DetectorAware(Attack):
    """PGD of `steps` steps of `step` radii for each of `weights`, from the image itself."""

    losses: ClassVar[tuple[LossFamily, ...]] = ("cross-entropy",)

    kind: Literal["detector_aware"]
    sees: Literal["classifier", "defense"]
    weights: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1)]
    steps: Positive
    step: Factor
    eot: Positive

    def effort(self, classes: int, stochastic: bool) -> Cost:
        """One gradient per step and weight, and the margins of the images compared.

        The passes of a detector come on top; there is none where there is no purifier.
        """
        draws, number = self.draws(stochastic), self._compared(stochastic)
        margins = (1 + len(self.weights)) * number
        return Cost((self._gradients + margins) * draws, self._gradients * draws)

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return the fooling image of lowest detector score, else the image of lowest margin."""
        best = _Best(images, *self._unused_queries(target))
        best.update(target, images, labels)
        queries = count()
        for weight in self.weights:
            x = images
            for _ in range(self.steps):
                gradient = self._gradient(target, x, labels, weight, queries)
                x = threat.project(threat.ascend(x, gradient, self.step * threat.eps), images)
            best.update(target, x, labels)
        return Outcome(best.images, best.margins, torch.full_like(labels, self._gradients))

    @property
    def _gradients(self) -> int:
        return self.steps * len(self.weights)

    def _compared(self, stochastic: bool) -> int:
        """Return the number of queries behind each margin and detector score compared."""
        return -(-FINAL_DRAWS[1] // self.eot) if stochastic else 1

    def _unused_queries(self, target: Target) -> tuple[range, range]:
        """Return the queries that compare images, for margins and for detector scores.

        All images are compared under the same noise, which no gradient has seen: otherwise the
        image with the luckiest noise would win.
        """
        gradients = self._gradients * (1 if self.sees == "classifier" else 2)
        number = self._compared(target.stochastic)
        margins = range(gradients, gradients + number)
        return margins, range(margins.stop, margins.stop + number)

    def _gradient(
        self, target: Target, x: Tensor, labels: Tensor, weight: float, queries: Iterator[int]
    ) -> Tensor:
        """Return the gradient of the log odds less `weight` times the detector score."""
        bare = self.sees == "classifier"
        # The bare classifier draws no noise, so evaluating it uses up no query.
        fool = target.evaluate(x, labels, log_odds, 0 if bare else next(queries), bare)
        return fool.gradient - weight * target.detector_gradient(x, next(queries))


class _Best:
    """The best image of each row so far, with its margin and detector score (N,)."""

    def __init__(self, images: Tensor, for_margins: range, for_scores: range) -> None:
        self.images = images.clone()
        self.scores = torch.full((len(images),), torch.inf, device=images.device)
        self.margins = self.scores.clone()
        self.for_margins, self.for_scores = for_margins, for_scores

    def update(self, target: Target, x: Tensor, labels: Tensor) -> None:
        """Keep `x` where it is better: fooling before not fooling, then score, then margin."""
        margins = torch.stack([target.margins(x, labels, k) for k in self.for_margins]).mean(0)
        # NaN logits classify nothing, and count as fooled rather than as robust.
        margins = margins.float().nan_to_num(-torch.inf)
        scores = torch.stack([target.detector_score(x, k) for k in self.for_scores]).mean(0).float()
        fools, fooled = margins <= 0, self.margins <= 0
        either = torch.where(fooled, scores < self.scores, True)
        better = torch.where(fools, either, ~fooled & (margins < self.margins))
        self.images[better] = x[better]
        self.scores[better], self.margins[better] = scores[better], margins[better]
