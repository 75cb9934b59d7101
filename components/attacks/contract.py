"""What attacks share: threat models, the rungs of the ladder, and the base class `Attack`.

An attack is a section of the parameters that, given a target, images and labels, returns one image
for each. It minimises the margin of the true class (true logit less the largest other logit; not
positive means fooled) and reports what it found; it never grades itself. Against a deterministic
target an attack may stop working on an image once it is fooled; against a stochastic one it never
may, since an image that fools under one draw of the noise may fail under the next.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from components.config import Config
from components.data.draws import Draws
from components.models.defense import STAND_INS, Mode, Target
from components.models.purifiers.contract import StandIn

Positive = Annotated[int, Field(ge=1)]
# The rungs of the ladder, from what an attacker knows least of a defense to most:
# `transfer` and `classifier` replay images that were crafted against a bare classifier, `network`
# attacks one pass of the purifier's network in place of its descent (`models/one_pass.py`); on the
# others the attack runs against the defense in that gradient mode. Their order decides ties: of
# attacks that are equally strong on an image, the one on the earlier rung is credited with it.
MODES = ("transfer", "classifier", "network", "bpda", *STAND_INS, "full", "fixed_noise")
# The rungs that sets are crafted on.
Rung = Mode | Literal["network"]
# Rungs that replay the sets of a bare classifier: on `transfer` those of the baseline `SURROGATE`,
# which the attacker trained; on `classifier` (grey box) those of the one behind the purifier.
REPLAYED = ("transfer", "classifier")
SURROGATE = "surrogate"
# The rungs whose attacks never ask the defense: what they saw was the answer of something else.
UNASKED = (*REPLAYED, "network")
# The rung of images that somebody else crafted, and nobody knows how: no ladder names it.
GIVEN = "given"
RUNGS = (*MODES, GIVEN)
# The stand-in without which a purifier cannot be attacked on a rung.
NEEDED: dict[str, StandIn] = {**{kind: kind for kind in STAND_INS}, "network": "direct"}
# Kinds of attacks that know the detector in a purifier.
WRITTEN_ATTACKS = ("detector_aware",)
# Maps images (N,C,H,W) to the nearest ones of a ball (L-inf), or to ones inside it (L2).
Projection = Callable[[Tensor], Tensor]


class Linf(Config):
    """L-inf threat model: every pixel may change by at most `eps_255` / 255."""

    norm: Literal["linf"]
    eps_255: Annotated[float, Field(gt=0, le=255)]

    @property
    def eps(self) -> float:
        """The radius in [0,1] units."""
        return self.eps_255 / 255

    def ball(self, origin: Tensor) -> Projection:
        """Return the projection of images (N,C,H,W) onto the ball around `origin` and [0,1]."""
        low, high = (origin - self.eps).clamp_(min=0), (origin + self.eps).clamp_(max=1)
        return lambda x: x.clamp(low, high)

    @property
    def label(self) -> str:
        """What tables call this ball."""
        return f"linf {self.eps_255:g}/255"

    def project(self, x: Tensor, origin: Tensor) -> Tensor:
        """Project `x` (N,C,H,W) onto the ball around `origin` and [0,1]."""
        return self.ball(origin)(x)

    def ascend(self, x: Tensor, gradient: Tensor, step: Tensor | float) -> Tensor:
        """Take a step of length `step` in steepest ascent for this norm: along the sign."""
        return _moved(x, gradient.sign(), step)

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

    @property
    def label(self) -> str:
        """What tables call this ball."""
        return f"l2 {self.eps_l2:g}"

    def ball(self, origin: Tensor) -> Projection:
        """Return `project` around `origin`."""
        return partial(self.project, origin=origin)

    def project(self, x: Tensor, origin: Tensor) -> Tensor:
        """Scale `x` (N,C,H,W) into the ball around `origin`, then clip it to [0,1].

        Clipping only shortens the perturbation, so the result lies in both.
        """
        delta = x - origin
        radii = (_length(delta) / self.eps).clamp_min(1)
        return origin.addcdiv(delta, radii).clamp_(0, 1)

    def ascend(self, x: Tensor, gradient: Tensor, step: Tensor | float) -> Tensor:
        """Take a step of length `step` along the gradient, however small or large that is."""
        return _moved(x, normalised(gradient), step)

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


@dataclass(frozen=True)
class Outcome:
    """What an attack found: images (N,C,H,W), their margins (N,) and the iterations spent (N,).

    For a stochastic target the margin is a mean over draws.
    """

    images: Tensor
    margin: Tensor
    iterations: Tensor

    @staticmethod
    def joined(parts: "Sequence[Outcome]") -> "Outcome":
        """Return the outcome of several batches, one after the other."""
        return Outcome(
            torch.cat([part.images for part in parts]),
            torch.cat([part.margin for part in parts]),
            torch.cat([part.iterations for part in parts]),
        )


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

    An attack with a `threat` of its own attacks in that ball; all others in the primary one.
    """

    bounded: ClassVar[bool] = True
    early_stopping: ClassVar[bool] = False
    losses: ClassVar[tuple[LossFamily, ...]] = ()
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")

    kind: str
    threat: Threat | None = None

    @model_validator(mode="after")
    def _takes_a_threat(self) -> Self:
        if self.threat is not None and not self.bounded:
            raise ValueError(
                f"{self.kind} minimises a distance or has a bound of its own: no threat"
            )
        return self

    def within(self, primary: Linf | L2) -> Linf | L2:
        """Return the ball that the attack stays in: its own, or the primary one."""
        return self.threat or primary

    def region(self, primary: Linf | L2) -> str:
        """Return the label of what the attack stays inside; "" where it minimises a distance."""
        return self.within(primary).label if self.bounded else ""

    def inside(self, primary: Linf | L2) -> bool:
        """Say whether the attack stays inside the primary ball by itself."""
        return self.bounded and self.within(primary) == primary

    def endings(self, stochastic: bool = False) -> Mapping[str, Self]:
        """Return the attack by how it ends, "" or "_stop", as it runs on a bare classifier.

        An iterated attack that may stop at the first success leaves two sets there: the last
        iterate, which most papers replay against a purifier, and the first that fools, under the
        suffix `_stop`. Any other attack ends in one way, and so does each where the classifier is
        `stochastic`: no attack stops there.
        """
        if stochastic or not getattr(self, "early_stop", False):
            return {"": self}
        return {"": self.model_copy(update={"early_stop": False}), "_stop": self}

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

    def label(self, name: str, classes: int) -> str:
        """Return what tables call this attack, named `name`, where there are so many classes."""
        return name

    def require_fit(self, stochastic: bool) -> None:
        """Raise ValueError if the attack is not for such a target (`Target.stochastic`)."""

    def fits(self, stochastic: bool) -> bool:
        """Say whether the attack is for such a target (`require_fit`)."""
        try:
            self.require_fit(stochastic)
        except ValueError:
            return False
        return True

    def require_norm(self, primary: Linf | L2) -> None:
        """Raise ValueError if the attack is not for the norm of its threat."""
        norm = self.within(primary).norm
        if norm not in self.norms:
            raise ValueError(f"{self.kind} is for {', '.join(self.norms)} threats only, not {norm}")

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

    def run_in_batches(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws,
        batch: int,
    ) -> Outcome:  # fmt: skip
        """Attack any number of images, `batch` at a time."""
        rows = torch.arange(len(images), device=images.device)
        return Outcome.joined([
            self.run(target[some], images[some], labels[some], threat, draws[some])
            for some in rows.split(batch)  # type: ignore[no-untyped-call]
        ])  # fmt: skip


class Given(Attack):
    """The attack behind images that somebody else crafted: all that is known is what they are."""

    kind: Literal["given"] = "given"


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
    finite = torch.finfo(gradient.dtype)
    scaled = gradient / largest.clamp_min(finite.tiny * finite.eps)
    # The largest entry is 1 now, so only a zero gradient is shorter than 1.
    return scaled / _length(scaled).clamp_min(1)


def _moved(x: Tensor, way: Tensor, step: Tensor | float) -> Tensor:
    """Return `x` + `step` * `way` in one operation."""
    return x.addcmul(way, step) if isinstance(step, Tensor) else x.add(way, alpha=step)


def _length(delta: Tensor) -> Tensor:
    """Return the Euclidean length of each image (N,1,1,1)."""
    lengths: Tensor = delta.flatten(1).norm(dim=1)
    return lengths[:, None, None, None]
