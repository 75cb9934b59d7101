"""Targeted FAB (Croce and Hein 2020, "Minimally distorted adversarial examples with a fast adaptive
boundary attack", algorithm 1): the nearest image across the boundary to each of several classes.

Every iteration linearises the boundary between the true class and the target class, and steps to
that plane within [0,1], with a bias towards the point of the plane nearest to the clean image. FAB
minimises a distance, but here only images inside the threat count: an image that is fooled inside
it is left alone, and nothing outside it is returned.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from components.attacks.apgd import random_direction, runners_up
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
from components.models.defense import Evaluation, Loss, Target

# The paper's constants: largest bias, overshoot, backward step, and steps of the final search.
ALPHA_MAX = 0.1
ETA = 1.05
BETA = 0.9
REFINEMENTS = 3
# Ours: the final search goes past the boundary it predicts, by this fraction of the remaining
# distance. It can hit the boundary of a ReLU network exactly, where rounding would decide.
PAST = 0.1


class FabT(Attack):
    """FAB towards each of the `targets` most likely other classes, `restarts` runs of `steps`.

    The first run starts at the image, further ones at random. `final_search`: each run ends
    with the paper's search on the way to its nearest crossing. Raises ValueError for a stochastic
    defense and for more than K - 1 `targets`.
    """

    early_stopping: ClassVar[bool] = True
    final_search: ClassVar[bool] = True
    losses: ClassVar[tuple[LossFamily, ...]] = ("margin",)

    kind: Literal["fab_t"]
    steps: Positive
    targets: Positive
    restarts: Positive

    def effort(self, classes: int, stochastic: bool) -> Cost:
        """One gradient and one query per step of every run, and one pass to rank the classes.

        The last search, for a boundary that was crossed outside the ball, comes on top.
        """
        steps = self.targets * self.restarts * self.steps
        return search_cost(steps, steps, 1, False) + Cost(1, 0)

    def require_fit(self, stochastic: bool) -> None:
        """Raise ValueError for a stochastic target."""
        if stochastic:
            raise ValueError("fab_t needs a fixed decision boundary: not for stochastic defenses")

    def strong(self) -> bool:
        """At least ten steps; the attack chooses their length itself."""
        return self.steps >= LEAST_STEPS

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return the image of lowest margin inside the threat."""
        self.require_fit(target.stochastic)
        search = BoundedSearch(target, images, labels, threat, early_stop=True)
        with torch.no_grad():
            logits = target(images, 0)
        if self.targets > logits.shape[1] - 1:
            raise ValueError(
                f"fab_t needs at most {logits.shape[1] - 1} targets here, "
                f"but has targets: {self.targets}"
            )
        ranked, clean = runners_up(logits, labels), search.margin.clone()
        for restart in range(self.restarts):
            starts = images.expand(self.targets, *images.shape)
            if restart:
                runs = range(restart, self.targets * self.restarts, self.restarts)
                starts = torch.stack(
                    [_random_start(images, threat, draws.redraw(run)) for run in runs]
                )
            search.restart()
            for copies, of, index in search.copies(self.targets):
                crossing = _run_fab(copies, starts[index, of], ranked[of, index], self.steps)
                if self.final_search:
                    _final_search(copies, crossing, clean[of])
        return search.outcome()


class BoundedSearch(Search):
    """A search that keeps no image from outside the threat."""

    def record(self, x: Tensor, margin: Tensor) -> None:
        """Count a query; record only the images inside the threat."""
        outside = self.threat.distance(x, self.origin) > self.threat.eps
        super().record(x, margin.masked_fill(outside, torch.inf))


class _Crossing:
    """The nearest fooling image of every row in one run, inside the threat or not."""

    def __init__(self, images: Tensor) -> None:
        self.images = images.clone()
        self.margin = torch.zeros(len(images), device=images.device)
        self.distance = torch.full_like(self.margin, torch.inf, dtype=torch.float64)

    def update(self, rows: Tensor, x: Tensor, margin: Tensor, distance: Tensor) -> None:
        """Keep those of `x`, the images of `rows`, that are nearer; infinite: does not fool."""
        nearer = distance < self.distance[rows]
        rows = rows[nearer]
        self.images[rows], self.distance[rows] = x[nearer], distance[nearer]
        self.margin[rows] = margin[nearer].float()


def _random_start(images: Tensor, threat: Linf | L2, draws: Draws) -> Tensor:
    """Return random images at half a radius from the clean ones.

    The paper takes half the distance to the nearest crossing if that is less than half a radius;
    but here an image with a crossing inside the threat is not attacked again.
    """
    return (images + threat.eps / 2 * random_direction(threat, draws, images, "fab")).clamp(0, 1)


