"""One check, how it is run, and how many are run together.

The checks raise AssertionError themselves, with one sentence: `assert` says nothing outside pytest,
and is left out under `python -O`.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from components.data.image_set import Shape
from components.models.precision import full_precision

# Makes a fresh object at every call.
Make = Callable[..., Any]


@dataclass(frozen=True)
class Setting:
    """What a check tries its object on: images of `shape` in so many `classes`, on a `device`."""

    shape: Shape
    classes: int
    device: torch.device

    def images(self, count: int) -> Tensor:
        """Return grey images (count,C,H,W) on the device."""
        return grey_levels(count, self.shape).to(self.device)


@dataclass(frozen=True)
class Check:
    """One promise of the contract, by `name`; `str` of a check is its name.

    Called with `make`, it makes objects, tries them in full float32 and raises AssertionError with
    one sentence if the promise is broken. The same call does the same every time, and leaves the
    global random stream of torch as it was.
    """

    name: str
    promise: Callable[[Setting, Make], None]
    setting: Setting

    def __call__(self, make: Make) -> None:
        """Raise AssertionError if what `make` returns breaks the promise."""
        device = self.setting.device
        forked = [device] if device.type == "cuda" else []
        with full_precision(), torch.random.fork_rng(devices=forked):
            torch.manual_seed(0)
            self.promise(self.setting, make)

    def __str__(self) -> str:
        return self.name


def checks_of(promises: Sequence[Callable[[Setting, Make], None]], setting: Setting) -> list[Check]:
    """Return a check of every promise, named after its function."""
    return [Check(promise.__name__, promise, setting) for promise in promises]


def run_all(checks: Sequence[Check], make: Make, expected_to_fail: Mapping[str, str]) -> None:
    """Run all checks; raise one AssertionError with a line for each that is not as expected.

    `expected_to_fail` gives the reason by the name of the check: one of these that passes is listed
    too. Raises ValueError for a name that is no check.
    """
    names = [check.name for check in checks]
    unknown = sorted(set(expected_to_fail) - set(names))
    if unknown:
        raise ValueError(
            f"expected_to_fail names {', '.join(unknown)}; the checks are {', '.join(names)}"
        )
    lines = []
    for check in checks:
        failure, reason = _failure(check, make), expected_to_fail.get(check.name)
        if failure is not None and reason is None:
            lines.append(f"{check.name}: {failure}")
        if failure is None and reason is not None:
            lines.append(f"{check.name}: it passes but was expected to fail ({reason})")
    if lines:
        head = f"{len(lines)} of {len(checks)} checks did not come out as expected:"
        raise AssertionError("\n  ".join([head, *lines]))


def _failure(check: Check, make: Make) -> str | None:
    """Return in one sentence how the check fails; None if it passes."""
    try:
        check(make)
    except AssertionError as error:
        return str(error) or "an assertion without a message failed"
    except Exception as error:
        return f"it raised {type(error).__name__}: {error}"
    return None


def require(holds: bool | Tensor, sentence: str) -> None:
    """Raise AssertionError with this sentence unless the promise holds."""
    if not bool(holds):
        raise AssertionError(sentence)


def require_images(found: Tensor, given: Tensor) -> None:
    """Require images of the shape, dtype and device of those `given`, finite and in [0,1]."""
    for fact in ("shape", "dtype", "device"):
        got, wanted = getattr(found, fact), getattr(given, fact)
        require(got == wanted, f"images of {fact} {wanted} came back with {fact} {got}")
    require(found.isfinite().all(), "pixels came back that are not finite")
    low, high = found.min().item(), found.max().item()
    require(low >= 0 and high <= 1, f"pixels came back from {low:.4g} to {high:.4g}, not in [0,1]")


def random_streams(device: torch.device) -> tuple[str, ...]:
    """Return the states of all global random streams: of torch, of its device, numpy and random."""
    torches = [torch.get_rng_state()]
    if device.type == "cuda":
        torches.append(torch.cuda.get_rng_state(device))
    states = [state.numpy().tobytes().hex() for state in torches]
    return (*states, str(np.random.get_state(legacy=False)), str(random.getstate()))


def require_untouched(module: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Require that parameters and buffers are what they were, and every part in eval mode."""
    after = module.state_dict()
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    require(not moved, f"a call changed {', '.join(moved)}")
    training = [name or "the module" for name, part in module.named_modules() if part.training]
    require(not training, f"a call left {', '.join(training)} in training mode")


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of all parameters and buffers."""
    return {key: value.clone() for key, value in module.state_dict().items()}


def shuffled(count: int, device: torch.device) -> Tensor:
    """Return the numbers below `count` in an order that is the same every time."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(3)).to(device)


def grey_levels(count: int, shape: Shape) -> Tensor:
    """Return images (count, *shape) of 8-bit grey levels with many pixels of exactly 0 and 1."""
    generator = torch.Generator().manual_seed(1)
    levels = torch.randint(-128, 384, (count, *shape), generator=generator).clamp(0, 255)
    return levels.float() / 255
