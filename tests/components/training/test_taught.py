"""Outputs of teachers are computed once where they never change, and train the same weights."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from toys import LINF, head
from training_toys import AUTOENCODER, IN_LOOP, NOISY, bind, changed, nothing

from components.data.draws import Draws
from components.data.image_set import ImageSet
from components.models.classifiers import SmallCnn
from components.models.defense import channels_last
from components.models.identity import state_digest
from components.models.purifiers import PurifierConfig
from components.training import batches
from components.training.batches import Batches
from components.training.contract import Batch, Frozen, Taught, Teacher
from components.training.loop import fit

EPOCHS = 3
# 150 images: every epoch leaves 30 out.
CONFIG: dict[str, Any] = {"epochs": EPOCHS, "batch_size": 40, "augmentation": "none"}
PASSES = EPOCHS * 3


@pytest.fixture(scope="module")
def coloured(train_set: ImageSet) -> ImageSet:
    """Images of three channels: networks in channels last answer in that layout."""
    some = head(train_set, 150)
    images = torch.cat([some.images, some.images.flip(2), some.images.flip(3)], 1)
    return ImageSet(images, some.labels, some.ids, some.class_names)


def network(config: dict[str, Any], seed: int) -> Any:
    torch.manual_seed(seed)
    built = TypeAdapter(PurifierConfig).validate_python(config).build((3, 8, 8))
    channels_last(built)
    return built.train()


class Run:
    """A student, trained from two teachers; `passes` counts the batches that a teacher saw."""

    def __init__(
        self, data: ImageSet, stored: bool, teachers: dict[str, Any] = AUTOENCODER,
        training: dict[str, Any] = CONFIG, **changes: Any,
    ) -> None:  # fmt: skip
        self.passes = 0
        torch.manual_seed(3)
        classifier = SmallCnn(kind="small_cnn", width=4).build((3, 8, 8), 10).eval()
        both = [network(teachers, seed).eval() for seed in (1, 2)]
        both[0].register_forward_hook(self._count)
        frozen = [classifier.requires_grad_(False), *(one.requires_grad_(False) for one in both)]
        objective = bind(
            "distillation",
            Frozen(frozen[0], [Teacher(frozen[1], False), Teacher(frozen[2], True)], LINF),
            **changes,
        )
        if not stored and isinstance(objective, Taught):
            objective = objective.objective
        student = network(AUTOENCODER, 0)
        config = changed(**training)
        attacked = None
        if changes.get("adversary", {}).get("kind", "pool") == "pool":
            attacked = LINF.start(data.pixels(), Draws(0, "attack", data.ids), "pool")
        self.metrics = [
            epoch.metrics
            for epoch in fit(student, objective, data, attacked, config, 0, nothing, None)
        ]
        self.weights = state_digest(student)

    def _count(self, *_: object) -> None:
        self.passes += 1


@pytest.mark.parametrize("adversary", ["pool", "none"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_stored_outputs_train_the_same_weights_in_fewer_passes(
    adversary: str, precision: str, coloured: ImageSet
) -> None:
    training = {**CONFIG, "precision": precision}
    changes = {"training": training, "adversary": {"kind": adversary}, "w_classification": 1.0}
    stored, anew = (Run(coloured, stored, **changes) for stored in (True, False))
    assert stored.weights == anew.weights and stored.metrics == anew.metrics
    # Four batches of 40 hold 150 images, the last from image 110 on.
    assert (stored.passes, anew.passes) == (4, PASSES)


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {**CONFIG, "augmentation": "flip"}, "adversary": {"kind": "none"}},
        {"adversary": {"kind": "classifier", **IN_LOOP}},
        {"adversary": {"kind": "defense", **IN_LOOP}},
        {"teachers": {**NOISY, "inner": AUTOENCODER}},
    ],
    ids=[
        "flipped images",
        "attacks on the classifier",
        "attacks on the defense",
        "random teachers",
    ],
)
def test_outputs_that_change_are_computed_in_every_step(
    changes: dict[str, Any], coloured: ImageSet
) -> None:
    assert Run(coloured, True, **changes).passes == PASSES


def test_outputs_that_take_too_much_memory_are_computed_in_every_step(
    coloured: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = 150 * 3 * 8 * 8 * 4
    monkeypatch.setattr(batches, "STORED", 2 * one)
    fits = Run(coloured, True)
    monkeypatch.setattr(batches, "STORED", 2 * one - 1)
    too_much = Run(coloured, True)
    # The size is known after one batch.
    assert (fits.passes, too_much.passes) == (4, PASSES + 1)
    assert fits.weights == too_much.weights


@pytest.mark.parametrize("rank", [0, 1])
def test_every_worker_finds_the_outputs_of_its_own_images(rank: int, coloured: ImageSet) -> None:
    attacked = torch.rand(150, 3, 8, 8)
    cpu = torch.device("cpu")
    mine = Batches(coloured, attacked, 40, "none", 0, cpu, rank, world=2)
    sizes = []

    def teach(batch: Batch) -> Sequence[Tensor]:
        assert batch.attacked is not None
        sizes.append(len(batch.labels))
        labels = batch.labels[:, None, None, None].expand(-1, 1, 8, 8)
        return [batch.images + labels, batch.attacked.to(memory_format=torch.channels_last)]

    mine.store(teach)
    assert set(sizes) == {20}, "as large as the batches of the training"
    for epoch in range(2):
        for batch, _ in mine.epoch(epoch):
            for stored, anew in zip(batch.taught, teach(batch), strict=True):
                assert torch.equal(stored, anew) and stored.stride() == anew.stride()
