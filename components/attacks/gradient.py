"""Attacks by plain gradient ascent on the log odds: FGSM, RAND+FGSM, BIM, PGD; and noise.

Papers: Goodfellow et al. 2015 (FGSM), Kurakin et al. 2017 (BIM), Madry et al. 2018 (PGD), Tramer et
al. 2018 (RAND+FGSM), Wong et al. 2020 (FGSM from a random start), Athalye et al. 2018 (EOT,
expectation over transformation: `eot` draws of the defense's noise are averaged per gradient).
The papers climb the cross-entropy; its gradient has the direction of that of the `log_odds`.
Under L-inf a step follows the sign of the gradient, under L2 its direction. Step lengths are given
in multiples of the radius.
"""

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.autograd.function import once_differentiable

from components.attacks.contract import (
    L2,
    LEAST_STEPS,
    Attack,
    Cost,
    Linf,
    LossFamily,
    Outcome,
    Positive,
)
from components.attacks.search import Search, search_cost
from components.data.draws import Draws
from components.models.defense import Target, margin

Factor = Annotated[float, Field(gt=0)]
# In radii: how far the steps of an attack must lead in all, and the longest that one may be.
ACROSS = 2.0
LONGEST_STEP = 0.5


class Noise(Attack):
    """The strongest of `tries` random images of the ball: the baseline every attack must beat.

    An image that no try makes worse stays as it is. With `as_drawn` (absent: off) the one try is
    returned whatever it does, which is the "Random" of APuDAE's Table 3: noise may help a purifier,
    and there it does.
    """

    kind: Literal["noise"]
    tries: Positive
    as_drawn: bool = False

    @model_validator(mode="after")
    def _one_try(self) -> "Noise":
        if self.as_drawn and self.tries > 1:
            raise ValueError("as_drawn: true returns noise without a choice: tries is 1")
        return self

    def effort(self, classes: int, stochastic: bool) -> Cost:
        """One query per try."""
        if self.as_drawn:
            return Cost(1, 0)
        return search_cost(0, self.tries, self.draws(stochastic), stochastic)

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return the random image of lowest margin, or the clean one if none is; see the class."""
        if self.as_drawn:
            drawn = threat.start(images, draws.redraw(0), "noise")
            return Outcome(drawn, target.margins(drawn, labels, 0), torch.zeros_like(labels))
        search = Search(target, images, labels, threat, early_stop=False)
        for attempt in range(self.tries):
            search.query(threat.start(images, draws.redraw(attempt), "noise"))
        return search.outcome()


class Pgd(Attack):
    """PGD: `steps` steps of `step` times the radius, each projected back onto the ball.

    With `early_stop` an image counts as fooled if any iterate fools: it is then left alone, and the
    iterate of lowest margin is returned. Without it the last iterate is returned, of several
    restarts the one of highest loss: as adversarial training needs it, and as the libraries behind
    most papers on purifiers have it. Against a stochastic target the strongest of several iterates
    is returned either way (`Search`).
    """

    early_stopping: ClassVar[bool] = True
    losses: ClassVar[tuple[LossFamily, ...]] = ("cross-entropy",)

    kind: Literal["pgd"]
    steps: Positive
    step: Factor
    restarts: Positive
    random_start: bool
    early_stop: bool
    eot: Positive

    def effort(self, classes: int, stochastic: bool) -> Cost:
        """One gradient per step and restart, one query of the last iterate of each."""
        return _climbing_cost(self, self.steps, self.restarts, stochastic)

    def strong(self) -> bool:
        """Enough steps, which cross the ball and do not leap over it (`sound_steps`)."""
        return sound_steps(self.steps, self.step)

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return the iterate of lowest margin, or the last one; see the class."""
        starts = (
            threat.start(images, draws.redraw(restart), "start") if self.random_start else images
            for restart in range(self.restarts)
        )
        climb = _multi_start if self.early_stop or target.stochastic else _last_iterates
        return climb(target, starts, images, labels, threat, self.steps, self.step)


def _climbing_cost(attack: "Pgd | Bim", steps: int, restarts: int, stochastic: bool) -> Cost:
    """Return the cost of so many restarts of so many steps each."""
    if not attack.early_stop and not stochastic:
        return Cost((steps + 1) * restarts, steps * restarts)
    return search_cost(steps * restarts, restarts, attack.draws(stochastic), stochastic)


def _last_iterates(
    target: Target, starts: Iterable[Tensor], images: Tensor, labels: Tensor, threat: Linf | L2,
    steps: int, step: float,
) -> Outcome:  # fmt: skip
    """Run PGD from each of `starts` to its end; return the last iterate of highest loss."""
    best, margins = images, torch.full_like(labels, torch.inf, dtype=torch.float32)
    highest = torch.full_like(margins, -torch.inf, dtype=torch.float64)
    spent = torch.zeros_like(labels)
    for start in starts:
        last = ascend(target, start, images, labels, threat, steps, step)
        with torch.no_grad():
            logits = target(last, steps)
        # The loss of NaN is NaN; such an image is fooled, so nothing is above it.
        loss = log_odds(logits, labels).nan_to_num(torch.inf, torch.inf, -torch.inf)
        better = (loss > highest) | (spent == 0)
        best = torch.where(better[:, None, None, None], last, best)
        margins = torch.where(better, margin(logits, labels).float(), margins)
        highest = torch.where(better, loss, highest)
        spent = spent + steps
    return Outcome(best, margins, spent)


