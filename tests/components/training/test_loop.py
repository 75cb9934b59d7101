"""Training repeats to the bit, resumes as if uninterrupted, and reports divergence."""

import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from toys import LINF, head
from training_toys import CONFIG, Recorder, Scalar, changed, nothing, record

from components.data.draws import Draws
from components.data.image_set import ImageSet
from components.models.checkpoints import (
    STATES_KEPT,
    latest_state,
    pack_state,
    save_state,
)
from components.models.classifiers import SmallCnn
from components.models.identity import state_digest
from components.models.purifiers import PurifierConfig
from components.training import Diverged, loop
from components.training.classification import AdversarialClassification, Classification
from components.training.contract import Batch, Frozen, InLoop, Metrics, Objective
from components.training.koo import NormalTeacher
from components.training.loop import Training, fit

NOISY = {
    "kind": "random_transform",
    "inner": {
        "kind": "conv_autoencoder", "blocks": 2, "width": 4, "strided": [], "residual": "none",
    },
    "transform": {"kind": "rt2", "patch": 2, "missing": 0.25, "sigma": 0.1},
}  # fmt: skip


def network_and_objective(kind: str, seed: int = 0) -> tuple[nn.Module, Objective]:
    """Return an untrained network with BatchNorm, and its objective."""
    torch.manual_seed(seed)
    if kind == "classifier":
        model: nn.Module = SmallCnn(kind="small_cnn", width=4).build((1, 8, 8), 10)
        return model, Classification(kind="classification").bind(Frozen(None, (), LINF))
    model = TypeAdapter(PurifierConfig).validate_python(NOISY).build((1, 8, 8))
    return model, NormalTeacher(kind="normal_teacher").bind(Frozen(None, (), LINF))


def train(kind: str, data: ImageSet, config: Training, seed: int = 0) -> str:
    model, objective = network_and_objective(kind)
    for _ in fit(model, objective, data, None, config, seed, nothing, None):
        pass
    return state_digest(model)


@pytest.fixture(scope="module")
def few(train_set: ImageSet) -> ImageSet:
    return head(train_set, 150)


# Repeating and resuming


@pytest.mark.parametrize("kind", ["classifier", "purifier"])
@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_the_same_seed_trains_the_same_bytes(kind: str, optimiser: str, few: ImageSet) -> None:
    config = changed(epochs=2, optimiser=optimiser)
    first = train(kind, few, config)
    torch.manual_seed(77)
    torch.rand(5)
    assert train(kind, few, config) == first
    assert train(kind, few, config, seed=1) != first


def test_an_epoch_does_not_use_the_global_random_stream(few: ImageSet) -> None:
    model, objective = network_and_objective("purifier")
    stream = torch.get_rng_state()
    next(fit(model, objective, few, None, CONFIG, 0, nothing, None))
    assert torch.equal(torch.get_rng_state(), stream)


