"""What an attack is: a section that, given a target, images and labels, returns one image each.

An attack minimises the margin of the true class and reports what it found; it never grades
itself. Two rules hold for all: against a deterministic target an image may be left alone once it
is fooled (`early_stop`), against a stochastic one never, since one lucky draw is no success.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from components.config import Config
from components.defense import Evaluation, Loss, Target
from components.draws import Draws

Positive = Annotated[int, Field(ge=1)]


class Linf(Config):
    """Every pixel may move by `eps_255` / 255."""

    norm: Literal["linf"]
    eps_255: Annotated[float, Field(gt=0, le=255)]

    @property
    def eps(self) -> float:
        """The radius in [0,1] units."""
        return self.eps_255 / 255

    def project(self, x: Tensor, origin: Tensor) -> Tensor:
        """Return the nearest image to `x` (N,C,H,W) in the ball around `origin` and in [0,1]."""
        return torch.minimum(torch.maximum(x, origin - self.eps), origin + self.eps).clamp(0, 1)

    def ascend(self, x: Tensor, gradient: Tensor, step: Tensor | float) -> Tensor:
        """Move `x` by `step` along the steepest direction of this norm."""
        return x + step * gradient.sign()

    def start(self, origin: Tensor, draws: Draws, use: str) -> Tensor:
        """Return a uniformly random image of the ball."""
        noise = 2 * draws.uniform(tuple(origin.shape[1:]), use).to(origin.dtype) - 1
        return self.project(origin + self.eps * noise, origin)

    def distance(self, x: Tensor, origin: Tensor) -> Tensor:
        """Return the distances (N,) in float64."""
        return (x.double() - origin.double()).abs().flatten(1).amax(1)

    def scaled(self, factor: float) -> "Linf":
        """Return the ball of `factor` times the radius, at most the whole image space."""
        return Linf(norm="linf", eps_255=min(self.eps_255 * factor, 255.0))


class L2(Config):
    """The image may move by `eps_l2` in Euclidean distance over all its pixels in [0,1]."""

    norm: Literal["l2"]
    eps_l2: Annotated[float, Field(gt=0)]

    @property
    def eps(self) -> float:
        """The radius in [0,1] units."""
        return self.eps_l2

    def project(self, x: Tensor, origin: Tensor) -> Tensor:
        """Return `x` pulled into the ball around `origin`, then clipped to [0,1].

        Clipping only shortens the difference, so the result lies in both.
        """
        delta = x - origin
        norm = _length(delta).clamp_min(1e-12)
        return (origin + delta * (self.eps / norm).clamp(max=1)).clamp(0, 1)

    def ascend(self, x: Tensor, gradient: Tensor, step: Tensor | float) -> Tensor:
        """Move `x` by `step` along the normalised gradient."""
        return x + step * gradient / _length(gradient).clamp_min(1e-12)

    def start(self, origin: Tensor, draws: Draws, use: str) -> Tensor:
        """Return a random image of the ball: a Gaussian direction at a uniform radius."""
        shape = tuple(origin.shape[1:])
        noise = draws.normal(shape, use).to(origin.dtype)
        radius = draws.uniform((1, 1, 1), f"{use} radius").to(origin.dtype)
        return self.project(origin + self.eps * radius * noise / _length(noise), origin)

    def distance(self, x: Tensor, origin: Tensor) -> Tensor:
        """Return the distances (N,) in float64."""
        return _length(x.double() - origin.double()).flatten()

    def scaled(self, factor: float) -> "L2":
        """Return the ball of `factor` times the radius."""
        return L2(norm="l2", eps_l2=self.eps_l2 * factor)


Threat = Annotated[Linf | L2, Field(discriminator="norm")]


@dataclass(frozen=True)
class Outcome:
    """What an attack found: images (N,C,H,W), the margin it saw there and iterations spent (N,)."""

    images: Tensor
    margin: Tensor
    iterations: Tensor


class Attack(Config):
    """Base of every attack section.

    `bounded` attacks stay inside the primary threat; the others minimise a distance instead.
    `stopping` ones are made to leave an image alone once it is fooled; the others go on: for a
    smaller distance, for less suspicion, or by their number of steps.
    """

    bounded: ClassVar[bool] = True
    stopping: ClassVar[bool] = False

    kind: str

    def effort(self) -> int:
        """Return how many backward passes an image that withstands has cost at least."""
        return 0

    def stops(self) -> bool:
        """Say whether an image of a deterministic defense is left alone once it is fooled."""
        return self.stopping and bool(getattr(self, "early_stop", True))

    def strong(self) -> bool:
        """Say whether a claim may rest on this attack: it has the steps and the reach."""
        return False

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Attack `images` (N,C,H,W) in [0,1]; `draws` are the attack's own random choices."""
        raise NotImplementedError


def _length(delta: Tensor) -> Tensor:
    lengths: Tensor = delta.flatten(1).norm(dim=1)
    return lengths[:, None, None, None]


class Search:
    """The bookkeeping every iterative attack shares: rows still at work, best image of each.

    `rows` index the batch; all tensors handed in or out belong to those rows. The image of lowest
    margin is kept, so more effort can never give a weaker result. With `drop`, rows leave once
    they are fooled, except against a stochastic target.
    """

    def __init__(self, target: Target, images: Tensor, labels: Tensor, drop: bool) -> None:
        self.target, self.images, self.labels = target, images, labels
        self.drop = drop and not target.stochastic
        self.looks = 0
        self.best = images.clone()
        self.margin = torch.full((len(images),), torch.inf, device=images.device)
        self.iterations = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        self.rows = torch.arange(len(images), device=images.device)
        self.look(images)
        self.restart()

    @property
    def origin(self) -> Tensor:
        """The clean images of the rows at work."""
        return self.images[self.rows]

    def restart(self) -> None:
        """Put every row back to work that is not fooled yet (all of them without `drop`)."""
        rows = torch.arange(len(self.images), device=self.images.device)
        self.rows = rows[self.margin > 0] if self.drop else rows

    def look(self, x: Tensor) -> Tensor:
        """Evaluate `x` without gradient, keep what is better, return the margins."""
        margin = self.target[self.rows].look(x, self.labels[self.rows], self.looks)
        self._keep(x, margin)
        return margin

    def evaluate(self, x: Tensor, loss: Loss) -> Evaluation:
        """Evaluate `x` with the gradient of `loss`, keep what is better."""
        seen = self.target[self.rows].evaluate(x, self.labels[self.rows], loss, self.looks)
        self._keep(x, seen.margin)
        self.iterations[self.rows] += 1
        return seen

    def alive(self) -> Tensor:
        """Drop the rows that are fooled; return which of the former rows (bool) stay."""
        stay = self.margin[self.rows] > 0 if self.drop else torch.ones_like(self.rows).bool()
        self.rows = self.rows[stay]
        return stay

    def outcome(self) -> Outcome:
        """Return what was found."""
        return Outcome(self.best, self.margin, self.iterations)

    def _keep(self, x: Tensor, margin: Tensor) -> None:
        self.looks += 1
        # NaN logits classify nothing, and count as fooled rather than as robust.
        margin = margin.float().nan_to_num(-torch.inf, torch.inf, -torch.inf)
        better = margin < self.margin[self.rows]
        self.best[self.rows[better]] = x[better].detach()
        self.margin[self.rows[better]] = margin[better]
