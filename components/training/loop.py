"""How a network is trained: optimiser, schedule, and `fit`, a generator of epochs.

`fit` only trains. Its caller chooses the device, stores and reports every epoch, and may stop after
any. Everything random is keyed by seed, epoch and image id, so weights, optimiser and epoch are the
whole state, and a resumed training ends with the weights of an uninterrupted one.

Where `torch.distributed` is initialised, gradients are averaged over its workers. They divide the
batch among them: the global batch is the same for any number of workers.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from components.config import Config
from components.data.draws import Draws
from components.data.image_set import ImageSet
from components.training import Diverged
from components.training.contract import Batch, Objective

# Takes the network after an epoch, and the index of the epoch; returns what to log of it.
Validate = Callable[[nn.Module, int], Mapping[str, float]]


class Training(Config):
    """The settings of a training.

    `one_cycle` raises the rate linearly over the first 15 % of the steps, then lowers it along a
    cosine to zero; `constant` keeps it. `augmentation` moves x and x' alike. `adam_gan` is Adam
    with the moments of Gulrajani et al. 2017 (0.5 and 0.9). With `precision` bfloat16 the loss,
    including attacks in it, is computed in mixed precision (autocast); weights stay float32.
    """

    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=2)]
    optimiser: Literal["adam", "adamw", "adam_gan", "sgd"]
    learning_rate: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    schedule: Literal["constant", "one_cycle"]
    augmentation: Literal["none", "flip", "flip_crop"]
    precision: Literal["float32", "bfloat16"]


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

    `attacked` (N,C,H,W) float32 is x' of the pool, in the order of `data`. Raises ValueError if
    the batch is larger than the data or not divisible by the workers, Diverged if the loss is not
    finite.
    """
    rank, world = _rank_and_world()
    if config.batch_size > len(data) or config.batch_size % world:
        raise ValueError(
            f"batch_size {config.batch_size} must be at most the {len(data)} training images "
            f"and a multiple of the {world} workers"
        )
    optimiser = _optimiser(model, config)
    start = 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        start = int(state["epoch"]) + 1
    steps = len(data) // config.batch_size
    for epoch in range(start, config.epochs):
        model.train()
        metrics: list[dict[str, Tensor]] = []
        order = _order(len(data), seed, epoch)
        for step in range(steps):
            # The remainder of an epoch is left out: BatchNorm cannot train on a batch of one.
            rows = order[step * config.batch_size : (step + 1) * config.batch_size][rank::world]
            progress = (epoch * steps + step + 1) / (config.epochs * steps)
            batch, draws = _batch(data, attacked, rows, config, seed, epoch, model)
            batch = replace(batch, step=epoch * steps + step)
            for group in optimiser.param_groups:
                group["lr"] = _rate(config, progress)
            with torch.autocast(
                batch.images.device.type, torch.bfloat16, config.precision != "float32"
            ):
                loss, seen = objective(model, batch, progress, draws)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            _average_gradients(model, world)
            optimiser.step()
            metrics.append({name: value.detach().float() for name, value in seen.items()})
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


def _rank_and_world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _optimiser(model: nn.Module, config: Training) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimiser == "sgd":
        return torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=decay, nesterov=True)
    kind = torch.optim.AdamW if config.optimiser == "adamw" else torch.optim.Adam
    betas = (0.5, 0.9) if config.optimiser == "adam_gan" else (0.9, 0.999)
    return kind(parameters, rate, betas=betas, weight_decay=decay)


def _rate(config: Training, progress: float) -> float:
    if config.schedule == "constant":
        return config.learning_rate
    warm_up = 0.15
    if progress < warm_up:
        return config.learning_rate * progress / warm_up
    cosine = math.cos(math.pi * (progress - warm_up) / (1 - warm_up))
    return config.learning_rate * (1 + cosine) / 2


def _order(count: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(_epoch_seed(seed, epoch))
    return torch.randperm(count, generator=generator)


def _epoch_seed(seed: int, epoch: int) -> int:
    return seed * 1_000_003 + epoch


def _batch(
    data: ImageSet,
    attacked: Tensor | None,
    rows: Tensor,
    config: Training,
    seed: int,
    epoch: int,
    model: nn.Module,
) -> tuple[Batch, Draws]:
    device = next(model.parameters()).device
    chosen = data[rows]
    draws = Draws(_epoch_seed(seed, epoch), "train", chosen.ids.to(device))
    images = chosen.pixels().to(device)
    both = [images] if attacked is None else [images, attacked[rows].to(device)]
    both = [_augment(x, config.augmentation, draws) for x in both]
    return Batch(both[0], chosen.labels.to(device), both[1] if len(both) > 1 else None), draws


def _augment(x: Tensor, kind: str, draws: Draws) -> Tensor:
    """Flip and crop (padding 4) every image by its own draws: equal draws move x and x' alike."""
    if kind == "none":
        return x
    flip = draws.uniform((1, 1, 1), "flip") < 0.5
    x = torch.where(flip, x.flip(3), x)
    if kind == "flip":
        return x
    padded = F.pad(x, (4, 4, 4, 4))
    shift = (draws.uniform((2,), "crop") * 9).long()
    down = shift[:, 0, None] + torch.arange(x.shape[2], device=x.device)
    right = shift[:, 1, None] + torch.arange(x.shape[3], device=x.device)
    rows = torch.arange(len(x), device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[rows, down[:, :, None], right[:, None, :]].permute(0, 3, 1, 2)


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


def _means(metrics: list[dict[str, Tensor]], world: int) -> dict[str, float]:
    names = list(metrics[0])
    means = torch.stack([torch.stack([m[name] for m in metrics]).mean() for name in names])
    if world > 1:
        dist.all_reduce(means)
        means /= world
    return dict(zip(names, means.tolist(), strict=True))
