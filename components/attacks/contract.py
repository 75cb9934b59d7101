"""What attacks share: threat models, the base class `Attack`, and `Search` for iterative ones.

An attack is a section of the parameters that, given a target, images and labels, returns one image
for each. It minimises the margin of the true class (true logit less the largest other logit; not
positive means fooled) and reports what it found; it never grades itself. Against a deterministic
target an attack may stop working on an image once it is fooled; against a stochastic one it never
may, since an image that fools under one draw of the noise may fail under the next.
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
    """L-inf threat model: every pixel may change by at most `eps_255` / 255."""

    norm: Literal["linf"]
    eps_255: Annotated[float, Field(gt=0, le=255)]

    @property
    def eps(self) -> float:
        """The radius in [0,1] units."""
        return self.eps_255 / 255

    def project(self, x: Tensor, origin: Tensor) -> Tensor:
        """Project `x` (N,C,H,W) onto the ball around `origin` and [0,1]."""
        return torch.minimum(torch.maximum(x, origin - self.eps), origin + self.eps).clamp(0, 1)

    def ascend(self, x: Tensor, gradient: Tensor, step: Tensor | float) -> Tensor:
        """Take a step of length `step` in steepest ascent for this norm: along the sign."""
        return x + step * gradient.sign()

    def start(self, origin: Tensor, draws: Draws, use: str) -> Tensor:
        """Return a random image of the ball: uniform noise in every pixel."""
        noise = 2 * draws.uniform(tuple(origin.shape[1:]), use).to(origin.dtype) - 1
        return self.project(origin + self.eps * noise, origin)

    def distance(self, x: Tensor, origin: Tensor) -> Tensor:
        """Return the distances (N,) in float64."""
        return (x.double() - origin.double()).abs().flatten(1).amax(1)

    def scaled(self, factor: float) -> "Linf":
        """Return the ball of `factor` times the radius, at most the whole image space."""
        return Linf(norm="linf", eps_255=min(self.eps_255 * factor, 255.0))


class L2(Config):
    """L2 threat model: the image may move by at most `eps_l2`, over all pixels in [0,1]."""

    norm: Literal["l2"]
    eps_l2: Annotated[float, Field(gt=0)]

    @property
    def eps(self) -> float:
        """The radius in [0,1] units."""
        return self.eps_l2

    def project(self, x: Tensor, origin: Tensor) -> Tensor:
        """Scale `x` (N,C,H,W) into the ball around `origin`, then clip it to [0,1].

        Clipping only shortens the perturbation, so the result lies in both.
        """
        delta = x - origin
        norm = _length(delta).clamp_min(1e-12)
        return (origin + delta * (self.eps / norm).clamp(max=1)).clamp(0, 1)

    def ascend(self, x: Tensor, gradient: Tensor, step: Tensor | float) -> Tensor:
        """Take a step of length `step` along the gradient, however small or large that is."""
        return x + step * normalised(gradient)

    def start(self, origin: Tensor, draws: Draws, use: str) -> Tensor:
        """Return a random image of the ball: a Gaussian direction, a uniform radius."""
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
# What an attack climbs. Attacks on the cross-entropy climb its log odds; all the others compare two
# logits, the true one and that of one other class, whichever leads or each in turn.
LossFamily = Literal["cross-entropy", "margin"]
# A claim rests on no attack of fewer steps.
LEAST_STEPS = 10


# A search against a stochastic target ends by evaluating this many of its best images once more,
# besides the last one, under at least and at most so many fresh draws.
FINALISTS = 4
FINAL_DRAWS = (2, 16)


@dataclass(frozen=True)
class Outcome:
    """What an attack found: images (N,C,H,W), their margins (N,) and the iterations spent (N,).

    For a stochastic target the margin is a mean over draws.
    """

    images: Tensor
    margin: Tensor
    iterations: Tensor


@dataclass(frozen=True)
class Cost:
    """Forward and backward passes on one image."""

    forward: int
    backward: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.forward + other.forward, self.backward + other.backward)


class Attack(Config):
    """Base of every attack section.

    `bounded`: the attack stays inside the threat; other attacks minimise a distance instead, or
    bound something else. `early_stopping`: by its design the attack stops working on an image once
    it is fooled; other attacks go on to lower the distance or the detector score, or to finish a
    fixed number of steps. `losses` are the families of what it climbs; an ensemble has several.
    """

    bounded: ClassVar[bool] = True
    early_stopping: ClassVar[bool] = False
    losses: ClassVar[tuple[LossFamily, ...]] = ()

    kind: str

    def effort(self, classes: int, stochastic: bool) -> Cost:
        """Return the least cost of an image that nothing fools.

        `classes` is their number; `stochastic` says whether the target is (`Target.stochastic`).
        """
        raise NotImplementedError

    def draws(self, stochastic: bool) -> int:
        """Return the number of draws of noise that one query averages over."""
        return int(getattr(self, "eot", 1)) if stochastic else 1

    def stops_early(self) -> bool:
        """Say whether, on a deterministic defense, the attack leaves an image once it is fooled."""
        return self.early_stopping and bool(getattr(self, "early_stop", True))

    def strong(self) -> bool:
        """Say whether a claim of robustness may rest on this attack, with others beside it.

        It follows gradients inside the ball, by enough steps, none too short or too long. Attacks
        without a ball say little of what lies in it, and random search is no measure of a gradient.
        """
        return False

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Attack `images` (N,C,H,W) in [0,1]; `draws` is the noise of the attack's own choices."""
        raise NotImplementedError