def _multi_start(
    target: Target, starts: Iterable[Tensor], images: Tensor, labels: Tensor, threat: Linf | L2,
    steps: int, step: float,
) -> Outcome:  # fmt: skip
    """Run PGD from each of `starts`, always on the images that are not fooled yet."""
    search = Search(target, images, labels, threat, early_stop=True)
    for start in starts:
        search.restart()
        # Not every network takes a batch of no images.
        if not len(search.rows):
            break
        x = start[search.rows]
        for _ in range(steps):
            x, gradient = search.drop_fooled(x, search.evaluate(x, log_odds).gradient)
            if not len(search.rows):
                break
            x = search.project(threat.ascend(x, gradient, step * threat.eps))
        if len(search.rows):
            search.query(x)
    return search.outcome()


def ascend(
    target: Target, start: Tensor, images: Tensor, labels: Tensor, threat: Linf | L2,
    steps: int, step: float,
) -> Tensor:  # fmt: skip
    """Run bare PGD from `start` in the ball around `images`; return the last iterate.

    Adversarial training takes its attacks from here.
    """
    x, project = start, threat.ball(images)
    for query in range(steps):
        gradient = target.evaluate(x, labels, log_odds, query).gradient
        x = project(threat.ascend(x, gradient, step * threat.eps))
    return x


class Fgsm(Attack):
    """FGSM: one step of `step` times the radius, projected back onto the ball.

    The papers take `step` 1 from the image itself, and 1.25 from a random start (Wong et al. 2020).
    """

    early_stopping: ClassVar[bool] = True
    losses: ClassVar[tuple[LossFamily, ...]] = ("cross-entropy",)

    kind: Literal["fgsm"]
    random_start: bool
    step: Factor
    eot: Positive

    def effort(self, classes: int, stochastic: bool) -> Cost:
        """One gradient, and one query of the image after the step."""
        return search_cost(1, 1, self.draws(stochastic), stochastic)

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return the image after the step; the clean image where it is misclassified already."""
        start = threat.start(images, draws, "start") if self.random_start else images
        return _multi_start(target, [start], images, labels, threat, 1, self.step)


class RFgsm(Attack):
    """RAND+FGSM (Tramer et al. 2018): a random step, then a gradient step.

    The random step takes `alpha` of the radius, along the sign of Gaussian noise under L-inf and
    along the noise itself under L2. The gradient step takes the rest, so both stay in the ball.
    """

    early_stopping: ClassVar[bool] = True
    losses: ClassVar[tuple[LossFamily, ...]] = ("cross-entropy",)

    kind: Literal["r_fgsm"]
    alpha: Annotated[float, Field(gt=0, lt=1)]
    eot: Positive

    def effort(self, classes: int, stochastic: bool) -> Cost:
        """One gradient, and one query of the image after the step."""
        return search_cost(1, 1, self.draws(stochastic), stochastic)

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return the image of lowest margin: the clean one, or after one or both steps."""
        noise = draws.normal(tuple(images.shape[1:]), "start").to(images.dtype)
        start = threat.project(threat.ascend(images, noise, self.alpha * threat.eps), images)
        return _multi_start(target, [start], images, labels, threat, 1, 1 - self.alpha)


class Bim(Attack):
    """BIM: PGD from the image itself; `early_stop` as in `Pgd`."""

    early_stopping: ClassVar[bool] = True
    losses: ClassVar[tuple[LossFamily, ...]] = ("cross-entropy",)

    kind: Literal["bim"]
    steps: Positive
    step: Factor
    early_stop: bool
    eot: Positive

    def effort(self, classes: int, stochastic: bool) -> Cost:
        """One gradient per step, and one query of the last iterate."""
        return _climbing_cost(self, self.steps, 1, stochastic)

    def strong(self) -> bool:
        """Enough steps, which cross the ball and do not leap over it (`sound_steps`)."""
        return sound_steps(self.steps, self.step)

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return the iterate of lowest margin, or the last one."""
        climb = _multi_start if self.early_stop or target.stochastic else _last_iterates
        return climb(target, [images], images, labels, threat, self.steps, self.step)


def sound_steps(steps: int, step: float) -> bool:
    """Say whether PGD of `steps` steps of `step` radii is strong enough to carry a claim.

    There are at least ten. Together they are two radii long, so that from any start they reach the
    opposite edge of the ball. And none is longer than half a radius: from two radii on, every
    iterate is the corner that the last gradient names, and the search only bounces between corners.
    """
    enough = steps >= LEAST_STEPS and steps * step >= ACROSS - 1e-9
    return enough and step <= LONGEST_STEP


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log((1 - p) / p) per image (N,) in float64, p the probability of the true class.

    That is the logsumexp of the other logits minus the true one: the odds of a wrong answer.
    Attacks "on the cross-entropy" climb it. The cross-entropy is softplus(log odds), so it rises
    with the log odds, and its gradient is 1 - p times theirs: the same direction for each image.
    But 1 - p is rounded to zero in float32 once the true logit is about 17 above the others, and
    the gradient of the log odds does not vanish there.

    Where gradients of several draws are averaged (EOT), every draw has the same weight; the
    cross-entropy weighs a draw by 1 - p, which ignores those that are right with confidence. In
    float64, since differences of small logits vanish beside the log of the number of classes.
    """
    odds: Tensor = _LogOdds.apply(logits, labels[:, None])  # type: ignore[no-untyped-call]
    return odds


class _LogOdds(torch.autograd.Function):
    """The log odds with their derivative by hand: half of the operations of automatic ones.

    The derivative is the softmax over the other classes, and -1 at the true one.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, true: Tensor) -> Tensor:
        wide = logits.double()
        others = wide.scatter(1, true, -torch.inf)
        ctx.dtype = logits.dtype
        ctx.save_for_backward(others, true)
        return others.logsumexp(1) - wide.gather(1, true).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        others, true = ctx.saved_tensors
        slope = others.softmax(1).scatter_(1, true, -1).mul_(gradients[0][:, None])
        return slope.to(ctx.dtype), None
