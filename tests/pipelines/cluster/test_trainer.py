"""A training without Ray: epochs are reported in order, it resumes, its errors are raised as is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from components.attacks import Linf
from components.data.image_set import ImageSet
from components.data.shards import DataError, sha256
from components.models.checkpoints import ModelCard
from components.models.classifiers import SmallCnn
from components.training.classification import Classification
from components.training.contract import Frozen
from components.training.loop import Training
from pipelines.cluster.trainer import TrainingTask, train
from pipelines.config.resources import TrainingWorkers

EPOCHS = 3
NO_WORKERS = TrainingWorkers(workers=0, cpus=1, gpus=0)
WEIGHTS = "weights.safetensors"


@pytest.fixture
def setup(digits: ImageSet) -> Callable[..., TrainingTask]:
    """Return a setup of a small classifier on a few digits."""
    some = digits[torch.arange(64)]
    config = SmallCnn(kind="small_cnn", width=2)

    def task(device: str) -> TrainingTask:
        torch.manual_seed(0)
        model = config.build(some.shape, 10)
        model.normalise_by(some.pixels())
        threat = Linf(norm="linf", eps_255=8.0)
        training = Training(
            epochs=EPOCHS, batch_size=32, optimiser="adam", learning_rate=0.01, weight_decay=0.0,
            schedule="one_cycle", augmentation="none", precision="float32",
        )  # fmt: skip
        card = ModelCard(
            format=1, family="classifier", model=config.model_dump(mode="json"),
            shape=list(some.shape), class_names=list(some.class_names), provenance={},
        )  # fmt: skip
        return TrainingTask(
            model=model,
            objective=Classification(kind="classification").bind(Frozen(None, (), threat)),
            data=some,
            attacked=None,
            training=training,
            seed=0,
            validate=lambda network, epoch: {},
            finish=lambda network: None,
            card=lambda network: card,
        )

    return task


class Log:
    """What a training reports."""

    def __init__(self) -> None:
        self.epochs: list[tuple[int, dict[str, float]]] = []
        self.lines: list[str] = []

    def run(self, setup: Callable[..., TrainingTask], folder: Path, out: str) -> dict[str, float]:
        """Train into a folder, which another training may have left states in."""
        return train(
            setup, {}, folder / out, folder / "work", NO_WORKERS,
            lambda index, metrics: self.epochs.append((index, dict(metrics))), self.lines.append,
        )  # fmt: skip


def test_every_epoch_is_reported_once_and_in_order(
    setup: Callable[..., TrainingTask], tmp_path: Path
) -> None:
    log = Log()
    last = log.run(setup, tmp_path, "out")
    assert [index for index, _ in log.epochs] == list(range(EPOCHS))
    assert log.epochs[-1][1] == last and "loss" in last
    assert log.lines == []


def test_a_resumed_training_reports_all_epochs_and_where_it_resumed(
    setup: Callable[..., TrainingTask], tmp_path: Path
) -> None:
    first, second = Log(), Log()
    first.run(setup, tmp_path, "first")
    newest = sorted((tmp_path / "work/states").glob("epoch-*"))[-1]
    (newest / "state.pt").write_bytes(b"damaged")
    second.run(setup, tmp_path, "second")
    assert second.lines == [
        f"{newest} is damaged and was passed over", f"goes on after epoch {EPOCHS - 1}",
    ]  # fmt: skip
    assert [index for index, _ in second.epochs] == list(range(EPOCHS))
    assert [loss(metrics) for _, metrics in second.epochs] == [
        loss(metrics) for _, metrics in first.epochs
    ]
    one, other = (sha256(tmp_path / name / WEIGHTS) for name in ("first", "second"))
    assert one == other


def loss(metrics: dict[str, Any]) -> float:
    """Return the loss of an epoch; its seconds differ."""
    return float(metrics["loss"])


def test_an_error_of_a_training_is_raised_as_it_is(tmp_path: Path) -> None:
    def damaged(device: str) -> TrainingTask:
        raise DataError("part-00000.parquet was altered")

    with pytest.raises(DataError, match=r"^part-00000\.parquet was altered$"):
        Log().run(damaged, tmp_path, "out")
    assert not (tmp_path / "out").exists()