def nan_as_fooled(margins: Tensor) -> Tensor:
    """Replace NaN by minus infinity: NaN logits classify nothing, so they count as fooled."""
    return margins.nan_to_num(-torch.inf, torch.inf, -torch.inf)


def normalised(gradient: Tensor) -> Tensor:
    """Return `gradient` (N,C,H,W) scaled to Euclidean length 1 in each image; zero stays zero.

    It is divided by its largest entry first: the squares of small or large entries would leave the
    range of float32. NaN counts as zero, and infinity as the largest number there is, so an
    infinite entry leaves nothing of the finite ones.
    """
    gradient = gradient.nan_to_num(0)
    largest = gradient.flatten(1).abs().amax(1)[:, None, None, None]
    scaled = gradient / torch.where(largest > 0, largest, 1)
    # The largest entry is 1 now, so only a zero gradient is shorter than 1.
    return scaled / _length(scaled).clamp_min(1)


def _length(delta: Tensor) -> Tensor:
    """Return the Euclidean length of each image (N,1,1,1)."""
    lengths: Tensor = delta.flatten(1).norm(dim=1)
    return lengths[:, None, None, None]


class Search:
    """The bookkeeping of an iterative attack: the active rows of the batch, the best image of each.

    `rows` are the indices of the active rows; all tensors passed in and returned belong to them.
    The image of lowest margin is kept, so against a deterministic target more effort never gives a
    weaker result. With `early_stop`, a row stops being active once it is fooled.

    Against a stochastic target every row stays active, and the lowest margin of many queries is
    biased: an early, weaker iterate can beat the last one by its noise alone. So `outcome`
    evaluates the `FINALISTS` images of lowest margin and the last one again, all under the same
    fresh draws.
    """

    def __init__(self, target: Target, images: Tensor, labels: Tensor, early_stop: bool) -> None:
        self.target, self.images, self.labels = target, images, labels
        self.early_stop = early_stop and not target.stochastic
        self.queries = 0
        self.finalists = _Finalists(images) if target.stochastic else None
        self.best = images.clone()
        self.margin = torch.full((len(images),), torch.inf, device=images.device)
        self.iterations = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        self.rows = torch.arange(len(images), device=images.device)
        self.query(images)
        self.restart()

    @property
    def origin(self) -> Tensor:
        """The clean images of the active rows."""
        return self.images[self.rows]

    def restart(self) -> None:
        """Make all rows active again; with `early_stop`, only those that are not fooled yet."""
        rows = torch.arange(len(self.images), device=self.images.device)
        self.rows = rows[self.margin > 0] if self.early_stop else rows

    def query(self, x: Tensor) -> Tensor:
        """Evaluate `x` without gradient, record it, return the margins."""
        margin = self.target[self.rows].margins(x, self.labels[self.rows], self.queries)
        self.record(x, margin)
        return margin

    def evaluate(self, x: Tensor, loss: Loss) -> Evaluation:
        """Evaluate `x` with the gradient of `loss`, record it, return the evaluation."""
        found = self.target[self.rows].evaluate(x, self.labels[self.rows], loss, self.queries)
        self.record(x, found.margin)
        self.iterations[self.rows] += 1
        return found

    def drop_fooled(self) -> Tensor:
        """With `early_stop`, deactivate the rows that are fooled; return which rows stay (bool)."""
        stay = self.margin[self.rows] > 0 if self.early_stop else torch.ones_like(self.rows).bool()
        self.rows = self.rows[stay]
        return stay

    def outcome(self) -> Outcome:
        """Return the best image of every row; for a stochastic target, chosen under fresh draws."""
        if self.finalists:
            used = self.queries * self.target.eot
            count = final_draws(self.queries, self.target.eot)
            self.best, self.margin = strongest(
                self.target, self.finalists.candidates(), self.labels, range(used, used + count)
            )
        return Outcome(self.best, self.margin, self.iterations)

    def record(self, x: Tensor, margin: Tensor) -> None:
        """Count a query, and keep the images `x` of the active rows whose `margin` is a new low."""
        self.queries += 1
        margin = nan_as_fooled(margin.float())
        if self.finalists:
            self.finalists.enter(self.rows, x.detach(), margin)
        better = margin < self.margin[self.rows]
        self.best[self.rows[better]] = x[better].detach()
        self.margin[self.rows[better]] = margin[better]


