"""Square (Andriushchenko et al. 2020), by torchattacks, wrapped so that its traps cannot bite.

torchattacks reseeds the global random stream at every call (here: a forked one, with a seed from
the images' own draws), sets modes on the model it is given (here: a throw-away module around the
target) and counts no queries (here: read from the run). It asks the model about rows it does not
name, so noise cannot be bound to images: Square is refused against a stochastic target.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from components.attacks.contract import L2, Attack, Linf, Outcome, Positive
from components.defense import Target, margin
from components.draws import Draws


class Square(Attack):
    """Random search with square patches: no gradient, at most `queries` forward passes."""

    kind: Literal["square"]
    queries: Positive

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return the fooling image, or the clean one where none was found.

        Raises ValueError for a stochastic target.
        """
        if target.stochastic:
            raise ValueError("square cannot bind noise to images: not for stochastic defenses")
        attack = _square(target, threat, self.queries, _seed(draws))
        with torch.random.fork_rng(), torch.no_grad():
            found = attack.forward(images.contiguous(), labels)
        # Clipping to eps in float32 can overshoot by a rounding; the projection does not.
        found = threat.project(found.detach(), images)
        with torch.no_grad():
            attacked = target(images, 0).argmax(1) == labels  # as the library chooses them
            reached = margin(target(found, 0), labels)
        queries = torch.zeros_like(labels)
        if bool(attacked.any()):
            queries[attacked] = attack.queries.to(queries.dtype)
        target.passes.forward.index_add_(0, target.rows, queries)
        return Outcome(found, reached, queries)


def _seed(draws: Draws) -> int:
    return int(draws.uniform((1,), "square")[0].item() * 2**24) if len(draws) else 0


def _square(target: Target, threat: Linf | L2, queries: int, seed: int) -> Any:
    """Make the library's attack, which also remembers the queries spent on each image."""
    # Imported here because it takes a second, which no stage without Square should pay.
    import torchattacks

    class Remembering(torchattacks.Square):  # type: ignore[misc]
        queries = torch.zeros(0)

        def attack_single_run(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            self.queries, best = super().attack_single_run(x, y)
            return self.queries, best

    norm = "Linf" if isinstance(threat, Linf) else "L2"
    return Remembering(
        _Module(target), norm=norm, eps=threat.eps, n_queries=queries, n_restarts=1, seed=seed
    )


class _Module(nn.Module):
    """A target in the form torchattacks wants: a module with a parameter, so with a device."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros((), device=target.rows.device))
        self.call = target.defense

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.call(x)
        return logits
