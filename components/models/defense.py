"""A classifier behind a purifier, and what an attack gets to see of the two.

An attack never touches a `Defense`. It is handed a `Target`: the defense in one gradient mode,
with its noise bound to keyed draws, indexable by rows, and counting every pass it is asked for.
Modes: `full` is the exact gradient through the purifier, unrolled where that iterates; `bpda` runs
the purifier forwards and takes the identity for its derivative (Athalye et al. 2018); a stand-in
(`direct`, `plain`, `detached`, `short`, `soft`) does so with the derivative of a purifier that is
cheaper or smoother; `fixed_noise` is `full` by an attacker who knows the very noise, the same at
every look. The modes `classifier` and `transfer` are none of a target: they replay what was crafted
against a bare classifier.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from components.data.draws import Draws
from components.models.purifiers.contract import Purifier, StandIn

Mode = Literal["full", "bpda", "fixed_noise"] | StandIn
STAND_INS: tuple[StandIn, ...] = get_args(StandIn)
Loss = Callable[[Tensor, Tensor], Tensor]  # logits (N,K), labels (N,) -> (N,)


class Defense(nn.Module):
    """A classifier behind a purifier (None: the bare classifier)."""

    def __init__(self, classifier: nn.Module, purifier: Purifier | None) -> None:
        super().__init__()
        self.classifier = classifier
        self.purifier = purifier

    def freeze(self) -> "Defense":
        """Put everything in eval mode, where no parameter takes a gradient; return itself."""
        return self.eval().requires_grad_(False)

    @property
    def stochastic(self) -> bool:
        """Whether the answer depends on noise."""
        return self.purifier is not None and self.purifier.stochastic

    @property
    def differentiable(self) -> bool:
        """Whether the exact gradient is usable."""
        return self.purifier is None or self.purifier.differentiable

    def purify(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        """Return the purified images (N,C,H,W) in [0,1]."""
        if self.purifier is None:
            return x
        purified: Tensor = self.purifier(x, draws)
        return purified

    def stand_in(self, kind: StandIn, x: Tensor, draws: Draws | None) -> Tensor:
        """Return what a stand-in makes of `x`; raise ValueError for one the purifier lacks."""
        known = () if self.purifier is None else self.purifier.stand_ins
        if self.purifier is None or kind not in known:
            raise ValueError(
                f"no stand-in {kind} here; this purifier has {', '.join(known) or 'none'}"
            )
        return self.purifier.stand_in(kind, x, draws)

    def forward(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        """Return logits (N,K) of pixels (N,C,H,W) in [0,1]."""
        logits: Tensor = self.classifier(self.purify(x, draws))
        return logits


def fold_batch_norm(defense: Defense) -> Defense:
    """Return a copy with every BatchNorm folded into the convolution before it, in channels-last
    layout: equal up to rounding, but faster.

    For attacks only; what they find is checked on the defense itself, which is what is scored.
    """
    copy = deepcopy(defense)
    for module in list(copy.modules()):
        if isinstance(module, nn.Sequential):
            _fold_sequence(module)
    channels_last(copy)
    return copy


def channels_last(module: nn.Module) -> None:
    """Lay the weights out channels last, in place: the same numbers, but convolutions over few
    channels run a quarter faster.
    """
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _fold_sequence(sequence: nn.Sequential) -> None:
    for index in range(len(sequence) - 1):
        convolution, norm = sequence[index], sequence[index + 1]
        if isinstance(norm, nn.BatchNorm2d) and isinstance(
            convolution, nn.Conv2d | nn.ConvTranspose2d
        ):
            transposed = isinstance(convolution, nn.ConvTranspose2d)
            sequence[index] = fuse_conv_bn_eval(convolution, norm, transposed).requires_grad_(False)
            sequence[index + 1] = nn.Identity()


class _Straight(torch.autograd.Function):
    """The value of the second argument with the derivative of the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, purified: Tensor) -> Tensor:
        return purified.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _straight(x: Tensor, purified: Tensor) -> Tensor:
    value: Tensor = _Straight.apply(x, purified)  # type: ignore[no-untyped-call]
    return value


@dataclass(frozen=True)
class Passes:
    """Forward and backward passes spent on each image (N,) int64; rows share the counters."""

    forward: Tensor
    backward: Tensor


@dataclass(frozen=True)
class Evaluation:
    """One look at a target: per image (N,) the loss, the margin, and the gradient (N,C,H,W).

    `margin` is the logit of the true class less the largest other one: not positive means fooled.
    Under EOT all three are means over the draws.
    """

    loss: Tensor
    margin: Tensor
    gradient: Tensor


