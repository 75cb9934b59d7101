"""A training on a GPU: close to that of a CPU, no step waits, workers average by NCCL."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from synthetic import CLASSES, SHAPE, THREAT, recipe
from torch import nn

from components.data.image_set import ImageSet
from components.models.classifiers import SmallCnn
from components.models.defense import channels_last
from components.training import batches, loop
from components.training.batches import Batches
from components.training.classification import AdversarialClassification, Classification
from components.training.contract import Frozen, InLoop
from components.training.loop import Training, fit

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")
PLAIN = Classification(kind="classification").bind(Frozen(None, (), THREAT))
HARDENED = AdversarialClassification(
    kind="adversarial_classification",
    attack=InLoop(steps=2, step=0.5, random_start=True, ramp=0.0),
    w_clean=0.5,
).bind(Frozen(None, (), THREAT))


def nothing(model: nn.Module, epoch: int) -> dict[str, float]:
    """Validate nothing."""
    return {}


def untrained() -> nn.Module:
    torch.manual_seed(0)
    return SmallCnn(kind="small_cnn", width=8).build(SHAPE, CLASSES)


def train(
    data: ImageSet, device: torch.device, config: Training, objective: Any = PLAIN
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train a network on a device; return it on the CPU, and the metrics of every epoch."""
    model = untrained().to(device)
    channels_last(model)
    epochs = [e.metrics for e in fit(model, objective, data, None, config, 0, nothing, None)]
    return model.to(CPU), epochs


