"""The time to purify an image, for every purifier, and DiffDefense against a loop over images.

    python benchmarks/purify.py [--images 32] [--rounds 3] [--device cpu]

Networks have their papers' widths for 28 x 28 images and untrained weights, which do not affect the
time. All purifiers take turns within one run, on the same batch and on one thread (or the device).
The table has medians over the rounds in milliseconds per image, without and with the exact gradient
that an attack would take, and multiples of the direct denoiser.

The loop is DiffDefense as its authors' code has it, one image at a time, with torch's Adam. The R
starts of an image run one by one, or together as one batch, which favours the loop. It computes the
same as ours, with noise of its own.
"""

import argparse
import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from components.data.draws import Draws, NoiseStream
from components.models.purifiers import InferenceConfig, Purifier, PurifierConfig
from components.models.purifiers.diffusion.ddpm import Diffusion, linear_alpha_bar

SHAPE = (1, 28, 28)
DENOISER = {"kind": "denoiser", "width": 64}
KOO = {"kind": "conv_autoencoder", "blocks": 15, "width": 64, "strided": [1], "residual": "none"}
RT2 = {"kind": "rt2", "patch": 4, "missing": 0.25, "sigma": 0.25}
GAN = {"kind": "gan", "latent": 128, "width": 64}
DDPM = {
    "kind": "ddpm", "width": 10, "steps": 100, "beta_start": 1e-5, "beta_end": 0.02,
    "centred": False, "norm_input": True,
}  # fmt: skip
APUDAE = {
    "kind": "apudae", "steps": 15, "rate": 0.4, "optimiser": "sgd", "target": "minimum",
    "scaled": False, "noise_255": 0, "transform": None,
}  # fmt: skip


def diffdefense(mode: str, iterations: int, restarts: int, rate: float) -> dict[str, Any]:
    return {
        "kind": "diffdefense", "mode": mode, "iterations": iterations, "restarts": restarts,
        "steps": 15, "rate": rate,
    }  # fmt: skip


def defense_gan(iterations: int, restarts: int) -> dict[str, Any]:
    return {
        "kind": "defense_gan", "iterations": iterations, "restarts": restarts, "rate": 10.0,
    }  # fmt: skip


# name -> (network, inference or None, whether its exact gradient is timed as well)
PURIFIERS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, bool]] = {
    "denoiser, direct": (DENOISER, None, True),
    "Koo, 15 + 15 blocks": (KOO, None, True),
    "AToP RT2 on it": ({"kind": "random_transform", "transform": RT2, "inner": KOO}, None, True),
    "MagNet reformer": ({"kind": "magnet", "width": 3}, None, True),
    "APuDAE, 15 steps": (DENOISER, APUDAE, True),
    "APuDAE by Adam, 15 steps": (DENOISER, {**APUDAE, "optimiser": "adam"}, True),
    "Defense-GAN, L 25, R 1": (GAN, defense_gan(25, 1), True),
    "Defense-GAN, L 25, R 10": (GAN, defense_gan(25, 10), False),
    "Defense-GAN, L 100, R 10": (GAN, defense_gan(100, 10), False),
    "Defense-GAN, L 200, R 10": (GAN, defense_gan(200, 10), False),
    "DiffDefense released, L 5, R 1": (DDPM, diffdefense("released", 5, 1, 25.0), True),
    "DiffDefense released, L 4, R 5": (DDPM, diffdefense("released", 4, 5, 25.0), True),
    "DiffDefense released, L 5, R 5": (DDPM, diffdefense("released", 5, 5, 25.0), True),
    "DiffDefense ddim, L 5, R 1": (DDPM, diffdefense("ddim", 5, 1, 0.2), True),
    "DiffDefense ddim, L 5, R 5": (DDPM, diffdefense("ddim", 5, 5, 0.2), False),
    "DiffPure-style, DDPM, 10 steps": (
        DDPM, {"kind": "diffpure", "t_star": 40, "sampler": "ddpm", "substeps": 10}, True,
    ),
    "DiffPure-style, DDIM, 10 steps": (
        DDPM, {"kind": "diffpure", "t_star": 40, "sampler": "ddim", "substeps": 10}, True,
    ),
}  # fmt: skip


