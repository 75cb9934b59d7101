"""An attack that knows the detector: fool the classifier without looking attacked.

It climbs cross-entropy less `weight` times the detector score of the purifier, once for every weight,
and keeps what fools with the least detector_score. Where it `sees` the classifier alone, this is
APuDAE's counter-attack B (Kalaria et al., equation 15), made blind to the purification; where it
sees the defense, purification is in its gradient too. The detector score is in the purifier's own
units, so a weight says nothing across purifiers: give them a wide range. Without a purifier this
is plain PGD.
"""

from collections.abc import Iterator
from itertools import count
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from components.attacks.contract import ASKED, L2, Attack, Linf, Outcome, Positive
from components.attacks.gradient import Factor, cross_entropy
from components.data.draws import Draws
from components.models.defense import Target


class DetectorAware(Attack):
    """PGD of `steps` times `step` radii for each of `weights`, from the image itself."""

    kind: Literal["detector_aware"]
    sees: Literal["classifier", "defense"]
    weights: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1)]
    steps: Positive
    step: Factor
    eot: Positive

    def effort(self) -> int:
        """Every step for every weight is one pass."""
        return self.steps * len(self.weights)

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return per image what fools with the least detector_score, else what has the least margin."""
        looks = count()
        # All are compared under the same noise, which no gradient has seen: else the luckiest wins.
        gradients = self.effort() * (1 if self.sees == "classifier" else 2)
        judged = -(-ASKED[1] // target.eot) if target.stochastic else 1
        first = range(gradients, gradients + judged)
        second = range(first.stop, first.stop + judged)
        best, odd = images.clone(), torch.full((len(images),), torch.inf, device=images.device)
        margins = odd.clone()

        def keep(x: Tensor) -> None:
            # NaN logits classify nothing, and count as fooled rather than as robust.
            margin = torch.stack([target.margins(x, labels, k) for k in first]).mean(0)
            margin = margin.float().nan_to_num(-torch.inf)
            detector_score = (
                torch.stack([target.detector_score(x, k) for k in second]).mean(0).float()
            )
            fools, fooled = margin <= 0, margins <= 0
            either = torch.where(fooled, detector_score < odd, True)
            better = torch.where(fools, either, ~fooled & (margin < margins))
            best[better], odd[better], margins[better] = (
                x[better],
                detector_score[better],
                margin[better],
            )

        keep(images)
        for weight in self.weights:
            x = images
            for _ in range(self.steps):
                gradient = self._gradient(target, x, labels, weight, looks)
                x = threat.project(threat.ascend(x, gradient, self.step * threat.eps), images)
            keep(x)
        return Outcome(best, margins, torch.full_like(labels, self.effort()))

    def _gradient(
        self, target: Target, x: Tensor, labels: Tensor, weight: float, looks: Iterator[int]
    ) -> Tensor:
        bare = self.sees == "classifier"
        # The classifier alone draws no noise, and so uses up no look.
        fool = target.evaluate(x, labels, cross_entropy, 0 if bare else next(looks), bare)
        return fool.gradient - weight * target.suspect(x, next(looks))
