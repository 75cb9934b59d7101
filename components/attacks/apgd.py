"""Auto-PGD (APGD; Croce and Hein 2020, algorithm 1): PGD that chooses its own step length.

It maximises the cross-entropy (`apgd_ce`, by way of the `log_odds`, which rise and fall with it),
the difference-of-logits ratio (`apgd_dlr`, equation 6), the targeted form of that ratio towards
each of `targets` runner-up classes (`apgd_t`, equation 7) or, beyond the paper, the bare difference
of logits (`apgd_margin`); with 100 steps these belong to AutoAttack. Written from the paper. The
random start is scaled to the surface of the ball, as in the authors' code, so that outcomes can be
compared.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

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
from components.attacks.gradient import log_odds
from components.attacks.search import Search, search_cost
from components.data.draws import Draws
from components.models.defense import Evaluation, Loss, Target, margin

# Maps rows of the batch to the loss of exactly these rows: a targeted loss differs between rows.
RowLoss = Callable[[Tensor], Loss]
# The paper's: weight of the new step beside the previous one, and the fraction of steps that must
# raise the loss for the step length to stay.
MOMENTUM = 0.75
RHO = 0.75


class _Apgd(Attack):
    """APGD on one loss, `restarts` runs of `steps` steps."""

    early_stopping: ClassVar[bool] = True

    steps: Positive
    restarts: Positive
    eot: Positive

    def effort(self, classes: int, stochastic: bool) -> Cost:
        """One gradient per start and per step."""
        gradients = self.restarts * (self.steps + 1)
        return search_cost(gradients, 0, self.draws(stochastic), stochastic)

    def strong(self) -> bool:
        """At least ten steps; the attack chooses their length itself."""
        return self.steps >= LEAST_STEPS

    def climbed(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return what the attack climbs, per image (N,)."""
        raise NotImplementedError

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return the iterate of lowest margin."""
        search = Search(target, images, labels, threat, early_stop=True)
        for restart in range(self.restarts):
            search.restart()
            start = _start(images, threat, draws.redraw(restart))
            _run_apgd(search, start[search.rows], self.steps, lambda rows: self.climbed)
        return search.outcome()


class ApgdCe(_Apgd):
    """APGD on the cross-entropy."""

    losses: ClassVar[tuple[LossFamily, ...]] = ("cross-entropy",)

    kind: Literal["apgd_ce"]

    def climbed(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the log odds (N,), which rise and fall with the cross-entropy."""
        return log_odds(logits, labels)


