"""Attacks by torchattacks, wrapped so that its traps cannot bite.

torchattacks reseeds the global random stream (here: a forked one), sets the mode of the model it is
given and leaves gradients in its parameters (here: a throw-away module around the target, with one
parameter of no account), counts no passes (the target does), and trusts its own clipping (here:
projected once more). It asks about rows it does not name, so noise cannot be bound to images: what
it offers is refused against a stochastic target.

Only what is right in the pinned 3.3.0 stands here. NI-FGSM (Lin et al. 2020) does not: its look
ahead is longer than in the paper by the number of pixels, and out of the ball and of [0,1].
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from components.attacks.contract import L2, Attack, Linf, Outcome, Positive
from components.attacks.square import margins
from components.data.draws import Draws
from components.models.defense import Target


class MiFgsm(Attack):
    """MI-FGSM (Dong et al. 2018): `steps` of `step` times the radius along the accumulated sign.

    `decay` is the share of the accumulated gradient that is carried on; 1 in the paper. Made to
    transfer: the last iterate is returned, fooling or not. An image whose gradient vanishes stays
    where that happens. For L-inf and deterministic targets.
    """

    kind: Literal["mi_fgsm"]
    steps: Positive
    step: Annotated[float, Field(gt=0)]
    decay: Annotated[float, Field(ge=0)]

    def effort(self) -> int:
        """Every step is one pass."""
        return self.steps

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return the last iterate; images that are wrong already are left as they are."""
        if not isinstance(threat, Linf):
            raise ValueError("mi_fgsm steps along the sign: for linf threats only, not l2")
        # Imported here because it takes a second, which no stage without it should pay.
        import torchattacks

        eps, length = threat.eps, self.step * threat.eps
        return borrowed(
            lambda model: torchattacks.MIFGSM(model, eps, length, self.steps, self.decay),
            self.kind, self.steps, target, images, labels, threat,
        )  # fmt: skip


def borrowed(
    make: Callable[[nn.Module], Any], kind: str, steps: int, target: Target, images: Tensor,
    labels: Tensor, threat: Linf | L2,
) -> Outcome:  # fmt: skip
    """Run the attack of torchattacks that `make` builds on the images that are still right.

    Raises ValueError for a stochastic target.
    """
    if target.stochastic:
        raise ValueError(f"{kind} cannot bind noise to images: not for stochastic defenses")
    found, margin = images.clone(), margins(target, images, labels, 0)
    rows = (margin > 0).nonzero().flatten()
    spent = torch.zeros_like(labels).index_fill_(0, rows, steps)
    if len(rows):
        origin = images[rows].contiguous()
        with torch.random.fork_rng():
            moved = make(_Module(target[rows])).forward(origin, labels[rows])
        found[rows] = threat.project(moved.detach(), origin)
        margin[rows] = margins(target[rows], found[rows], labels[rows], 1)
    return Outcome(found, margin.float(), spent)


class _Module(nn.Module):
    """A target in the form torchattacks wants: a module with a parameter, so with a device.

    The target is no submodule, so neither modes nor gradients get at the networks behind it.
    """

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros((), device=target.rows.device))
        self.target = target

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = _Logits.apply(x, self.target)  # type: ignore[no-untyped-call]
        return logits


class _Logits(torch.autograd.Function):
    """Logits (N,K) whose graph leads to the pixels and to no parameter, each pass counted."""

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
