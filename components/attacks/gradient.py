"""Attacks that follow the sign (or the direction) of the gradient: FGSM, BIM, PGD; and noise.

Papers: Goodfellow et al. 2015 (FGSM), Kurakin et al. 2017 (BIM), Madry et al. 2018 (PGD), Tramer et
al. 2018 (RAND+FGSM), Wong et al. 2020 (one step from a random start), Athalye et al. 2018
(expectation over transformation).
Step lengths are multiples of the radius of the threat.
"""

from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from components.attacks.contract import L2, Attack, Linf, Outcome, Positive, Search
from components.data.draws import Draws
from components.models.defense import Target

Factor = Annotated[float, Field(gt=0)]


class Noise(Attack):
    """A random image of the ball, the worst of `tries`: what any real attack must beat."""

    kind: Literal["noise"]
    tries: Positive

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return the try with the lowest margin."""
        search = Search(target, images, labels, drop=False)
        for attempt in range(self.tries):
            search.query(threat.start(images, draws.redraw(attempt), "noise"))
        return search.outcome()


class Pgd(Attack):
    """`steps` ascents of the cross-entropy, each `step` times the radius, projected back.

    With `early_stop`, "fooled at any iterate" counts: fooled images are left alone and the iterate
    of lowest margin is returned. Without it the last iterate is, as training wants it. Against a
    stochastic target it is the strongest of several either way (`Search`).
    """

    stopping: ClassVar[bool] = True

    kind: Literal["pgd"]
    steps: Positive
    step: Factor
    restarts: Positive
    random_start: bool
    early_stop: bool
    eot: Positive

    @model_validator(mode="after")
    def _one_run(self) -> "Pgd":
        if not self.early_stop and self.restarts > 1:
            raise ValueError("early_stop: false returns the last iterate of one run: restarts is 1")
        return self

    def effort(self) -> int:
        """Every step of every restart is one pass."""
        return self.steps * self.restarts

    def strong(self) -> bool:
        """Ten steps at least, which together travel one and a half radii."""
        return _far(self.steps, self.step)

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return one image per row; see the class for which."""
        if not self.early_stop and not target.stochastic:
            start = threat.start(images, draws, "start") if self.random_start else images
            last = ascend(target, start, images, labels, threat, self.steps, self.step)
            margins = target.margins(last, labels, self.steps)
            return Outcome(last, margins, torch.full_like(labels, self.steps))
        starts = (
            threat.start(images, draws.redraw(restart), "start") if self.random_start else images
            for restart in range(self.restarts)
        )
        return _pursue(target, starts, images, labels, threat, self.steps, self.step)


def _pursue(
    target: Target, starts: Iterable[Tensor], images: Tensor, labels: Tensor, threat: Linf | L2,
    steps: int, step: float,
) -> Outcome:  # fmt: skip
    """Run PGD from each of `starts`, leaving out what is fooled; return the lowest margins."""
    search = Search(target, images, labels, drop=True)
    for start in starts:
        search.restart()
        x = start[search.rows]
        for _ in range(steps):
            gradient = search.evaluate(x, cross_entropy).gradient
            alive = search.alive()
            if not len(search.rows):
                break
            ascended = threat.ascend(x[alive], gradient[alive], step * threat.eps)
            x = threat.project(ascended, search.origin)
        if len(search.rows):
            search.query(x)
    return search.outcome()


def ascend(
    target: Target, start: Tensor, images: Tensor, labels: Tensor, threat: Linf | L2,
    steps: int, step: float,
) -> Tensor:  # fmt: skip
    """Return the last of `steps` iterates from `start` in the ball around `images`: bare PGD."""
    x = start
    for look in range(steps):
        gradient = target.evaluate(x, labels, cross_entropy, look).gradient
        x = threat.project(threat.ascend(x, gradient, step * threat.eps), images)
    return x


class Fgsm(Attack):
    """One step of `step` times the radius, projected back; 1 from the image, 1.25 from a random
    start (FGSM-RS of Wong et al.).
    """

    stopping: ClassVar[bool] = True

    kind: Literal["fgsm"]
    random_start: bool
    step: Factor
    eot: Positive

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return the image after the step, or the clean one where that was wrong already."""
        start = threat.start(images, draws, "start") if self.random_start else images
        return _pursue(target, [start], images, labels, threat, 1, self.step)


class RFgsm(Attack):
    """RAND+FGSM (Tramer et al. 2018): `alpha` of the radius at random, the rest by the gradient.

    Under L-inf the random step is along the sign of Gaussian noise, under L2 along the noise. The
    two steps together are as long as the radius; a full step after the random one would leave the
    ball.
    """

    stopping: ClassVar[bool] = True

    kind: Literal["r_fgsm"]
    alpha: Annotated[float, Field(gt=0, lt=1)]
    eot: Positive

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return the image after both steps, or the one of lower margin before them."""
        noise = draws.normal(tuple(images.shape[1:]), "start").to(images.dtype)
        start = threat.project(threat.ascend(images, noise, self.alpha * threat.eps), images)
        return _pursue(target, [start], images, labels, threat, 1, 1 - self.alpha)


class Bim(Attack):
    """PGD from the image itself."""

    stopping: ClassVar[bool] = True

    kind: Literal["bim"]
    steps: Positive
    step: Factor
    eot: Positive

    def effort(self) -> int:
        """Every step is one pass."""
        return self.steps

    def strong(self) -> bool:
        """Ten steps at least, which together travel one and a half radii."""
        return _far(self.steps, self.step)

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return the iterate of lowest margin."""
        return _pursue(target, [images], images, labels, threat, self.steps, self.step)


def _far(steps: int, step: float) -> bool:
    return steps >= 10 and steps * step >= 1.5


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy per image (N,)."""
    return F.cross_entropy(logits, labels, reduction="none")
