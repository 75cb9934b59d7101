"""What a network is like, found out on a few images: whether it is random, and has a gradient.

Neither is believed. A random network draws from torch's global streams, which are forked and seeded
here, so that they stay as they are for everybody else.
"""

import hashlib
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from components.data.draws import NoiseStream
from components.models.preprocessing import ForeignError

# Under so many seeds a network is asked.
SEEDS = 5
# As fractions of their length: answers further apart are different, and batches of other sizes move
# answers by less than the second (the rules of the checks).
TOLERANCE, SAME = 1e-4, 1e-3
# The lengths of the steps, in pixel values, by which a gradient is tried; pixels of each image that
# are moved; how far a slope may be from the gradient; the fraction of slopes that must agree.
STEPS, MOVED, CLOSE, AGREED = (1e-6, 1e-5, 1e-4, 1e-3), 8, 0.1, 0.75


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global streams of the CPU and of `device`; at the end restore them."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        # `torch.manual_seed` would also seed the GPUs that were not forked.
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def noise(stream: NoiseStream | None, x: Tensor) -> Iterator[None]:
    """Seed torch's global streams by a stream of keys, or freshly without one.

    Noise for pixels `x` in float64 is that for the same pixels in float32, so that a float64 copy
    of a random network is a copy of it.
    """
    double = x.dtype == torch.float64
    single = _InFloat32() if double else nullcontext()  # type: ignore[no-untyped-call]
    with seeded(seed_of(stream), x.device), single:
        yield


class _InFloat32(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Draws in float32 what is asked for in float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*given[0], **given[1])
        single_args, single_kwargs = tree_map(_single, given)
        result = func(*single_args, **single_kwargs)
        if func._schema.is_mutable:
            return args[0].copy_(single_args[0])
        double = given[1].get("dtype") == torch.float64 or any(map(_is_double, args))
        return tree_map(lambda one: one.double() if double and _floats(one) else one, result)


def _single(value: Any) -> Any:
    if value is torch.float64:
        return torch.float32
    return value.float() if _is_double(value) else value


def _is_double(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float64


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def seed_of(stream: NoiseStream | None) -> int:
    """Return a number in [0, 2^63) that all keys of a stream decide; unpredictable without one."""
    if stream is None:
        return secrets.randbits(63)
    drawn = stream.uniform((2,), "seed of the global stream").cpu().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(drawn, digest_size=8).digest(), "little") >> 1


def is_random(network: nn.Module, x: Tensor, what: str, answer: Callable[[Tensor], Tensor]) -> bool:
    """Return whether `answer` differs under other seeds by more than `TOLERANCE` of its length.

    Raises ForeignError if it depends on more than the image and the seed.
    """

    def ask(part: Tensor, seed: int) -> Tensor:
        with torch.no_grad(), seeded(seed, part.device):
            return answer(part)

    first = ask(x, 0)
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    spread = max(_apart(ask(x, seed), first) for seed in range(1, SEEDS))
    if _apart(ask(x, 0), first) > TOLERANCE:
        raise ForeignError(
            f"the {what} answers the same images differently under the same seed; it may draw "
            "noise from torch's global streams alone (torch.randn and its like, no generator of "
            "its own, no numpy, no random) and may keep nothing from call to call"
        )
    half = len(x) // 2
    others = torch.cat([x[:half], 1 - x[half:]])
    # With noise, other images may have moved its draws.
    moved, alone = _apart(ask(others, 0)[:half], first[:half]), _apart(ask(x[:1], 0), first[:1])
    if moved > max(SAME, spread) or (spread <= TOLERANCE and alone > SAME):
        raise ForeignError(
            f"the {what} answers an image differently beside other images; every image must be "
            "treated by itself, so let no BatchNorm run in train mode and take no statistics over "
            "the batch"
        )
    changed = [
        name
        for name, buffer in network.named_buffers()
        if name in buffers and not torch.equal(buffer, buffers[name])
    ]
    if changed:
        raise ForeignError(
            f"the {what} changes its own {', '.join(changed[:3])} while it answers; it must stay "
            "the same, so leave all of it in eval mode"
        )
    return spread > TOLERANCE


