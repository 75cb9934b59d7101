"""Auto-PGD (Croce and Hein 2020, algorithm 1): the step length is chosen by the attack itself.

It climbs the cross-entropy (`apgd_ce`), the difference-of-logits ratio (`apgd_dlr`) or, towards
each of `targets` runner-up classes, the targeted form of that ratio (`apgd_t`); with 100 steps
these are parts of AutoAttack. Written from the paper; the random start is scaled to the surface of
the ball, as in the authors' code, so that outcomes can be compared.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from components.attacks.contract import L2, Attack, Linf, Outcome, Positive, Search
from components.attacks.gradient import cross_entropy
from components.data.draws import Draws
from components.models.defense import Loss, Target, margin

LossOf = Callable[[Tensor], Loss]  # rows of the batch -> the loss of exactly these rows
MOMENTUM = 0.75
RHO = 0.75


class ApgdCe(Attack):
    """APGD on the cross-entropy."""

    stopping: ClassVar[bool] = True

    kind: Literal["apgd_ce"]
    steps: Positive
    restarts: Positive
    eot: Positive

    def effort(self) -> int:
        """Every start and every step is one pass."""
        return self.restarts * (self.steps + 1)

    def strong(self) -> bool:
        """Ten steps at least; how far they reach is the attack's own choice."""
        return self.steps >= 10

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return the image of lowest margin."""
        search = Search(target, images, labels, drop=True)
        return _climb(search, threat, draws, self.steps, self.restarts, cross_entropy)


class ApgdDlr(Attack):
    """APGD on the DLR loss, which knows neither the scale nor the shift of the logits.

    Needs three classes, else ValueError.
    """

    stopping: ClassVar[bool] = True

    kind: Literal["apgd_dlr"]
    steps: Positive
    restarts: Positive
    eot: Positive

    def effort(self) -> int:
        """Every start and every step is one pass."""
        return self.restarts * (self.steps + 1)

    def strong(self) -> bool:
        """Ten steps at least; how far they reach is the attack's own choice."""
        return self.steps >= 10

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return the image of lowest margin."""
        search = Search(target, images, labels, drop=True)
        return _climb(search, threat, draws, self.steps, self.restarts, dlr)


class ApgdT(Attack):
    """APGD on the targeted DLR loss, one run per target class, the likeliest classes first.

    Needs four classes; `targets` beyond K - 1 is a ValueError.
    """

    stopping: ClassVar[bool] = True

    kind: Literal["apgd_t"]
    steps: Positive
    targets: Annotated[int, Field(ge=1)]
    eot: Positive

    def effort(self) -> int:
        """Every start and every step is one pass."""
        return self.targets * (self.steps + 1)

    def strong(self) -> bool:
        """Ten steps at least; how far they reach is the attack's own choice."""
        return self.steps >= 10

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return the image of lowest margin."""
        search = Search(target, images, labels, drop=True)
        with torch.no_grad():
            logits = target(images, 0)
        classes = logits.shape[1]
        if classes < 4 or self.targets > classes - 1:
            raise ValueError(
                f"apgd_t needs 4 classes and at most {classes - 1} targets here, "
                f"but has {classes} classes and targets: {self.targets}"
            )
        aims = runners_up(logits, labels)
        for index in range(self.targets):
            search.restart()
            loss_of = _towards(aims[:, index])
            _ascend(search, threat, draws.redraw(index), self.steps, loss_of)
        return search.outcome()


@dataclass
class _State:
    """One APGD run, row by row: iterates (n,C,H,W), and losses, steps and counters (n,)."""

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

    def keep(self, rows: Tensor) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[rows])


def _climb(
    search: Search, threat: Linf | L2, draws: Draws, steps: int, restarts: int, loss: Loss
) -> Outcome:
    for restart in range(restarts):
        search.restart()
        _ascend(search, threat, draws.redraw(restart), steps, lambda rows: loss)
    return search.outcome()


def _ascend(search: Search, threat: Linf | L2, draws: Draws, steps: int, loss_of: LossOf) -> None:
    """Run APGD once over the rows at work; what it finds is kept by `search`."""
    if not len(search.rows):
        return
    state = _begin(search, threat, draws[search.rows], loss_of)
    checkpoints, since = _checkpoints(steps), 0
    for iteration in range(steps):
        state.keep(search.alive())
        if not len(search.rows):
            return
        _move(state, threat, search.origin, 1.0 if iteration == 0 else MOMENTUM)
        seen = search.evaluate(state.x, loss_of(search.rows))
        state.rises += seen.loss > state.loss
        state.loss, state.gradient = seen.loss, seen.gradient
        higher = seen.loss > state.top_loss
        for top, now in ((state.top, state.x), (state.top_gradient, seen.gradient)):
            top[higher] = now[higher]
        state.top_loss = torch.maximum(state.top_loss, seen.loss)
        since += 1
        if iteration + 1 in checkpoints:
            _halve(state, since)
            since = 0


def _begin(search: Search, threat: Linf | L2, draws: Draws, loss_of: LossOf) -> _State:
    origin = search.origin
    x = threat.project(origin + threat.eps * direction(threat, draws, origin, "apgd"), origin)
    seen = search.evaluate(x, loss_of(search.rows))
    count = len(x)
    zeros = torch.zeros(count, device=x.device)
    return _State(
        x=x,
        previous=x.clone(),
        gradient=seen.gradient,
        loss=seen.loss,
        top=x.clone(),
        top_gradient=seen.gradient.clone(),
        top_loss=seen.loss.clone(),
        step=torch.full((count, 1, 1, 1), 2 * threat.eps, device=x.device, dtype=x.dtype),
        rises=zeros.clone(),
        checked_loss=seen.loss.clone(),
        halved=torch.ones(count, dtype=torch.bool, device=x.device),
    )


def _move(state: _State, threat: Linf | L2, origin: Tensor, momentum: float) -> None:
    stepped = threat.project(threat.ascend(state.x, state.gradient, state.step), origin)
    inertia = (1 - momentum) * (state.x - state.previous)
    moved = state.x + momentum * (stepped - state.x) + inertia
    state.previous, state.x = state.x, threat.project(moved, origin)


def _halve(state: _State, since: int) -> None:
    """At a checkpoint: where progress stalled, halve the step and go back to the best iterate.

    Condition 1: the loss rose in at most RHO of the steps. Condition 2: the step was not halved
    last time, and still the best loss did not improve.
    """
    stalled = ~state.halved & (state.checked_loss >= state.top_loss)
    halve = (state.rises <= RHO * since) | stalled
    state.step[halve] /= 2
    state.x = torch.where(halve[:, None, None, None], state.top, state.x)
    state.gradient = torch.where(halve[:, None, None, None], state.top_gradient, state.gradient)
    state.halved = halve
    state.checked_loss = state.top_loss.clone()
    state.rises = torch.zeros_like(state.rises)


def _checkpoints(steps: int) -> set[int]:
    """Return the iterations after which the step is reconsidered (the paper's p_j, in steps)."""
    interval, shortest, shrink = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    points, at = set(), interval
    while at <= steps:
        points.add(at)
        interval = max(interval - shrink, shortest)
        at += interval
    return points


def direction(threat: Linf | L2, draws: Draws, origin: Tensor, use: str) -> Tensor:
    """Return random differences (N,C,H,W) of length one in the norm of the threat."""
    shape = tuple(origin.shape[1:])
    if isinstance(threat, Linf):
        noise = 2 * draws.uniform(shape, use).to(origin.dtype) - 1
        return noise / noise.flatten(1).abs().amax(1)[:, None, None, None]
    noise = draws.normal(shape, use).to(origin.dtype)
    lengths: Tensor = noise.flatten(1).norm(dim=1)
    return noise / lengths[:, None, None, None]


def runners_up(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the classes (N,K), likeliest first; the true one comes last."""
    return logits.scatter(1, labels[:, None], -torch.inf).argsort(1, descending=True)


def _towards(aims: Tensor) -> LossOf:
    """Croce and Hein 2020, equation 7, towards class `aims` (N,): see `targeted_dlr`."""

    def loss_of(rows: Tensor) -> Loss:
        return lambda logits, labels: targeted_dlr(logits, labels, aims[rows])

    return loss_of


def targeted_dlr(logits: Tensor, labels: Tensor, aims: Tensor) -> Tensor:
    """Return -(z_y - z_t) / (z_1 - (z_3 + z_4) / 2) per image (N,), z_k the k-th largest logit."""
    ordered = logits.sort(dim=1, descending=True).values
    true = logits.gather(1, labels[:, None]).squeeze(1)
    aim = logits.gather(1, aims[:, None]).squeeze(1)
    return -(true - aim) / (ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2 + 1e-12)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -(z_y - max of the others) / (z_1 - z_3) per image (N,), z_k the k-th largest logit.

    Croce and Hein 2020, equation 6. Raises ValueError with fewer than three classes.
    """
    if logits.shape[1] < 3:
        raise ValueError(f"apgd_dlr needs 3 classes, but the classifier has {logits.shape[1]}")
    ordered = logits.sort(dim=1, descending=True).values
    return -margin(logits, labels) / (ordered[:, 0] - ordered[:, 2] + 1e-12)