def difference(one: nn.Module, other: nn.Module) -> float:
    """Return the largest difference of two networks' weights."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("kind", ["none", "flip_crop"])
def test_batches_are_those_of_the_cpu_to_the_bit(
    resident: bool, kind: str, train_images: ImageSet, gpu: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # The examples of a pool are not moved.
    pool = train_images.pixels() / 2 if kind == "none" else None
    monkeypatch.setattr(batches, "fits", lambda tensor, device: resident)
    here = list(Batches(train_images, pool, 100, kind, 0, CPU).epoch(2))
    there = list(Batches(train_images, pool, 100, kind, 0, gpu).epoch(2))
    for (one, draws), (other, others) in zip(here, there, strict=True):
        assert {x.device.type for x in (other.images, other.labels, others.ids)} == {gpu.type}
        pairs = [(one.images, other.images), (one.labels, other.labels), (draws.ids, others.ids)]
        if pool is not None:
            assert one.attacked is not None and other.attacked is not None
            pairs.append((one.attacked, other.attacked))
        assert all(torch.equal(a, b.cpu()) for a, b in pairs)


def test_a_set_that_does_not_fit_stays_in_main_memory(
    train_images: ImageSet, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = train_images.images.numel()
    monkeypatch.setattr(batches, "fits", lambda tensor, device: False)
    before = torch.cuda.memory_allocated() if gpu.type == "cuda" else 0
    made = Batches(train_images, None, 10, "none", 0, gpu)
    after = torch.cuda.memory_allocated() if gpu.type == "cuda" else 0
    assert after - before < size / 2 and made.images.tensor.device == CPU


# An attack takes the sign of a gradient, which turns rounding into whole steps: 2.0e-3 on an H200.
@pytest.mark.parametrize(
    ("objective", "close"), [(PLAIN, 1e-3), (HARDENED, 5e-3)], ids=["plain", "hardened"]
)
def test_a_few_steps_of_fit_end_close_to_those_of_the_cpu(
    objective: Any, close: float, train_images: ImageSet, gpu: torch.device, record_property: Any
) -> None:
    config = recipe(epochs=1, batch_size=50, optimiser="sgd", learning_rate=0.02)
    (one, metrics), (other, others) = (
        train(train_images, device, config, objective) for device in (CPU, gpu)
    )
    record_property("sgd, 8 steps: largest difference of a weight", difference(one, other))
    assert difference(one, other) < close < difference(one, untrained()) / 10
    assert others[0] == pytest.approx(metrics[0], abs=1e-2)


@pytest.mark.parametrize("optimiser", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_every_optimiser_and_precision_learns(
    optimiser: str, precision: str, train_images: ImageSet, gpu: torch.device
) -> None:
    if precision == "tf32" and gpu.type != "cuda":
        pytest.skip("a CPU has no TF32")
    rate = 0.1 if optimiser == "sgd" else 0.01
    config = recipe(
        epochs=3, batch_size=50, optimiser=optimiser, precision=precision, learning_rate=rate
    )
    _, epochs = train(train_images, gpu, config)
    assert epochs[-1]["loss"] < 0.8 * epochs[0]["loss"]


def test_a_training_goes_on_from_a_state_of_the_other_device(
    train_images: ImageSet, gpu: torch.device
) -> None:
    config = recipe(epochs=2, batch_size=100)
    for first, second in ((CPU, gpu), (gpu, CPU)):
        model = untrained().to(first)
        epoch = next(fit(model, PLAIN, train_images, None, config, 0, nothing, None))
        other = untrained().to(second)
        (last,) = fit(other, PLAIN, train_images, None, config, 0, nothing, deepcopy(epoch.state))
        assert last.metrics["loss"] < epoch.metrics["loss"]


def test_no_step_waits_for_the_gpu(train_images: ImageSet, gpu: torch.device) -> None:
    """Torch itself counts: more steps an epoch cost no more waits."""
    waits = []
    for batch_size in (200, 25):
        config = recipe(epochs=2, batch_size=batch_size, augmentation="flip_crop")
        model = untrained().to(gpu)
        epochs = fit(model, HARDENED, train_images, None, config, 0, nothing, None)
        next(epochs)  # the first epoch starts the libraries up
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if gpu.type == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            try:
                next(epochs)
            finally:
                if gpu.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing" in str(one.message) for one in caught))
    few, many = waits
    assert many <= few, waits


def test_the_peak_of_memory_is_noted(
    train_images: ImageSet, gpu: torch.device, record_property: Any
) -> None:
    if gpu.type != "cuda":
        pytest.skip("torch does not count the memory of a CPU")
    torch.cuda.reset_peak_memory_stats()
    train(train_images, gpu, recipe(epochs=1, batch_size=50), HARDENED)
    record_property(
        "MiB at the peak of a small training", torch.cuda.max_memory_allocated() / 2**20
    )
    assert torch.cuda.max_memory_allocated() > train_images.images.numel()


# Workers


@contextmanager
def group_of_one(gpu: torch.device, folder: Path) -> Iterator[None]:
    """Let this process be the only one of a group, by NCCL on a GPU."""
    backend = "nccl" if gpu.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_a_training_with_one_worker_is_that_without(
    train_images: ImageSet, gpu: torch.device, tmp_path: Path
) -> None:
    config = recipe(epochs=1, batch_size=50, optimiser="sgd", learning_rate=0.02)
    one, metrics = train(train_images, gpu, config)
    with group_of_one(gpu, tmp_path):
        other, others = train(train_images, gpu, config)
    assert difference(one, other) < 1e-4 and others[0] == pytest.approx(metrics[0], abs=1e-3)


def test_gradients_buffers_and_metrics_are_averaged_over_the_group(
    gpu: torch.device, tmp_path: Path
) -> None:
    """Where one of two workers answers, every sum is its own, and every mean half of it."""
    model = untrained().to(gpu).train()
    loss = model(torch.rand(8, *SHAPE, device=gpu)).square().mean()
    loss.backward()
    floats = [b for b in model.buffers() if b.is_floating_point()]
    before = [x.clone() for x in (*(p.grad for p in model.parameters()), *floats)]
    with group_of_one(gpu, tmp_path):
        loop._average_gradients(model, 2)
        loop._average_buffers(model, 2)
        means = loop._means([{"loss": loss.detach()}], 2)
    after = [*(p.grad for p in model.parameters()), *floats]
    assert all(torch.equal(a, b / 2) for a, b in zip(after, before, strict=True))
    assert means == {"loss": pytest.approx(loss.item() / 2)}