@pytest.mark.parametrize("kind", ["classifier", "purifier"])
@pytest.mark.parametrize("optimiser", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("interrupted", [0, 2])
def test_a_resumed_training_ends_with_the_weights_of_an_uninterrupted_one(
    kind: str, optimiser: str, interrupted: int, few: ImageSet, tmp_path: Path
) -> None:
    config = changed(optimiser=optimiser)
    uninterrupted = train(kind, few, config)
    model, objective = network_and_objective(kind)
    for epoch in fit(model, objective, few, None, config, 0, nothing, None):
        save_state(tmp_path, epoch.index, pack_state(epoch.state))
        if epoch.index == interrupted:
            break
    # Other initial weights, which the state must replace.
    other, objective = network_and_objective(kind, seed=5)
    stored = latest_state(tmp_path)
    assert stored is not None
    rest = list(fit(other, objective, few, None, config, 0, nothing, stored))
    assert [epoch.index for epoch in rest] == list(range(interrupted + 1, 4))
    assert state_digest(other) == uninterrupted


def cut_off_the_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", [cut_off_the_end, flip_a_bit, Path.unlink])
def test_a_damaged_state_is_replaced_by_the_one_before(
    file: str, damage: Any, few: ImageSet, tmp_path: Path
) -> None:
    uninterrupted = train("classifier", few, CONFIG)
    model, objective = network_and_objective("classifier")
    for epoch in fit(model, objective, few, None, CONFIG, 0, nothing, None):
        save_state(tmp_path, epoch.index, pack_state(epoch.state))
        if epoch.index == 2:
            break
    damage(tmp_path / "epoch-000002" / file)
    stored = latest_state(tmp_path)
    assert stored is not None and stored["epoch"] == 1
    model, objective = network_and_objective("classifier", seed=5)
    rest = list(fit(model, objective, few, None, CONFIG, 0, nothing, stored))
    assert [epoch.index for epoch in rest] == [2, 3] and state_digest(model) == uninterrupted


def test_the_newest_states_are_kept_and_damaged_ones_are_ignored(tmp_path: Path) -> None:
    assert latest_state(tmp_path / "missing") is None
    for epoch in range(5):
        save_state(
            tmp_path, epoch, pack_state({"epoch": epoch, "weight": torch.tensor(float(epoch))})
        )
        stored = latest_state(tmp_path)
        assert stored is not None and stored["weight"] == epoch
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["epoch-000003", "epoch-000004"] and len(names) == STATES_KEPT >= 2
    for path in tmp_path.glob("*/state.pt"):
        flip_a_bit(path)
    assert latest_state(tmp_path) is None


def test_a_finished_training_does_not_train_again(few: ImageSet) -> None:
    model, objective = network_and_objective("classifier")
    config = changed(epochs=1)
    (epoch,) = fit(model, objective, few, None, config, 0, nothing, None)
    digest = state_digest(model)
    assert list(fit(model, objective, few, None, config, 0, nothing, epoch.state)) == []
    assert state_digest(model) == digest


def test_training_with_an_attack_in_the_loop_is_repeatable(few: ImageSet) -> None:
    """The noise of the attack is keyed by image, and its examples depend on the network alone."""
    attack = InLoop(steps=2, step=0.7, random_start=True, ramp=0.5)
    section = AdversarialClassification(
        kind="adversarial_classification", attack=attack, w_clean=0.5
    )
    digests = []
    for _ in range(2):
        model, _ = network_and_objective("classifier")
        objective = section.bind(Frozen(None, (), LINF))
        for _ in fit(model, objective, few, None, changed(epochs=2), 0, nothing, None):
            pass
        digests.append(state_digest(model))
    assert digests[0] == digests[1]


# Schedule


def rates(recorder: Recorder) -> list[float]:
    """Return the learning rate of every step but the last, from the weight it moved.

    With gradient 1 Nesterov's step is rate * (1 + 0.9 * b), b = 1 + 0.9 b the momentum.
    """
    found, momentum = [], 0.0
    for before, after in pairwise(recorder.weights):
        momentum = 0.9 * momentum + 1
        found.append((before - after) / (1 + 0.9 * momentum))
    return found


def test_one_cycle_warms_up_over_15_percent_and_falls_along_a_cosine(few: ImageSet) -> None:
    recorder = record(few, epochs=10, learning_rate=0.5)
    steps = 10 * (150 // 32)
    assert recorder.progress == pytest.approx([(k + 1) / steps for k in range(steps)])
    expected = [
        0.5 * p / 0.15 if p < 0.15 else 0.5 * (1 + math.cos(math.pi * (p - 0.15) / 0.85)) / 2
        for p in recorder.progress
    ]
    assert rates(recorder) == pytest.approx(expected[:-1], rel=1e-3, abs=1e-5)
    assert expected[-1] == 0 and max(expected) > 0.499
    assert expected[0] == pytest.approx(0.5 / (0.15 * steps))


def test_a_constant_rate_stays_constant_and_a_resumed_training_continues_the_schedule(
    few: ImageSet,
) -> None:
    constant = rates(record(few, schedule="constant", learning_rate=0.5))
    assert constant == pytest.approx([0.5] * len(constant), rel=1e-3)
    model, recorder = Scalar(), Recorder()
    config = changed(optimiser="sgd", weight_decay=0.0, augmentation="none")
    first = next(fit(model, recorder, few, None, config, 0, nothing, None))
    rest = Recorder()
    list(fit(Scalar(9.0), rest, few, None, config, 0, nothing, first.state))
    assert recorder.progress + rest.progress == record(few).progress
    assert recorder.weights + rest.weights == pytest.approx(record(few).weights)


# Precision


@pytest.mark.parametrize(
    ("precision", "computed"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_the_loss_is_computed_in_the_configured_precision(
    precision: str, computed: torch.dtype, few: ImageSet
) -> None:
    seen = set()

    def objective(
        model: nn.Module, batch: Batch, progress: float, draws: Draws
    ) -> tuple[Tensor, Metrics]:
        found = batch.images.flatten(1) @ model.get_parameter("weight").expand(64, 1)
        seen.add(found.dtype)
        return found.float().mean(), {"loss": found.mean()}

    model = Scalar()
    (epoch,) = fit(
        model, objective, few, None, changed(epochs=1, precision=precision), 0, nothing, None
    )
    assert seen == {computed}
    assert model.weight.dtype == torch.float32 and isinstance(epoch.metrics["loss"], float)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_is_on_around_a_training_changes_no_bit_of_it(precision: str, few: ImageSet) -> None:
    """And a training leaves it on, between epochs as well."""
    config = changed(epochs=2, precision=precision)
    expected = train("classifier", few, config)
    model, objective = network_and_objective("classifier")
    torch.set_float32_matmul_precision("medium")
    try:
        for _ in fit(model, objective, few, None, config, 0, nothing, None):
            assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert state_digest(model) == expected


def test_tf32_is_on_in_the_steps_of_a_training_alone(
    few: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[str] = set()
    matmul: Any = torch.backends.cuda.matmul

    def objective(
        model: nn.Module, batch: Batch, progress: float, draws: Draws
    ) -> tuple[Tensor, Metrics]:
        seen.add(matmul.fp32_precision)
        loss = model.get_parameter("weight").sum()
        return loss, {"loss": loss}

    def validate(model: nn.Module, epoch: int) -> dict[str, float]:
        seen.add(f"validated in {torch.get_float32_matmul_precision()}")
        return {}

    config = changed(epochs=1, precision="tf32")
    with pytest.raises(ValueError, match="precision tf32 needs a GPU"):
        next(fit(Scalar(), objective, few, None, config, 0, nothing, None))
    monkeypatch.setattr(loop, "require_device", lambda precision, device: None)
    next(fit(Scalar(), objective, few, None, config, 0, validate, None))
    assert seen == {"tf32", "validated in highest"}


# Divergence and invalid settings


@pytest.mark.parametrize(("optimiser", "rate"), [("sgd", 1e12), ("adam", 1e30)])
def test_a_diverging_training_raises_diverged(optimiser: str, rate: float, few: ImageSet) -> None:
    model, objective = network_and_objective("classifier")
    config = changed(optimiser=optimiser, learning_rate=rate, schedule="constant")
    with pytest.raises(Diverged, match=r"diverged in epoch \d: .*lower learning_rate"):
        for _ in fit(model, objective, few, None, config, 0, nothing, None):
            pass


def test_a_batch_larger_than_the_data_is_refused(few: ImageSet) -> None:
    model, objective = network_and_objective("classifier")
    with pytest.raises(ValueError, match="batch_size 151 must be at most the 150 training images"):
        next(fit(model, objective, few, None, changed(batch_size=151), 0, nothing, None))
    assert next(fit(model, objective, few, None, changed(batch_size=150), 0, nothing, None))


@pytest.mark.parametrize(
    "change",
    [{"epochs": 0}, {"batch_size": 1}, {"learning_rate": 0.0}, {"weight_decay": -1.0},
     {"schedule": "cosine"}, {"optimizer": "adam"}, {"learning_rate": float("inf")}],
)  # fmt: skip
def test_invalid_settings_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        changed(**change)


# Two workers


class Plain(nn.Module):
    """A network without BatchNorm, so that its gradient is a mean over images however they are
    divided, and with a buffer, which workers must average.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, 4, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(64, 10)
        )
        self.register_buffer("seen", torch.zeros(10))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        if self.training:
            with torch.no_grad():
                self.seen.copy_(logits.mean(0))
        return logits


def train_plainly(data: ImageSet) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    torch.manual_seed(0)
    model = Plain()
    objective = Classification(kind="classification").bind(Frozen(None, (), LINF))
    config = changed(epochs=2, optimiser="sgd", augmentation="flip_crop")
    epochs = fit(model, objective, data, None, config, 0, nothing, None)
    metrics = [epoch.metrics for epoch in epochs]
    return model.state_dict(), metrics


def work(rank: int, folder: str, data: ImageSet) -> None:
    """Train as one of two workers and save the result in `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        state, metrics = train_plainly(data)
        refused = ""
        try:
            next(fit(Plain(), Recorder(), data, None, changed(batch_size=33), 0, nothing, None))
        except ValueError as error:
            refused = str(error)
        torch.save({"state": state, "metrics": metrics, "refused": refused}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_workers_train_the_same_weights_as_one(few: ImageSet, tmp_path: Path) -> None:
    started = time.monotonic()
    context = mp.spawn(work, (str(tmp_path), few), nprocs=2, join=False)
    while not context.join(timeout=1):
        if time.monotonic() - started > 30:
            for process in context.processes:
                process.kill()
            pytest.skip("two workers took more than 30 s on this machine")
    alone, metrics = train_plainly(few)
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, tensor in alone.items():
        assert torch.equal(both[0]["state"][name], both[1]["state"][name]), name
        assert torch.allclose(both[0]["state"][name], tensor, atol=1e-5), name
    for one, two in zip(metrics, both[0]["metrics"], strict=True):
        assert two == pytest.approx(one, abs=1e-4)
    assert both[0]["metrics"] == both[1]["metrics"]
    assert "a multiple of the 2 workers" in both[0]["refused"]