def build(network: dict[str, Any], inference: dict[str, Any] | None, device: str) -> Purifier:
    torch.manual_seed(0)
    built: nn.Module = TypeAdapter(PurifierConfig).validate_python(network).build(SHAPE)
    if inference is not None:
        built = TypeAdapter(InferenceConfig).validate_python(inference).wrap(built)
    assert isinstance(built, Purifier)
    built.eval().requires_grad_(False).to(device)
    return built.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def timed(work: Callable[[], Any], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def input_gradient(purifier: Purifier, x: Tensor, stream: NoiseStream) -> Tensor:
    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(purifier(point, stream).square().sum(), point)
    return gradient


def purify_in_loop(
    network: Diffusion, x: Tensor, iterations: int, restarts: int, together: bool
) -> list[float]:
    """Purify image by image as the authors' code does; return the errors of the best starts."""
    alpha_bars = linear_alpha_bar(15, 1e-4, 0.02).tolist()
    errors = []
    for image in x:
        groups = [restarts] if together else [1] * restarts
        found = [_fit(network, image, size, iterations, alpha_bars) for size in groups]
        errors.append(min(float(each.min()) for each in found))
    return errors


def _fit(
    network: Diffusion, image: Tensor, count: int, iterations: int, alpha_bars: list[float]
) -> Tensor:
    """Fit `count` starts to one image; return their errors (count,)."""
    z = torch.randn(count, *image.shape, device=image.device).requires_grad_()
    optimiser = torch.optim.Adam([z], lr=0.02, betas=(0.5, 0.999))
    error = torch.empty(0)
    for index in range(iterations):
        at: Tensor = z
        for t in reversed(range(15)):
            with torch.no_grad():
                eps = network(at, torch.full((count,), t, device=at.device))
            here, after = alpha_bars[t], alpha_bars[t - 1] if t else 1.0
            variance = (1 - after) / (1 - here) * (1 - here / after)
            start = (at - math.sqrt(1 - here) * eps) / math.sqrt(here)
            at = math.sqrt(after) * start + math.sqrt(max(1 - after - variance, 0)) * eps
            if t:
                at = at + math.sqrt(variance) * torch.randn_like(at)
        squared = (torch.sigmoid(at) - image).square().flatten(1).mean(1)
        error = squared.detach()
        for group in optimiser.param_groups:
            group["lr"] = 0.02 if index == 0 else 25 * 0.1 ** (index / math.ceil(0.8 * iterations))
        optimiser.zero_grad()
        squared.mean().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return error


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device, count = options.device, options.images
    x = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(0)).to(device)
    stream = Draws(0, "clean", torch.arange(count, device=device)).stream()
    built = {name: build(n, i, device) for name, (n, i, _) in PURIFIERS.items()}
    forward: dict[str, list[float]] = {name: [] for name in built}
    with_gradient: dict[str, list[float]] = {name: [] for name in built if PURIFIERS[name][2]}
    loops: dict[bool, list[float]] = {True: [], False: []}
    few = x[: max(1, min(4, count))]
    for round_ in range(options.rounds + 1):
        for name, purifier in built.items():
            with torch.no_grad():
                taken = timed(lambda p=purifier: p(x, stream), device)
            if round_:  # the first round warms up
                forward[name].append(taken / count)
            if name in with_gradient:
                taken = timed(lambda p=purifier: input_gradient(p, x, stream), device)
                if round_:
                    with_gradient[name].append(taken / count)
        network = built["DiffDefense released, L 4, R 5"].network
        for together in loops:
            taken = timed(lambda n=network, t=together: purify_in_loop(n, few, 4, 5, t), device)
            if round_:
                loops[together].append(taken / len(few))
        print(f"round {round_} of {options.rounds}", flush=True)
    unit = median(forward["denoiser, direct"])
    print(f"\n{count} images of 28 x 28 at once, {device}, median of {options.rounds} rounds")
    print(f"{'':34}{'ms/image':>10}{'x direct':>10}{'with gradient':>15}")
    for name, times in forward.items():
        gradient = f"{'-':>15}"
        if name in with_gradient:
            gradient = f"{1e3 * median(with_gradient[name]):15.1f}"
        print(f"{name:34}{1e3 * median(times):10.2f}{median(times) / unit:10.0f}{gradient}")
    ours = forward["DiffDefense released, L 4, R 5"]
    print("\nDiffDefense released, L 4, R 5, in a loop over 4 images:")
    for together, slow in loops.items():
        ratios = [theirs / mine for theirs, mine in zip(slow, ours, strict=True)]
        how = "an image's starts together" if together else "start by start"
        print(
            f"{how:34}{1e3 * median(slow):10.2f} ms/image, {median(ratios):.2f} times ours "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
