"""A classifier behind a purifier, and the view of it that an attack gets.

Either half may draw noise, and says so by `stochastic`: a random purifier or classifier is called
with a stream of keyed noise beside the pixels, a deterministic one without it (`draws_noise`).

An attack does not get the `Defense` itself, but a `Target`: the defense in one gradient mode, with
its noise bound to keyed draws, indexable by rows, and with a counter of passes. The modes:

`full` is the exact gradient through the purifier, unrolled if the purifier iterates.
`bpda` runs the purifier forwards and takes the identity as its derivative (Athalye et al. 2018).
A stand-in (`direct`, `plain`, `detached`, `short`, `soft`) also runs the purifier forwards, and
takes the derivative of a cheaper or smoother purifier.
`fixed_noise` is `full` for an attacker who knows the noise: it is the same in every query.

`classifier`, `transfer` and `network` are no modes of a target: their attacks never ask a defense.
The first two replay adversarial examples that were crafted against a classifier without a purifier,
and `network` attacks one pass of the purifier's network (`one_pass`).
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from components.data.draws import Draws, NoiseStream
from components.models.identity import identity
from components.models.purifiers.contract import Purifier, StandIn

Mode = Literal["full", "bpda", "fixed_noise"] | StandIn
STAND_INS: tuple[StandIn, ...] = get_args(StandIn)
Loss = Callable[[Tensor, Tensor], Tensor]  # logits (N,K), labels (N,) -> (N,)


def draws_noise(half: nn.Module | None) -> bool:
    """Say whether a purifier or a classifier draws noise; it is then called with a stream of it."""
    return bool(getattr(half, "stochastic", False))


class SeededByBatch:
    """A mark of what wraps a random network from elsewhere: one seed serves a whole batch."""

    # Of the wrapper: a network that said so of itself would be asked less.
    batchwise: bool


class Defense(nn.Module):
    """A classifier behind a purifier, or without one if `purifier` is None.

    A random classifier is called as `classifier(x, stream)`; without a stream its noise is fresh.
    """

    def __init__(self, classifier: nn.Module, purifier: Purifier | None) -> None:
        super().__init__()
        self.classifier = classifier
        self.purifier = purifier
        # The weights of a defense in training change with every step.
        self._digest = ""

    def freeze(self) -> "Defense":
        """Set eval mode, switch off the gradients of all parameters, and return the defense.

        From here on its noise is salted with its digest.
        """
        self.eval().requires_grad_(False)
        self._digest = identity(self)
        return self

    @property
    def digest(self) -> str:
        """The identity of the frozen defense; copies of it, folded or in float64, keep it."""
        return self._digest

    @property
    def stochastic(self) -> bool:
        """Whether the logits depend on noise, of whichever half."""
        return draws_noise(self.purifier) or draws_noise(self.classifier)

    @property
    def batchwise(self) -> bool:
        """Whether the noise of an image depends on the batch that it is in, in either half."""
        halves = (self.purifier, self.classifier)
        return any(isinstance(half, SeededByBatch) and half.batchwise for half in halves)

    @property
    def differentiable(self) -> bool:
        """Whether the exact gradient is usable."""
        return self.purifier is None or self.purifier.differentiable

    def purify(self, x: Tensor, draws: Draws | NoiseStream | None = None) -> Tensor:
        """Return the purified images (N,C,H,W) in [0,1].

        The purifier gets an opaque stream of the noise, or none if it is deterministic. Without
        `draws`, noise is fresh.
        """
        if self.purifier is None:
            return x
        purified: Tensor = self.purifier(x, self._noise_of(self.purifier, draws))
        return purified

    def classify(self, x: Tensor, draws: Draws | NoiseStream | None = None) -> Tensor:
        """Return the logits (N,K) of the classifier alone for pixels (N,C,H,W) in [0,1].

        Its noise is not that of the purifier under the same draws. Without `draws`, noise is fresh.
        """
        logits: Tensor
        if draws_noise(self.classifier):
            logits = self.classifier(x, self._noise_of(self.classifier, draws))
        else:
            logits = self.classifier(x)
        return logits

    def stand_in(self, kind: StandIn, x: Tensor, draws: Draws | None) -> Tensor:
        """Return the output of a stand-in for `x`; raise ValueError if the purifier lacks it."""
        known = () if self.purifier is None else self.purifier.stand_ins
        if self.purifier is None or kind not in known:
            raise ValueError(
                f"this purifier has no stand-in {kind}; it has {', '.join(known) or 'none'}"
            )
        return self.purifier.stand_in(kind, x, self._noise_of(self.purifier, draws))

    def detector_score(
        self, x: Tensor, draws: Draws | NoiseStream | None, purified: Tensor | None = None
    ) -> Tensor:
        """Return the purifier's detector score (N,); without a purifier it is zero.

        `purified` saves a pass: it is the output of the purifier for `x` under the same draws.
        """
        if self.purifier is None:
            return torch.zeros(len(x), dtype=x.dtype, device=x.device)
        noise = self._noise_of(self.purifier, draws)
        return self.purifier.detector_score(x, noise, purified)

    def forward(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        """Return logits (N,K) of pixels (N,C,H,W) in [0,1]."""
        return self.classify(self.purify(x, draws), draws)

    def _noise_of(self, half: nn.Module, draws: Draws | NoiseStream | None) -> NoiseStream | None:
        """Return the noise of one half, each its own; None without draws, or if it takes none."""
        if draws is None or not draws_noise(half):
            return None
        stream = draws.stream(self.digest) if isinstance(draws, Draws) else draws
        return stream.part("classifier") if half is self.classifier else stream


def fold_batch_norm(defense: Defense) -> Defense:
    """Return a copy in eval mode, channels last, its BatchNorms folded into convolutions before.

    It is faster and equal up to rounding. Attacks use it; the adversarial examples that they find
    are scored on the defense itself.
    """
    copy = deepcopy(defense).eval()
    for module in list(copy.modules()):
        if isinstance(module, nn.Sequential):
            _fold_sequence(module)
    channels_last(copy)
    return copy


def channels_last(module: nn.Module) -> None:
    """Change the memory layout of the weights to channels last, in place.

    The values stay the same; convolutions over few channels run a quarter faster. A network with a
    1 x 1 convolution over few channels that has a stride is left alone: its gradient crashes in
    this layout (`classifiers._Block`).
    """
    if any(isinstance(part, nn.Conv2d) and _crashes(part) for part in module.modules()):
        return
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


def _crashes(part: nn.Conv2d) -> bool:
    return part.kernel_size == (1, 1) and part.stride != (1, 1) and part.in_channels < 16


def _fold_sequence(sequence: nn.Sequential) -> None:
    for index in range(len(sequence) - 1):
        convolution, norm = sequence[index], sequence[index + 1]
        if isinstance(norm, nn.BatchNorm2d) and isinstance(
            convolution, nn.Conv2d | nn.ConvTranspose2d
        ):
            transposed = isinstance(convolution, nn.ConvTranspose2d)
            sequence[index] = fuse_conv_bn_eval(convolution, norm, transposed).requires_grad_(False)
            sequence[index + 1] = nn.Identity()


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, purified: Tensor) -> Tensor:
        return purified.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _straight_through(x: Tensor, purified: Tensor) -> Tensor:
    """Return the value of `purified` with the derivative of `x`."""
    value: Tensor = _StraightThrough.apply(x, purified)  # type: ignore[no-untyped-call]
    return value


@dataclass(frozen=True)
class Passes:
    """Forward and backward passes spent on each image (N,) int64.

    `spared` (N,) int64 are the forward passes that an attack left out because it knew their result,
    less those that it took for nothing.
    A target and its row subsets share the counters.
    """

    forward: Tensor
    backward: Tensor
    spared: Tensor


@dataclass(frozen=True)
class Evaluation:
    """One query of a target: per image (N,) loss and margin, and the input gradient (N,C,H,W).

    `margin` is the true logit minus the largest other one; an image is fooled if it is not
    positive. Under EOT all three are means over the draws.
    """

    loss: Tensor
    margin: Tensor
    gradient: Tensor


class Target:
    """A defense as an attack sees it: pixels (N,C,H,W) in [0,1] to logits (N,K).

    `draws` binds the noise. Every query has a number and averages over `eot` draws of its own;
    queries of different numbers share no noise. A deterministic defense uses one draw.
    """

    def __init__(
        self, defense: Defense, mode: Mode, draws: Draws, eot: int, passes: Passes, rows: Tensor
    ) -> None:
        self.defense, self.mode, self.draws = defense, mode, draws
        self.eot = eot if self.stochastic else 1
        self.passes, self.rows, self._once = passes, rows, torch.ones_like(rows)

    @property
    def stochastic(self) -> bool:
        """Whether two queries of the same images may differ."""
        return self.defense.stochastic and self.mode != "fixed_noise"

    def __getitem__(self, rows: Tensor) -> "Target":
        return Target(
            self.defense, self.mode, self.draws[rows], self.eot, self.passes, self.rows[rows]
        )

    def __call__(self, x: Tensor, draw: int, bare: bool = False) -> Tensor:
        """Return the logits (N,K) under draw `draw`, with a graph if gradients are enabled.

        `bare` leaves out the purifier.
        """
        self.passes.forward.index_add_(0, self.rows, self._once)
        draws = self._redraw(draw)
        if bare:
            return self.defense.classify(x, draws)
        if self.mode in ("full", "fixed_noise"):
            logits: Tensor = self.defense(x, draws)
            return logits
        with torch.no_grad():
            purified = self.defense.purify(x, draws)
        approximation = x
        if self.mode in STAND_INS and torch.is_grad_enabled():
            approximation = self.defense.stand_in(self.mode, x, draws)
        return self.defense.classify(_straight_through(approximation, purified), draws)

    def classes(self, x: Tensor) -> int:
        """Return the number of classes, from one answer that no image is charged with."""
        first = torch.arange(1, device=x.device)
        with torch.no_grad():
            logits: Tensor = self.defense(x[first], self.draws[first])
        return logits.shape[1]

    def margins(self, x: Tensor, labels: Tensor, query: int) -> Tensor:
        """Return the margins (N,) of query number `query`, averaged over its EOT draws."""
        with torch.no_grad():
            margins = [margin(self(x, draw), labels) for draw in self._draws_of(query)]
        return margins[0] if len(margins) == 1 else torch.stack(margins).mean(0)

    def spare(self, count: Tensor) -> None:
        """Count so many forward passes (N,) int64 as spared: their answers were known."""
        self.passes.spared.index_add_(0, self.rows, count)

    def detector_score(self, x: Tensor, query: int) -> Tensor:
        """Return the purifier's detector score (N,), averaged over the EOT draws of `query`.

        Without a purifier it is zero.
        """
        with torch.no_grad():
            scores = [self._detector_score(x, draw) for draw in self._draws_of(query)]
        return torch.stack(scores).mean(0)

    def detector_gradient(self, x: Tensor, query: int) -> Tensor:
        """Return the input gradient (N,C,H,W) of the detector score, averaged as the score is."""
        gradients = []
        for draw in self._draws_of(query):
            point = x.detach().requires_grad_()
            with torch.enable_grad():
                value = self._detector_score(point, draw)
            gradients.append(_input_gradient(value, point))
        return torch.stack(gradients).mean(0)

    def evaluate(
        self, x: Tensor, labels: Tensor, loss: Loss, query: int, bare: bool = False
    ) -> Evaluation:
        """Return loss, margin and input gradient, averaged over the EOT draws of `query`.

        `bare` leaves out the purifier.
        """
        found = [self._evaluate(x, labels, loss, draw, bare) for draw in self._draws_of(query)]
        if len(found) == 1:
            return found[0]
        return Evaluation(
            torch.stack([one.loss for one in found]).mean(0),
            torch.stack([one.margin for one in found]).mean(0),
            torch.stack([one.gradient for one in found]).mean(0),
        )

    def _evaluate(self, x: Tensor, labels: Tensor, loss: Loss, draw: int, bare: bool) -> Evaluation:
        point = x.detach().requires_grad_()
        with torch.enable_grad():
            logits = self(point, draw, bare)
            value = loss(logits, labels)
        gradient = _input_gradient(value, point)
        self.passes.backward.index_add_(0, self.rows, self._once)
        return Evaluation(value.detach(), margin(logits.detach(), labels), gradient)

    def jacobian(
        self, x: Tensor, labels: Tensor, classes: Tensor, query: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the margin, and the gaps of k logits to the true one with their input gradients.

        The margin is (N,). The gaps are the logits of `classes` (N,k) minus the true one (N,k);
        their gradients are (N,k,C,H,W). All are averaged over the EOT draws of `query`. A draw
        costs one forward and k backward passes.
        """
        margins, gaps, gradients = [], [], []
        for draw in self._draws_of(query):
            point = x.detach().requires_grad_()
            with torch.enable_grad():
                logits = self(point, draw)
                gap = logits.gather(1, classes) - logits.gather(1, labels[:, None])
            margins.append(margin(logits.detach(), labels))
            gaps.append(gap.detach())
            each = [_input_gradient(one, point, retain=True) for one in gap.unbind(1)]
            gradients.append(torch.stack(each, 1))
            self.passes.backward.index_add_(0, self.rows, self._once, alpha=classes.shape[1])
        return (
            torch.stack(margins).mean(0),
            torch.stack(gaps).mean(0),
            torch.stack(gradients).mean(0),
        )

    def _detector_score(self, x: Tensor, draw: int) -> Tensor:
        if self.defense.purifier is not None:
            self.passes.forward.index_add_(0, self.rows, self._once)
        return self.defense.detector_score(x, self._redraw(draw))

    def _draws_of(self, query: int) -> range:
        """Return the numbers of the draws of a query."""
        return range(query * self.eot, (query + 1) * self.eot)

    def _redraw(self, draw: int) -> Draws:
        return self.draws.redraw(0 if self.mode == "fixed_noise" else draw)


def bind(defense: Defense, mode: Mode, draws: Draws, eot: int) -> Target:
    """Bind a defense to a gradient mode and to noise, for an attack on `len(draws)` images."""
    zeros = torch.zeros(len(draws), dtype=torch.int64, device=draws.ids.device)
    rows = torch.arange(len(draws), device=draws.ids.device)
    return Target(defense, mode, draws, eot, Passes(zeros, zeros.clone(), zeros.clone()), rows)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the true logit minus the largest other one (N,); NaN logits give NaN."""
    true = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return true - others.amax(1)


def _input_gradient(value: Tensor, point: Tensor, retain: bool = False) -> Tensor:
    # A purifier that cuts the graph (a comparison, a detach) has a gradient of zero. The checks
    # notice it.
    if not value.requires_grad:
        return torch.zeros_like(point)
    each = torch.ones_like(value)
    (gradient,) = torch.autograd.grad(value, point, each, retain_graph=retain, allow_unused=True)
    return torch.zeros_like(point) if gradient is None else gradient
