"""Targeted FAB (Croce and Hein 2020, "Minimally distorted adversarial examples with a fast adaptive
boundary attack", algorithm 1): the nearest image across the boundary to each of several classes.

Every iteration takes the boundary between the true class and the one aimed at for the plane it
looks like from here, and goes to that plane within [0,1], with a bias towards the point of it
nearest the clean image. FAB minimises a distance; what counts here is only what it finds inside
the threat, so an image that is fooled there is left alone, and no other is returned.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from components.attacks.apgd import direction, runners_up
from components.attacks.contract import L2, Attack, Linf, Outcome, Positive, Search
from components.data.draws import Draws
from components.models.defense import Evaluation, Loss, Target

# The paper's: largest bias, overshoot, backward step, and steps of the final search.
ALPHA_MAX = 0.1
ETA = 1.05
BETA = 0.9
REFINEMENTS = 3
# Ours: how much of the way that is left the final search goes past the boundary it expects. On the
# boundary itself, which networks of ReLUs let it hit, rounding would decide what is fooled.
PAST = 0.1


class FabT(Attack):
    """FAB towards the `targets` likeliest other classes, `restarts` runs of `steps` each.

    The first run starts at the image, further ones at random. Needs a deterministic defense and
    `targets` below K, else ValueError.
    """

    stopping: ClassVar[bool] = True

    kind: Literal["fab_t"]
    steps: Positive
    targets: Positive
    restarts: Positive

    def effort(self) -> int:
        """Every step of every run is one pass."""
        return self.targets * self.restarts * self.steps

    def strong(self) -> bool:
        """Ten steps at least; how far they reach is the attack's own choice."""
        return self.steps >= 10

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return the image of lowest margin inside the threat."""
        if target.stochastic:
            raise ValueError("fab_t follows a boundary that stands still: not for random defenses")
        search = _Inside(target, images, labels, threat)
        with torch.no_grad():
            logits = target(images, 0)
        if self.targets > logits.shape[1] - 1:
            raise ValueError(
                f"fab_t needs at most {logits.shape[1] - 1} targets here, "
                f"but has targets: {self.targets}"
            )
        aims, clean = runners_up(logits, labels), search.margin.clone()
        for run in range(self.targets * self.restarts):
            aim, restart = divmod(run, self.restarts)
            search.restart()
            start = _start(images, threat, draws.redraw(run)) if restart else images
            crossing = _follow(search, start, aims[:, aim], self.steps)
            _refine(search, crossing, clean)
        return search.outcome()


class _Inside(Search):
    """A search that keeps nothing from outside the threat."""

    def __init__(self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2) -> None:
        self.threat = threat
        super().__init__(target, images, labels, drop=True)

    def _keep(self, x: Tensor, margin: Tensor) -> None:
        outside = self.threat.distance(x, self.origin) > self.threat.eps
        super()._keep(x, margin.masked_fill(outside, torch.inf))


class _Crossing:
    """The nearest fooling image of every row of the batch in one run, wherever it lies."""

    def __init__(self, images: Tensor) -> None:
        self.images = images.clone()
        self.margin = torch.zeros(len(images), device=images.device)
        self.distance = torch.full_like(self.margin, torch.inf, dtype=torch.float64)

    def update(self, rows: Tensor, x: Tensor, margin: Tensor, distance: Tensor) -> None:
        nearer = distance < self.distance[rows]
        rows = rows[nearer]
        self.images[rows], self.distance[rows] = x[nearer], distance[nearer]
        self.margin[rows] = margin[nearer].float()


def _start(images: Tensor, threat: Linf | L2, draws: Draws) -> Tensor:
    """Return random images half a radius away.

    The paper halves the distance of the nearest crossing where that is smaller, but an image with
    a crossing inside the threat is not attacked again.
    """
    return (images + threat.eps / 2 * direction(threat, draws, images, "fab")).clamp(0, 1)


def _follow(search: _Inside, start: Tensor, aims: Tensor, steps: int) -> _Crossing:
    """Run FAB once over the rows at work, towards classes `aims` (N,)."""
    crossing, x = _Crossing(search.images), start[search.rows]
    for _ in range(steps):
        x = x[search.alive()]
        if not len(search.rows):
            break
        seen = search.evaluate(x, _lead(aims[search.rows]))
        x = _step(x, search.origin, seen, torch.inf if isinstance(search.threat, Linf) else 2.0)
        margin = search.query(x)
        # `not (margin > 0)`, so that NaN counts as fooled.
        crossed = ~(margin > 0)
        distance = search.threat.distance(x, search.origin)
        crossing.update(search.rows, x, margin, distance.where(crossed, torch.inf))
        back = torch.lerp(search.origin, x, BETA)
        x = torch.where(crossed[:, None, None, None], back, x)
    return crossing


def _lead(aims: Tensor) -> Loss:
    """Return how far the logits of `aims` lead those of the true class: 0 at their boundary."""

    def lead(logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.gather(1, aims[:, None]) - logits.gather(1, labels[:, None])).squeeze(1)

    return lead


def _step(x: Tensor, origin: Tensor, seen: Evaluation, order: float) -> Tensor:
    """Overstep the plane where `lead` would be 0, from `x` and, less weighted, from `origin`."""
    slope, lead = seen.gradient, seen.loss.to(x.dtype)
    there = lead + (slope * (origin - x)).flatten(1).sum(1)
    step = to_plane(x, slope, -lead, order)
    from_origin = to_plane(origin, slope, -there, order)
    near, far = (
        torch.linalg.vector_norm(delta, order, dim=(1, 2, 3), keepdim=True)
        for delta in (step, from_origin)
    )
    bias = (near / (near + far).clamp_min(1e-12)).clamp(max=ALPHA_MAX)
    return torch.lerp(x + ETA * step, origin + ETA * from_origin, bias).clamp(0, 1)


def to_plane(x: Tensor, slope: Tensor, rise: Tensor, order: float) -> Tensor:
    """Return the shortest steps d, in the norm of `order` 2 or infinity, with <slope, d> = `rise`
    (N,) and x + d in [0,1]; where that box does not reach the plane, to its corner nearest to it.

    Pixel i moves by min(t * speed_i, room_i), speed being 1 (infinity) or |slope_i| (2), so the
    rise is a concave, piecewise linear function of t: Newton's method climbs it from 0 without
    ever passing the root, and is exact after a few segments (the paper sorts the segments). Slopes
    or rises that are not numbers point nowhere, and move nothing.
    """
    weight = slope.flatten(1).abs()
    scale = weight.amax(1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    weight, rise = weight / scale, rise[:, None] / scale
    way = slope.flatten(1).sign() * rise.sign()
    room = torch.where(way > 0, 1 - x.flatten(1), x.flatten(1))
    speed = torch.ones_like(weight) if order == torch.inf else weight
    full, pace, t = weight * room, weight * speed, torch.zeros_like(rise)
    while True:
        free = t * speed < room
        missing = rise.abs() - full.masked_fill(free, 0).sum(1, keepdim=True)
        root = missing / pace.masked_fill(~free, 0).sum(1, keepdim=True)
        further = root > t
        if not bool(further.any()):
            return (way * torch.where(free, t * speed, room)).reshape(x.shape)
        t = torch.where(further, root, t)


def _refine(search: _Inside, crossing: _Crossing, clean: Tensor) -> None:
    """Search the segment between the clean image, of margin `clean`, and the nearest crossing.

    The paper's equation 10 interpolates the lead of the class found at the far end; this takes the
    margin, which is the same at that end and zero at the first boundary met, whichever it is, and
    goes a little further.
    """
    search.alive()
    search.rows = search.rows[crossing.distance[search.rows].isfinite()]
    if not len(search.rows):
        return
    near, far = search.origin, crossing.images[search.rows]
    above, below = clean[search.rows], crossing.margin[search.rows]
    for _ in range(REFINEMENTS):
        share = (above / (above - below)).nan_to_num(0.5)
        share += PAST * (1 - share)
        x = torch.lerp(near, far, share[:, None, None, None]).clamp(0, 1)
        margin = search.query(x).float()
        crossed = ~(margin > 0)
        inner = crossed[:, None, None, None]
        near, far = torch.where(inner, near, x), torch.where(inner, x, far)
        above, below = torch.where(crossed, above, margin), torch.where(crossed, margin, below)