class Target:
    """A defense as an attack sees it: pixels (N,C,H,W) in [0,1] to logits (N,K).

    `draws` binds the noise; a call takes the number of the draw, so that no two looks share it.
    `eot` draws are averaged per gradient; a deterministic defense needs, and takes, one.
    """

    def __init__(
        self, defense: Defense, mode: Mode, draws: Draws, eot: int, passes: Passes, rows: Tensor
    ) -> None:
        self.defense, self.mode, self.draws = defense, mode, draws
        self.eot = eot if self.stochastic else 1
        self.passes, self.rows = passes, rows

    @property
    def stochastic(self) -> bool:
        """Whether a second look may answer differently."""
        return self.defense.stochastic and self.mode != "fixed_noise"

    def __getitem__(self, rows: Tensor) -> "Target":
        return Target(
            self.defense, self.mode, self.draws[rows], self.eot, self.passes, self.rows[rows]
        )

    def __call__(self, x: Tensor, draw: int, bare: bool = False) -> Tensor:
        """Return the logits under draw number `draw`, with a graph if gradients are on.

        `bare` asks the classifier alone.
        """
        self.passes.forward.index_add_(0, self.rows, torch.ones_like(self.rows))
        draws = self._drawn(draw)
        if bare:
            answer: Tensor = self.defense.classifier(x)
            return answer
        if self.mode in ("full", "fixed_noise"):
            logits: Tensor = self.defense(x, draws)
            return logits
        with torch.no_grad():
            purified = self.defense.purify(x, draws)
        approximate = x
        if self.mode in STAND_INS and torch.is_grad_enabled():
            approximate = self.defense.stand_in(self.mode, x, draws)
        through: Tensor = self.defense.classifier(_straight(approximate, purified))
        return through

    def margins(self, x: Tensor, labels: Tensor, draw: int) -> Tensor:
        """Return the margins (N,) averaged over the EOT draws of look number `draw`."""
        with torch.no_grad():
            margins = [margin(self(x, draw * self.eot + k), labels) for k in range(self.eot)]
        return torch.stack(margins).mean(0)

    def detector_score(self, x: Tensor, draw: int) -> Tensor:
        """Return how odd the images look to the purifier (N,), averaged over a look's EOT draws.

        Without a purifier nobody is suspicious: zero.
        """
        with torch.no_grad():
            seen = [self._detector_score(x, draw * self.eot + k) for k in range(self.eot)]
        return torch.stack(seen).mean(0)

    def detector_gradient(self, x: Tensor, draw: int) -> Tensor:
        """Return the input gradient of the detector score (N,C,H,W), averaged over the EOT draws."""
        gradients = []
        for k in range(self.eot):
            point = x.detach().requires_grad_()
            with torch.enable_grad():
                value = self._detector_score(point, draw * self.eot + k)
            gradients.append(_gradient(value, point))
        return torch.stack(gradients).mean(0)

    def evaluate(
        self, x: Tensor, labels: Tensor, loss: Loss, draw: int, bare: bool = False
    ) -> Evaluation:
        """Return loss, margin and input gradient, averaged over the EOT draws of look `draw`.

        `bare` asks the classifier alone.
        """
        losses, margins, gradients = [], [], []
        for k in range(self.eot):
            point = x.detach().requires_grad_()
            with torch.enable_grad():
                logits = self(point, draw * self.eot + k, bare)
                value = loss(logits, labels)
            losses.append(value.detach())
            margins.append(margin(logits.detach(), labels))
            gradients.append(_gradient(value, point))
            self.passes.backward.index_add_(0, self.rows, torch.ones_like(self.rows))
        return Evaluation(
            torch.stack(losses).mean(0),
            torch.stack(margins).mean(0),
            torch.stack(gradients).mean(0),
        )

    def jacobian(
        self, x: Tensor, labels: Tensor, classes: Tensor, draw: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return how single logits stand to the true one, averaged over the EOT draws of a look.

        Three things: the margin (N,), the logits of `classes` (N,k) less the true one (N,k), and
        the input gradients (N,k,C,H,W) of these. A draw costs one forward and k backward passes.
        """
        margins, gaps, slopes = [], [], []
        for k in range(self.eot):
            point = x.detach().requires_grad_()
            with torch.enable_grad():
                logits = self(point, draw * self.eot + k)
                gap = logits.gather(1, classes) - logits.gather(1, labels[:, None])
            margins.append(margin(logits.detach(), labels))
            gaps.append(gap.detach())
            slopes.append(torch.stack([_gradient(each, point, True) for each in gap.unbind(1)], 1))
            self.passes.backward.index_add_(
                0, self.rows, torch.full_like(self.rows, classes.shape[1])
            )
        return (
            torch.stack(margins).mean(0),
            torch.stack(gaps).mean(0),
            torch.stack(slopes).mean(0),
        )

    def _detector_score(self, x: Tensor, draw: int) -> Tensor:
        if self.defense.purifier is None:
            return torch.zeros(len(x), dtype=x.dtype, device=x.device)
        self.passes.forward.index_add_(0, self.rows, torch.ones_like(self.rows))
        return self.defense.purifier.detector_score(x, self._drawn(draw))

    def _drawn(self, draw: int) -> Draws:
        return self.draws.redraw(0 if self.mode == "fixed_noise" else draw)


def bind(defense: Defense, mode: Mode, draws: Draws, eot: int) -> Target:
    """Bind a defense to a gradient mode and to noise, for an attack on len(draws) images."""
    zeros = torch.zeros(len(draws), dtype=torch.int64, device=draws.ids.device)
    rows = torch.arange(len(draws), device=draws.ids.device)
    return Target(defense, mode, draws, eot, Passes(zeros, zeros.clone()), rows)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the true logit less the largest other one (N,); NaN logits give NaN."""
    true = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return true - others.amax(1)


def _gradient(value: Tensor, point: Tensor, retain: bool = False) -> Tensor:
    # A purifier that cuts the graph (a comparison, a detach) leaves nothing to differentiate:
    # that is a gradient of zero, which the checks are there to notice.
    if not value.requires_grad:
        return torch.zeros_like(point)
    (gradient,) = torch.autograd.grad(value.sum(), point, retain_graph=retain, allow_unused=True)
    return torch.zeros_like(point) if gradient is None else gradient