def _apart(one: Tensor, other: Tensor) -> float:
    """Return the largest distance between answers (N,...), as a fraction of the other's length."""
    gap, length = (one - other).flatten(1).norm(dim=1), other.flatten(1).norm(dim=1)
    return float((gap / length.clamp_min(1e-12)).max())


def is_differentiable(network: nn.Module, x: Tensor) -> bool:
    """Return whether most slopes of a purifier at pixels (N,C,H,W) are those of its gradient.

    Of every image the pixel of the largest gradient and some random ones are moved, one at a time
    and under the same noise: a single pixel can be moved far enough for float32 and not far enough
    to average over the steps of a staircase. A slope is right if it is within a tenth of the
    gradient over a step of some length. Where both are below a hundredth of the largest gradient,
    rounding could hide them, and nothing is judged.
    """
    network, x = _precise(network, _off_grid(x))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)

    def scalar(point: Tensor) -> Tensor:
        with seeded(0, point.device):
            purified: Tensor = network(point)
        return (weight * purified).flatten(1).sum(1)

    gradient = _gradient(scalar, x).flatten(1)
    largest, pixels = gradient.abs().max(1, keepdim=True)
    some = torch.randint(gradient.shape[1], (len(x), MOVED - 1), generator=generator)
    pixels = torch.cat([pixels, some.to(x.device)], 1)
    claimed = gradient.gather(1, pixels)
    if not bool(gradient.isfinite().all()) or float((largest > 0).double().mean()) < 0.5:
        return False
    right = torch.zeros_like(claimed, dtype=torch.bool)
    judged = ~right
    for step in STEPS:
        slopes = torch.stack([_slope(scalar, x, pixel, step) for pixel in pixels.unbind(1)], 1)
        size = torch.maximum(slopes.abs(), claimed.abs())
        judged = (size > 0.01 * largest) & (largest > 0)
        right |= judged & ((slopes - claimed).abs() <= CLOSE * size)
        if bool((right | ~judged).all()):
            break
    return float(right[judged].double().mean()) >= AGREED


def _gradient(scalar: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the gradient of `scalar` at `x`; zero where the network gives none."""
    point = x.detach().requires_grad_()
    try:
        with torch.enable_grad():
            value = scalar(point).sum()
        if value.requires_grad:
            found: Tensor | None
            (found,) = torch.autograd.grad(value, point, allow_unused=True)
            return torch.zeros_like(x) if found is None else found
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        # It answers without gradients, and fails on the way back: there is none to follow.
        pass
    return torch.zeros_like(x)


def _slope(scalar: Callable[[Tensor], Tensor], x: Tensor, pixel: Tensor, step: float) -> Tensor:
    """Return the slopes (N,) of `scalar` where pixel number `pixel` (N,) of each image moves."""
    move = torch.zeros_like(x).flatten(1)
    move = move.scatter_(1, pixel[:, None], step).view_as(x)
    with torch.no_grad():
        slope: Tensor = (scalar(x + move) - scalar(x - move)) / (2 * step)
    return slope


def _off_grid(x: Tensor) -> Tensor:
    """Return pixels away from 8-bit levels, where many networks have kinks, and from 0 and 1."""
    generator = torch.Generator().manual_seed(1)
    moved = x + (torch.rand(x.shape, generator=generator) - 0.5).to(x.device) / 255
    return 0.99 * (1 - (1 - moved.abs()).abs()) + 0.005


def _precise(network: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """Return a float64 copy and pixels, or both as they are if the network does not run in it."""
    copy = deepcopy(network).double()
    try:
        with torch.no_grad(), seeded(0, x.device):
            copy(x.double())
    except Exception:
        return network, x
    return copy, x.double()
