"""Attacks of the library torchattacks, wrapped so that its side effects stay outside.

- It reseeds the global random stream: here it runs in a forked one.
- It sets the mode of the model and leaves gradients in its parameters: here it gets a throw-away
  module around the target, with one dummy parameter.
- It counts no passes: the target does.
- It relies on its own clipping: here the result is projected once more.
- It climbs the cross-entropy, which is flat where the classifier is confident: here it is shown
  logits whose cross-entropy climbs along the same direction and is never flat (`_Module`).
- It evaluates subsets of the batch without saying which images they are, so noise cannot be keyed
  per image: here it is refused for stochastic targets.

Only attacks that are right in the pinned version 3.3.0 are wrapped. NI-FGSM (Lin et al. 2020) is
not: its look-ahead step is as many times too long as the image has pixels, and leaves the ball and
[0,1].
"""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from components.attacks.contract import (
    L2,
    Attack,
    Cost,
    Linf,
    LossFamily,
    Outcome,
    Positive,
    nan_as_fooled,
)
from components.attacks.gradient import log_odds
from components.data.draws import Draws
from components.models.defense import Target


class MiFgsm(Attack):
    """MI-FGSM (Dong et al. 2018): `steps` steps of `step` times the radius, with momentum.

    Each step follows the sign of the accumulated gradient, of which `decay` is carried on to the
    next (1 in the paper). Made to transfer, so the last iterate is returned, fooling or not. An
    image stays where its gradient vanishes. Raises ValueError for L2 and for stochastic targets.
    """

    losses: ClassVar[tuple[LossFamily, ...]] = ("cross-entropy",)
    # It steps along the sign.
    norms: ClassVar[tuple[str, ...]] = ("linf",)

    kind: Literal["mi_fgsm"]
    steps: Positive
    step: Annotated[float, Field(gt=0)]
    decay: Annotated[float, Field(ge=0)]

    def effort(self, classes: int, stochastic: bool) -> Cost:
        """One gradient per step, and one query of the image before and after."""
        return Cost(self.steps + 2, self.steps)

    def require_fit(self, stochastic: bool) -> None:
        """Raise ValueError for a stochastic target."""
        if stochastic:
            raise ValueError("mi_fgsm cannot bind noise to images: not for stochastic defenses")

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return the last iterate; the clean image where it is misclassified already."""
        self.require_fit(target.stochastic)
        self.require_norm(threat)
        # Imported here because it takes a second, which only those who use it should pay.
        import torchattacks

        eps, length = threat.eps, self.step * threat.eps
        return run_torchattack(
            lambda model: torchattacks.MIFGSM(model, eps, length, self.steps, self.decay),
            self.steps, target, images, labels, threat,
        )  # fmt: skip


def run_torchattack(
    make: Callable[[nn.Module], Any], steps: int, target: Target, images: Tensor,
    labels: Tensor, threat: Linf | L2,
) -> Outcome:  # fmt: skip
    """Run the attack that `make` builds for a module, on the images that are classified correctly.

    `steps` is the number of iterations that are reported for them. Not for stochastic targets.
    """
    found, margin = images.clone(), nan_as_fooled(target.margins(images, labels, 0))
    rows = (margin > 0).nonzero().flatten()
    spent = torch.zeros_like(labels).index_fill_(0, rows, steps)
    if len(rows):
        origin = images[rows].contiguous()
        with torch.random.fork_rng():
            moved = make(_Module(target[rows], labels[rows])).forward(origin, labels[rows])
        found[rows] = threat.project(moved.detach(), origin)
        margin[rows] = nan_as_fooled(target[rows].margins(found[rows], labels[rows], 1))
    return Outcome(found, margin.float(), spent)


class _Module(nn.Module):
    """A target as torchattacks needs it: a module that has a parameter, and so a device.

    It returns logits (N,K) of which only the true class and one other are possible, and equally
    likely: the cross-entropy towards the true class is log 2, and its gradient half of that of the
    `log_odds`. The target is no submodule: its networks are out of reach of `train()` and of
    gradients.
    """

    def __init__(self, target: Target, labels: Tensor) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros((), device=target.rows.device))
        self.target, self.labels = target, labels

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = _Logits.apply(x, self.target)  # type: ignore[no-untyped-call]
        odds = log_odds(logits, self.labels)
        true, other = self.labels[:, None], (self.labels[:, None] + 1) % logits.shape[1]
        none = torch.full_like(logits, -torch.inf, dtype=odds.dtype)
        return none.scatter(1, true, 0).scatter(1, other, (odds - odds.detach())[:, None])


class _Logits(torch.autograd.Function):
    """Logits (N,K) that are differentiable in the pixels but in no parameter; counts passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Target) -> Tensor:
        ctx.target, ctx.point = target, x.detach().requires_grad_()
        with torch.enable_grad():
            ctx.logits = target(ctx.point, 0)
        logits: Tensor = ctx.logits.detach()
        return logits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        rows = ctx.target.rows
        ctx.target.passes.backward.index_add_(0, rows, torch.ones_like(rows))
        if not ctx.logits.requires_grad:
            return torch.zeros_like(ctx.point), None
        (found,) = torch.autograd.grad(ctx.logits, ctx.point, gradients[0], allow_unused=True)
        return (torch.zeros_like(ctx.point) if found is None else found), None
