"""How a network is trained: optimiser, schedule, and `fit`, a generator of epochs.

`fit` only trains. Its caller chooses the device, stores and reports every epoch, and may stop after
any. Everything random is keyed by seed, epoch and image id, so weights, optimiser and epoch are the
whole state, and a resumed training ends with the weights of an uninterrupted one.

Where `torch.distributed` is initialised, gradients are averaged over its workers. They divide the
batch among them: the global batch is the same for any number of workers.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from components.config import Config
from components.data.image_set import ImageSet
from components.models.precision import Precision, float32_products, require_device
from components.training import Diverged
from components.training.batches import Batches
from components.training.contract import Metrics, Objective, Taught
from components.training.optimisers import Optimiser

# Takes the network after an epoch, and the index of the epoch; returns what to log of it.
Validate = Callable[[nn.Module, int], Mapping[str, float]]


class Training(Config):
    """The settings of a training.

    `one_cycle` raises the rate linearly over the first 15 % of the steps, then lowers it along a
    cosine to zero; `constant` keeps it. An objective that takes x' from the pool allows no
    `augmentation` (`Batches`).

    `precision` is that of the loss and its gradients, attacks in the loss included; weights stay
    float32. `float32` is full; `tf32` rounds the factors of products on a GPU to TF32; `bfloat16`
    is mixed precision (autocast). Validation, scoring and the attacks outside of a training are
    always in full float32.
    """

    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=2)]
    optimiser: Optimiser
    learning_rate: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    schedule: Literal["constant", "one_cycle"]
    augmentation: Literal["none", "flip", "flip_crop"]
    precision: Precision


@dataclass(frozen=True)
class Epoch:
    """A finished epoch, counted from 0: its mean metrics, and the state to resume from."""

    index: int
    metrics: dict[str, float]
    state: dict[str, Any]


def fit(
    model: nn.Module,
    objective: Objective,
    data: ImageSet,
    attacked: Tensor | None,
    config: Training,
    seed: int,
    validate: Validate,
    state: Mapping[str, Any] | None,
) -> Iterator[Epoch]:
    """Train `model` in place and yield after every epoch; resume from `state` if it is given.

    `attacked` (N,C,H,W) float32 is x' of the pool, in the order of `data`. Outputs of teachers that
    never change (`Taught`) are computed once, before the first step; the weights are the same as if
    every step computed them. The host reads values from the device once an epoch. Raises ValueError
    if the batch is larger than the data or not divisible by the workers, if `attacked` meets an
    augmentation, or the device lacks the precision; Diverged if the loss is not finite.
    """
    rank, world = _rank_and_world()
    if config.batch_size > len(data) or config.batch_size % world:
        raise ValueError(
            f"batch_size {config.batch_size} must be at most the {len(data)} training images "
            f"and a multiple of the {world} workers"
        )
    device = next(model.parameters()).device
    require_device(config.precision, device)
    optimiser = _optimiser(model, config, fused=device.type == "cuda")
    start = 0
    if state is not None:
        model.load_state_dict(state["model"])
        _resume(optimiser, state["optimiser"])
        start = int(state["epoch"]) + 1
    batches = Batches(
        data, attacked, config.batch_size, config.augmentation, seed, device, rank, world
    )
    if isinstance(objective, Taught) and config.augmentation == "none":
        with float32_products(tf32=config.precision == "tf32"), _autocast(config, device):
            batches.store(objective.teach)
    for epoch in range(start, config.epochs):
        model.train()
        with float32_products(tf32=config.precision == "tf32"):
            metrics = _train(model, objective, optimiser, batches, epoch, config, world)
        _average_buffers(model, world)
        model.eval()
        means = _means(metrics, world)
        if not all(math.isfinite(value) for value in means.values()):
            raise Diverged(f"training diverged in epoch {epoch + 1}: {means}; lower learning_rate")
        yield Epoch(
            epoch,
            {**means, **validate(model, epoch)},
            {"epoch": epoch, "model": model.state_dict(), "optimiser": optimiser.state_dict()},
        )


def _train(
    model: nn.Module, objective: Objective, optimiser: torch.optim.Optimizer, batches: Batches,
    epoch: int, config: Training, world: int,
) -> list[Metrics]:  # fmt: skip
    """Train for one epoch; return the metrics of every step, on the device.

    Nothing here reads a value from the device: that would make the host wait for it in every step.
    """
    metrics: list[Metrics] = []
    for batch, draws in batches.epoch(epoch):
        progress = (batch.step + 1) / (config.epochs * len(batches))
        for group in optimiser.param_groups:
            group["lr"] = _rate(config, progress)
        # For each step anew: autocast keeps rounded copies of the weights until its end.
        with _autocast(config, batches.device):
            loss, seen = objective(model, batch, progress, draws)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        _average_gradients(model, world)
        optimiser.step()
        metrics.append({name: value.detach().float() for name, value in seen.items()})
    return metrics


def _autocast(config: Training, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16")


def _rank_and_world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _optimiser(model: nn.Module, config: Training, fused: bool) -> torch.optim.Optimizer:
    """Return the optimiser; a fused one updates all weights by one kernel of the GPU."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return config.optimiser.build(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused or None
    )


def _resume(optimiser: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a state that may come from another device: whether it is fused is a matter of this."""
    fused = optimiser.defaults["fused"]
    groups = [{**group, "fused": fused} for group in state["param_groups"]]
    optimiser.load_state_dict({**state, "param_groups": groups})


def _rate(config: Training, progress: float) -> float:
    if config.schedule == "constant":
        return config.learning_rate
    warm_up = 0.15
    if progress < warm_up:
        return config.learning_rate * progress / warm_up
    cosine = math.cos(math.pi * (progress - warm_up) / (1 - warm_up))
    return config.learning_rate * (1 + cosine) / 2


def _average_gradients(model: nn.Module, world: int) -> None:
    if world == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient) / world)
        start += gradient.numel()


def _average_buffers(model: nn.Module, world: int) -> None:
    if world == 1:
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= world


def _means(metrics: list[Metrics], world: int) -> dict[str, float]:
    names = list(metrics[0])
    means = torch.stack([torch.stack([m[name] for m in metrics]).mean() for name in names])
    if world > 1:
        dist.all_reduce(means)
        means /= world
    return dict(zip(names, means.tolist(), strict=True))
