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
from components.data.draws import Draws
from components.models.defense import Evaluation, Loss, Target, margin

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


# Against a random defense: how many images of a search are asked again in the end, besides the
# last, and by how many draws at least and at most.
HELD = 4
ASKED = (2, 16)


@dataclass(frozen=True)
class Outcome:
    """What an attack found: images (N,C,H,W), their margins and the iterations spent (N,).

    Of a stochastic target the margin is a mean over draws.
    """

    images: Tensor
    margin: Tensor
    iterations: Tensor


class Attack(Config):
    """Base of every attack section.

    `bounded` attacks stay inside the primary threat; the others minimise a distance instead.
    `stopping` ones are made to leave an image alone once it is fooled; the others go on: for a
    smaller distance, for less detector_score, or by their number of steps.
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
    margin is kept, so against a deterministic target more effort can never give a weaker result.
    With `drop`, rows leave once they are fooled.

    Against a stochastic target no row leaves, and the lowest margin of many looks is a lucky one:
    an early, weaker iterate beats the last by its noise alone. So the `HELD` images that looked
    best and the last one are asked once more in the end, all under the same fresh draws.
    """

    def __init__(self, target: Target, images: Tensor, labels: Tensor, drop: bool) -> None:
        self.target, self.images, self.labels = target, images, labels
        self.drop = drop and not target.stochastic
        self.looks = 0
        self.finalists = _Finalists(images) if target.stochastic else None
        self.best = images.clone()
        self.margin = torch.full((len(images),), torch.inf, device=images.device)
        self.iterations = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        self.rows = torch.arange(len(images), device=images.device)
        self.query(images)
        self.restart()

    @property
    def origin(self) -> Tensor:
        """The clean images of the rows at work."""
        return self.images[self.rows]

    def restart(self) -> None:
        """Put every row back to work that is not fooled yet (all of them without `drop`)."""
        rows = torch.arange(len(self.images), device=self.images.device)
        self.rows = rows[self.margin > 0] if self.drop else rows

    def query(self, x: Tensor) -> Tensor:
        """Evaluate `x` without gradient, keep what is better, return the margins."""
        margin = self.target[self.rows].margins(x, self.labels[self.rows], self.looks)
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
        if self.finalists:
            # A share of what the search has cost, and no less than a look of it.
            spent, eot = self.looks * self.target.eot, self.target.eot
            asked = max(eot, ASKED[0], min(spent // 5, ASKED[1]))
            self.best, self.margin = strongest(
                self.target, self.finalists.candidates(), self.labels, range(spent, spent + asked)
            )
        return Outcome(self.best, self.margin, self.iterations)

    def _keep(self, x: Tensor, margin: Tensor) -> None:
        self.looks += 1
        # NaN logits classify nothing, and count as fooled rather than as robust.
        margin = margin.float().nan_to_num(-torch.inf, torch.inf, -torch.inf)
        if self.finalists:
            self.finalists.enter(self.rows, x.detach(), margin)
        better = margin < self.margin[self.rows]
        self.best[self.rows[better]] = x[better].detach()
        self.margin[self.rows[better]] = margin[better]


class _Finalists:
    """The `HELD` images of each row that looked best under noise, and the last one."""

    def __init__(self, images: Tensor) -> None:
        self.last = images.clone()
        self.images = images.repeat(HELD, *[1] * images.ndim).view(HELD, *images.shape)
        self.margins = torch.full((HELD, len(images)), torch.inf, device=images.device)

    def enter(self, rows: Tensor, x: Tensor, margins: Tensor) -> None:
        """Let the images `x` of `rows` in, in place of the least of those that are there."""
        worst, place = self.margins[:, rows].max(0)
        better, allowed = margins < worst, margins < torch.inf
        self.margins[place[better], rows[better]] = margins[better]
        self.images[place[better], rows[better]] = x[better]
        self.last[rows[allowed]] = x[allowed]

    def candidates(self) -> Tensor:
        """Return the images (`HELD` + 1, N, C, H, W)."""
        return torch.cat([self.images, self.last[None]])


def strongest(
    target: Target, candidates: Tensor, labels: Tensor, draws: range
) -> tuple[Tensor, Tensor]:
    """Return of several images for each row (M,N,C,H,W) the strongest (N,C,H,W), and its margin.

    All are asked under the same draws of the noise of the defense, which nothing has seen before.
    The strongest is right under the fewest; of two that are right equally often it has the lower
    mean margin. Logits that are NaN classify nothing: minus infinity, as in a search.
    """
    with torch.no_grad():
        asked = [torch.stack([margin(target(x, k), labels) for x in candidates]) for k in draws]
    margins = torch.stack(asked).float().nan_to_num(-torch.inf).clamp(max=1e6)
    means = margins.mean(0)
    finite = means.clamp(min=-1e6)
    # The second counts less than half a draw, however large margins are.
    best = ((margins > 0).sum(0) + 0.49 * finite / (1 + finite.abs())).argmin(0)
    rows = torch.arange(len(labels), device=labels.device)
    return candidates[best, rows], means[best, rows]
