"""What a step of an attack costs an accelerator beside the network: operations, and waits for it.

Counted on a CPU by what PyTorch dispatches. Operations that only look at a tensor in another way,
or only reserve memory, start nothing on a device and are left out.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from toys import LINF, THREATS, parse_attack

from components.attacks import L2, Attack, Linf
from components.attacks import search as search_module
from components.attacks import square as square_module
from components.data.draws import Draws
from components.models.defense import Defense, bind

# After these the host needs a value, and waits until the device has computed it. An index by a mask
# is one, too: the number of its rows is not known before.
SYNCS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2")
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")
# They only reserve memory, or return their argument.
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh", "alias")


class Operations(TorchDispatchMode):
    """Counts operations by name, and syncs, while it is entered and not `paused`."""

    def __init__(self) -> None:
        super().__init__()
        self.paused = False
        self.operations: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket._qualified_op_name.split("::")[1]
        if not self.paused:
            self.operations[name] += not (func.is_view or name in FREE)
            masks = name in INDEXED and any(
                each is not None and each.dtype == torch.bool for each in args[1]
            )
            self.syncs[name] += masks or name in SYNCS
        return func(*args, **(kwargs or {}))


class Network(nn.Module):
    """A linear network that nothing fools, whose own operations are not counted."""

    def __init__(self, weight: Tensor, counter: Operations) -> None:
        super().__init__()
        self.weight, self.counter = nn.Parameter(weight), counter

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = _Uncounted.apply(x, self.weight, self.counter)  # type: ignore[no-untyped-call]
        return logits


class _Uncounted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counter: Operations) -> Tensor:
        ctx.shape, ctx.weight, ctx.counter, counter.paused = x.shape, weight, counter, True
        logits = x.flatten(1) @ weight
        logits[:, 0] += 1e3
        counter.paused = False
        return logits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.counter.paused = True
        gradient = (gradients[0] @ ctx.weight.T).view(ctx.shape)
        ctx.counter.paused = False
        return gradient, None, None


@dataclass(frozen=True)
class PerStep:
    """Operations and syncs of one step, the network's own left out."""

    operations: float
    syncs: float
    names: dict[str, float]


def count_operations(
    attack: Callable[[int], Attack], steps: tuple[int, int], threat: Linf | L2, images: int = 16
) -> PerStep:
    """Return what a step costs more: `attack` makes an attack of so many steps.

    Both numbers of `steps` are tried, so what an attack does once is not counted. It attacks RGB
    images of 10 classes that nothing fools.
    """
    found = []
    for count in steps:
        generator, counter = torch.Generator().manual_seed(0), Operations()
        weight = torch.randn(3 * 8 * 8, 10, generator=generator)
        defense = Defense(Network(weight, counter), None).freeze()
        draws, x = Draws(0, "attack", torch.arange(images)), torch.rand(images, 3, 8, 8)
        labels, one = torch.zeros(images, dtype=torch.int64), attack(count)
        target = bind(defense, "full", draws, getattr(one, "eot", 1))
        with counter:
            outcome = one.run(target, x, labels, threat, draws)
        assert (outcome.margin > 0).all(), "an image fell, and the rest got cheaper"
        found.append(counter)
    more = steps[1] - steps[0]
    names = {
        name: (found[1].operations[name] - found[0].operations[name]) / more
        for name in found[1].operations
    }
    syncs = found[1].syncs.total() - found[0].syncs.total()
    return PerStep(sum(names.values()), syncs / more, {k: v for k, v in names.items() if v > 0.01})


# What every attack may start in a step, under L-inf and L2, and the numbers of steps to compare.
# APGD reconsiders its step lengths now and then: the difference holds many checkpoints. Square asks
# about one change at a time at first.
MOST = {
    "pgd": ({"step": 0.25, "restarts": 1}, "steps", (16, 48), 25, 40),
    "apgd_ce": ({"restarts": 1}, "steps", (100, 200), 45, 55),
    "apgd_t": ({"targets": 3}, "steps", (100, 200), 60, 80),
    "square": ({}, "queries", (500, 1500), 50, 50),
}


@pytest.mark.parametrize("on", ["a CPU", "an accelerator"])
@pytest.mark.parametrize("name", MOST)
@THREATS
def test_a_step_starts_few_operations_and_seldom_waits(
    threat: Linf | L2, name: str, on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an accelerator it waits once in eight steps, and Square once in several queries."""
    accelerated = on == "an accelerator"
    if accelerated:
        monkeypatch.setattr(square_module, "_picks_rows", lambda device: False)
        monkeypatch.setattr(square_module, "_picks_rows", lambda device: False)
        monkeypatch.setattr(search_module, "_drops_every", lambda device: search_module.DROPS)
    settings, steps, counts, linf, l2 = MOST[name]
    step = count_operations(
        lambda count: parse_attack(name, **settings, **{steps: count}), counts, threat
    )
    # Three operations ask whether an image fell.
    most = (linf if threat is LINF else l2) + 3 * (not accelerated)
    assert step.operations <= most, step.names
    assert not accelerated or step.syncs <= (0.6 if name == "square" else 0.14)