def final_draws(queries: int, eot: int) -> int:
    """Return under how many draws the finalists of a search of so many queries are compared.

    It is a fifth of the draws that the search has used, within bounds, and never less than `eot`.
    """
    return max(eot, FINAL_DRAWS[0], min(queries * eot // 5, FINAL_DRAWS[1]))


def search_cost(gradients: int, margins: int, draws: int, stochastic: bool) -> Cost:
    """Return what a `Search` costs that takes so many gradients and asks for so many margins.

    It asks for those of the clean images besides, and compares its finalists if the target is
    stochastic. `draws` is the number of draws of each query.
    """
    queries = 1 + gradients + margins
    final = (FINALISTS + 1) * final_draws(queries, draws) if stochastic else 0
    return Cost(queries * draws + final, gradients * draws)


class _Finalists:
    """For each row the `FINALISTS` images of lowest margin under noise, and the last image."""

    def __init__(self, images: Tensor) -> None:
        self.last = images.clone()
        self.images = images.repeat(FINALISTS, *[1] * images.ndim).view(FINALISTS, *images.shape)
        self.margins = torch.full((FINALISTS, len(images)), torch.inf, device=images.device)

    def enter(self, rows: Tensor, x: Tensor, margins: Tensor) -> None:
        """Let `x` of `rows` replace the finalist of largest margin, where its margin is lower."""
        largest, slot = self.margins[:, rows].max(0)
        lower, allowed = margins < largest, margins < torch.inf
        self.margins[slot[lower], rows[lower]] = margins[lower]
        self.images[slot[lower], rows[lower]] = x[lower]
        self.last[rows[allowed]] = x[allowed]

    def candidates(self) -> Tensor:
        """Return the images (`FINALISTS` + 1, N, C, H, W)."""
        return torch.cat([self.images, self.last[None]])


def strongest(
    target: Target, candidates: Tensor, labels: Tensor, draws: range
) -> tuple[Tensor, Tensor]:
    """Return the strongest of M `candidates` (M,N,C,H,W) per row, and its mean margin (N,).

    All are evaluated under the same `draws` of the defense's noise, which should be unused so far.
    The strongest is classified correctly under the fewest draws; ties go to the lower mean margin.
    A NaN margin counts as minus infinity, as in `nan_as_fooled`.
    """
    with torch.no_grad():
        by_draw = [torch.stack([margin(target(x, k), labels) for x in candidates]) for k in draws]
    # The bound keeps means finite: infinity marks the candidates that are out.
    margins = torch.stack(by_draw).float().nan_to_num(-torch.inf).clamp(max=1e30)
    means, right = margins.mean(0), (margins > 0).sum(0)
    best = means.masked_fill(right > right.amin(0), torch.inf).argmin(0)
    rows = torch.arange(len(labels), device=labels.device)
    return candidates[best, rows], means[best, rows]