def _run_fab(search: Search, start: Tensor, classes: Tensor, steps: int) -> _Crossing:
    """Run FAB once over the active rows of `search` from `start` (N,C,H,W), towards `classes` (N,).

    Both are those of all rows.
    """
    crossing, x = _Crossing(search.images), start[search.rows]
    for _ in range(steps):
        (x,) = search.drop_fooled(x)
        if not len(search.rows):
            break
        found = search.evaluate(x, _lead(classes[search.rows]))
        x = _step(x, search.origin, found, torch.inf if isinstance(search.threat, Linf) else 2.0)
        margin = search.query(x)
        # Written as `not (margin > 0)`, so that NaN counts as fooled.
        crossed = ~(margin > 0)
        distance = search.threat.distance(x, search.origin)
        crossing.update(search.rows, x, margin, distance.where(crossed, torch.inf))
        back = torch.lerp(search.origin, x, BETA)
        x = torch.where(crossed[:, None, None, None], back, x)
    return crossing


def _lead(classes: Tensor) -> Loss:
    """Return the loss: the logit of `classes` (N,) less the true one, 0 at their boundary."""

    def lead(logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.gather(1, classes[:, None]) - logits.gather(1, labels[:, None])).squeeze(1)

    return lead


def _step(x: Tensor, origin: Tensor, found: Evaluation, order: float) -> Tensor:
    """Step past the plane where the linearised lead is 0; combine the steps from `x` and `origin`.

    `order` is that of the norm: 2 or infinity.
    """
    slope, lead = found.gradient, found.loss.to(x.dtype)
    at_origin = lead + (slope * (origin - x)).flatten(1).sum(1)
    step = to_plane(x, slope, -lead, order)
    from_origin = to_plane(origin, slope, -at_origin, order)
    near, far = (
        torch.linalg.vector_norm(delta, order, dim=(1, 2, 3), keepdim=True)
        for delta in (step, from_origin)
    )
    bias = (near / (near + far).clamp_min(1e-12)).clamp(max=ALPHA_MAX)
    return torch.lerp(x + ETA * step, origin + ETA * from_origin, bias).clamp(0, 1)


def to_plane(x: Tensor, slope: Tensor, rise: Tensor, order: float) -> Tensor:
    """Project `x` (N,C,H,W) onto a plane within the box [0,1]; return the steps d.

    They are the shortest, in the norm of `order` 2 or infinity, with <`slope`, d> = `rise` (N,) and
    x + d in [0,1]. Where the box does not reach the plane, they lead to the corner nearest to it.

    Pixel i moves by min(t * speed_i, room_i), where speed_i is 1 (infinity) or |slope_i| (2), so
    the rise is a concave, piecewise linear function of t. Newton's method from t = 0 never passes
    the root and is exact after a few segments (the paper sorts the segments instead). A slope or
    rise that is not finite moves nothing.
    """
    weight = slope.flatten(1).abs()
    scale = weight.amax(1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    weight, rise = weight / scale, rise[:, None] / scale
    sign = slope.flatten(1).sign() * rise.sign()
    room = torch.where(sign > 0, 1 - x.flatten(1), x.flatten(1))
    speed = torch.ones_like(weight) if order == torch.inf else weight
    full, pace, t = weight * room, weight * speed, torch.zeros_like(rise)
    while True:
        free = t * speed < room
        missing = rise.abs() - full.masked_fill(free, 0).sum(1, keepdim=True)
        root = missing / pace.masked_fill(~free, 0).sum(1, keepdim=True)
        further = root > t
        if not bool(further.any()):
            return (sign * torch.where(free, t * speed, room)).reshape(x.shape)
        t = torch.where(further, root, t)


def _final_search(search: Search, crossing: _Crossing, clean: Tensor) -> None:
    """Search the segment from the clean image, whose margin is `clean` (N,), to the crossing.

    The paper's equation 10 interpolates the lead of the class found at the far end. This takes the
    margin instead, which is the same there and zero at the first boundary on the way, and goes
    `PAST` that boundary.
    """
    search.drop_fooled()
    search.select(crossing.distance[search.rows].isfinite())
    if not len(search.rows):
        return
    near, far = search.origin, crossing.images[search.rows]
    above, below = clean[search.rows], crossing.margin[search.rows]
    for _ in range(REFINEMENTS):
        fraction = (above / (above - below)).nan_to_num(0.5)
        fraction += PAST * (1 - fraction)
        x = torch.lerp(near, far, fraction.to(near.dtype)[:, None, None, None]).clamp(0, 1)
        margin = search.query(x).float()
        crossed = ~(margin > 0)
        inner = crossed[:, None, None, None]
        near, far = torch.where(inner, near, x), torch.where(inner, x, far)
        above, below = torch.where(crossed, above, margin), torch.where(crossed, margin, below)