class ApgdDlr(_Apgd):
    """APGD on the DLR loss, which does not change if the logits are scaled or shifted.

    Raises ValueError with fewer than three classes.
    """

    losses: ClassVar[tuple[LossFamily, ...]] = ("margin",)

    kind: Literal["apgd_dlr"]

    def climbed(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the `dlr` (N,)."""
        return dlr(logits, labels)


class ApgdMargin(_Apgd):
    """APGD on the largest other logit less the true one.

    AutoAttack runs it on two and three classes, which have no targeted DLR loss.
    """

    losses: ClassVar[tuple[LossFamily, ...]] = ("margin",)

    kind: Literal["apgd_margin"]

    def climbed(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the negative margin (N,)."""
        return -margin(logits, labels)


class ApgdT(Attack):
    """APGD on the targeted DLR loss: one run per target class, the most likely classes first.

    Raises ValueError with fewer than four classes or with more than K - 1 `targets`.
    """

    early_stopping: ClassVar[bool] = True
    losses: ClassVar[tuple[LossFamily, ...]] = ("margin",)

    kind: Literal["apgd_t"]
    steps: Positive
    targets: Annotated[int, Field(ge=1)]
    eot: Positive

    def effort(self, classes: int, stochastic: bool) -> Cost:
        """One gradient per start and per step, and one pass to rank the classes."""
        gradients = self.targets * (self.steps + 1)
        return search_cost(gradients, 0, self.draws(stochastic), stochastic) + Cost(1, 0)

    def strong(self) -> bool:
        """At least ten steps; the attack chooses their length itself."""
        return self.steps >= LEAST_STEPS

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return the iterate of lowest margin."""
        search = Search(target, images, labels, threat, early_stop=True)
        with torch.no_grad():
            logits = target(images, 0)
        classes = logits.shape[1]
        if classes < 4 or self.targets > classes - 1:
            raise ValueError(
                f"apgd_t needs 4 classes and at most {classes - 1} targets here, "
                f"but has {classes} classes and targets: {self.targets}"
            )
        ranked = runners_up(logits, labels)
        starts = torch.stack(
            [_start(images, threat, draws.redraw(index)) for index in range(self.targets)]
        )
        for runs, of, index in search.copies(self.targets):
            _run_apgd(runs, starts[index, of], self.steps, _targeted_loss(ranked[of, index]))
        return search.outcome()


@dataclass
class _State:
    """The state of one APGD run over its n active rows.

    `x`, `previous`, `top` (best so far) and their gradients are (n,C,H,W), `step` (n,1,1,1), losses
    and counters (n,). `rises` counts the steps since the last checkpoint that raised the loss;
    `halved` and `checked_loss` are what that checkpoint decided and saw.
    """

    x: Tensor
    previous: Tensor
    gradient: Tensor
    loss: Tensor
    top: Tensor
    top_gradient: Tensor
    top_loss: Tensor
    step: Tensor
    rises: Tensor
    checked_loss: Tensor
    halved: Tensor

    def drop_fooled(self, search: Search) -> None:
        """Keep only the rows that the search keeps."""
        kept = search.drop_fooled(*(getattr(self, field.name) for field in fields(self)))
        for field, tensor in zip(fields(self), kept, strict=True):
            setattr(self, field.name, tensor)

    def follow(self, found: Evaluation) -> None:
        """Take over what was found at `x`."""
        higher = found.loss > self.top_loss
        self.rises += found.loss > self.loss
        self.loss, self.gradient = found.loss, found.gradient
        self.top_loss = torch.where(higher, found.loss, self.top_loss)
        higher = higher[:, None, None, None]
        self.top = torch.where(higher, self.x, self.top)
        self.top_gradient = torch.where(higher, found.gradient, self.top_gradient)


def _start(images: Tensor, threat: Linf | L2, draws: Draws) -> Tensor:
    """Return random images on the surface of the balls around `images` (N,C,H,W)."""
    way = random_direction(threat, draws, images, "apgd")
    return threat.project(images + threat.eps * way, images)


def _run_apgd(search: Search, x: Tensor, steps: int, loss_for: RowLoss) -> None:
    """Run APGD once from `x` over the active rows of `search`, which records every iterate."""
    if not len(search.rows):
        return
    state = _begin(search, x, loss_for)
    checkpoints, since = _checkpoints(steps), 0
    for iteration in range(steps):
        state.drop_fooled(search)
        if not len(search.rows):
            return
        _move(state, search, 1.0 if iteration == 0 else MOMENTUM)
        state.follow(search.evaluate(state.x, loss_for(search.rows)))
        since += 1
        if iteration + 1 in checkpoints:
            _halve_steps(state, since)
            since = 0


def _begin(search: Search, x: Tensor, loss_for: RowLoss) -> _State:
    """Evaluate the start."""
    found = search.evaluate(x, loss_for(search.rows))
    count = len(x)
    return _State(
        x=x,
        previous=x,
        gradient=found.gradient,
        loss=found.loss,
        top=x,
        top_gradient=found.gradient,
        top_loss=found.loss,
        step=torch.full((count, 1, 1, 1), 2 * search.threat.eps, device=x.device, dtype=x.dtype),
        rises=torch.zeros(count, device=x.device),
        checked_loss=found.loss,
        halved=torch.ones(count, dtype=torch.bool, device=x.device),
    )


def _move(state: _State, search: Search, momentum: float) -> None:
    """Take a projected gradient step with momentum (algorithm 1)."""
    stepped = search.project(search.threat.ascend(state.x, state.gradient, state.step))
    moved = torch.add(state.x, stepped - state.x, alpha=momentum)
    if momentum < 1:
        moved = moved.add_(state.x - state.previous, alpha=1 - momentum)
    state.previous, state.x = state.x, search.project(moved)


def _halve_steps(state: _State, since: int) -> None:
    """At a checkpoint, `since` steps after the last: halve the step of every row that has stalled.

    Such a row also goes back to its best iterate. It has stalled if the loss rose in at most RHO of
    the steps (condition 1), or if the step was not halved at the last checkpoint and the best loss
    has not risen since (condition 2).
    """
    stalled = ~state.halved & (state.checked_loss >= state.top_loss)
    halve = (state.rises <= RHO * since) | stalled
    back = halve[:, None, None, None]
    state.step = torch.where(back, state.step / 2, state.step)
    state.x = torch.where(back, state.top, state.x)
    state.gradient = torch.where(back, state.top_gradient, state.gradient)
    state.halved, state.checked_loss = halve, state.top_loss
    state.rises = torch.zeros_like(state.rises)


def _checkpoints(steps: int) -> set[int]:
    """Return the iterations after which the step length is reconsidered (the paper's w_j)."""
    interval, shortest, shrink = (max(int(fraction * steps), 1) for fraction in (0.22, 0.06, 0.03))
    points, at = set(), interval
    while at <= steps:
        points.add(at)
        interval = max(interval - shrink, shortest)
        at += interval
    return points


def random_direction(threat: Linf | L2, draws: Draws, origin: Tensor, use: str) -> Tensor:
    """Return random perturbations (N,C,H,W) of length one in the norm of the threat."""
    shape = tuple(origin.shape[1:])
    if isinstance(threat, Linf):
        noise = 2 * draws.uniform(shape, use).to(origin.dtype) - 1
        return noise / noise.flatten(1).abs().amax(1)[:, None, None, None]
    noise = draws.normal(shape, use).to(origin.dtype)
    lengths: Tensor = noise.flatten(1).norm(dim=1)
    return noise / lengths[:, None, None, None]


def runners_up(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the classes (N,K) by falling logit, the true class last."""
    return logits.scatter(1, labels[:, None], -torch.inf).argsort(1, descending=True)


def _targeted_loss(classes: Tensor) -> RowLoss:
    """Return `targeted_dlr` towards `classes` (N,), one for each row of the batch."""

    def loss_for(rows: Tensor) -> Loss:
        return lambda logits, labels: targeted_dlr(logits, labels, classes[rows])

    return loss_for


def targeted_dlr(logits: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
    """Return -(z_y - z_t) / (z_1 - (z_3 + z_4) / 2) per image (N,), t in `classes` (N,).

    z_k is the k-th largest logit. Croce and Hein 2020, equation 7.
    """
    first, _, third, fourth = logits.topk(4).values.unbind(1)
    true = logits.gather(1, labels[:, None]).squeeze(1)
    other = logits.gather(1, classes[:, None]).squeeze(1)
    return (other - true) / _or_one(first - (third + fourth) / 2)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -(z_y - max of the others) / (z_1 - z_3) per image (N,), z_k the k-th largest logit.

    Croce and Hein 2020, equation 6. Raises ValueError with fewer than three classes.
    """
    if logits.shape[1] < 3:
        raise ValueError(f"apgd_dlr needs 3 classes, but the classifier has {logits.shape[1]}")
    first, _, third = logits.topk(3).values.unbind(1)
    return -margin(logits, labels) / _or_one(first - third)


def _or_one(spread: Tensor) -> Tensor:
    """Return `spread` (N,), and 1 where it is zero because the largest logits are equal.

    The authors add 1e-12 instead, which is not small beside small logits.
    """
    return torch.where(spread > 0, spread, 1)
