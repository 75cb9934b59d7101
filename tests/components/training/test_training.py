"""Training is repeatable to the bit, resumes as if undisturbed, and says so when it diverges."""

import math
import time
from collections.abc import Mapping
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from toys import LINF

from components.data.draws import Draws
from components.data.image_set import ImageSet
from components.models.checkpoints import STATES_KEPT, latest_state, pack_state, save_state, state_digest
from components.models.classifiers import SmallCnn
from components.models.purifiers import PurifierConfig
from components.training.classification import AdversarialClassification, Classification
from components.training.contract import Batch, Frozen, InLoop, Metrics, Objective
from components.training.koo import NormalTeacher
from components.training.loop import Diverged, Epoch, Training, fit

CONFIG = Training(
    epochs=4,
    batch_size=32,
    optimiser="adamw",
    learning_rate=0.01,
    weight_decay=0.001,
    schedule="one_cycle",
    augmentation="flip_crop",
    precision="float32",
)
NOISY = {
    "kind": "random_transform",
    "inner": {
        "kind": "conv_autoencoder", "blocks": 2, "width": 4, "strided": [], "residual": "none",
    },
    "transform": {"kind": "rt2", "patch": 2, "missing": 0.25, "sigma": 0.1},
}  # fmt: skip


def nothing(model: nn.Module, epoch: int) -> Mapping[str, float]:
    return {}


def changed(**changes: Any) -> Training:
    return Training(**{**CONFIG.model_dump(), **changes})


def network_and_objective(kind: str, seed: int = 0) -> tuple[nn.Module, Objective]:
    """Return an untrained network with BatchNorm and what to teach it."""
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
    return train_set[torch.arange(150)]


class Scalar(nn.Module):
    """One weight, so that every step of the optimiser can be seen."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value]))


class Recorder:
    """An objective of gradient 1 that remembers what it was called with."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.ids: list[list[int]] = []
        self.progress: list[float] = []
        self.weights: list[float] = []
        self.noise: list[Tensor] = []

    def __call__(
        self, model: nn.Module, batch: Batch, progress: float, draws: Draws
    ) -> tuple[Tensor, Metrics]:
        assert model.training and draws.role == "train"
        weight = model.get_parameter("weight")
        self.batches.append(batch)
        self.ids.append(draws.ids.tolist())
        self.progress.append(progress)
        self.weights.append(weight.item())
        self.noise.append(draws.uniform((2,), "test"))
        return weight.sum(), {"loss": weight.sum(), "step": torch.tensor(float(len(self.ids)))}


def record(data: ImageSet, attacked: Tensor | None = None, **changes: Any) -> Recorder:
    recorder = Recorder()
    steps = {"optimiser": "sgd", "weight_decay": 0.0, "augmentation": "none", **changes}
    for _ in fit(Scalar(), recorder, data, attacked, changed(**steps), 0, nothing, None):
        pass
    return recorder


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


def test_an_epoch_takes_nothing_from_the_global_stream(few: ImageSet) -> None:
    model, objective = network_and_objective("purifier")
    stream = torch.get_rng_state()
    next(fit(model, objective, few, None, CONFIG, 0, nothing, None))
    assert torch.equal(torch.get_rng_state(), stream)


@pytest.mark.parametrize("kind", ["classifier", "purifier"])
@pytest.mark.parametrize("optimiser", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("interrupted", [0, 2])
def test_a_resumed_training_ends_as_an_undisturbed_one(
    kind: str, optimiser: str, interrupted: int, few: ImageSet, tmp_path: Path
) -> None:
    config = changed(optimiser=optimiser)
    undisturbed = train(kind, few, config)
    model, objective = network_and_objective(kind)
    for epoch in fit(model, objective, few, None, config, 0, nothing, None):
        save_state(tmp_path, epoch.index, pack_state(epoch.state))
        if epoch.index == interrupted:
            break
    other, objective = network_and_objective(
        kind, seed=5
    )  # another start, which the state must overrule
    stored = latest_state(tmp_path)
    assert stored is not None
    rest = list(fit(other, objective, few, None, config, 0, nothing, stored))
    assert [epoch.index for epoch in rest] == list(range(interrupted + 1, 4))
    assert state_digest(other) == undisturbed


def damage_nothing_but_the_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", [damage_nothing_but_the_end, flip_a_bit, Path.unlink])
def test_a_damaged_state_falls_back_to_the_one_before(
    file: str, damage: Any, few: ImageSet, tmp_path: Path
) -> None:
    undisturbed = train("classifier", few, CONFIG)
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
    assert [epoch.index for epoch in rest] == [2, 3] and state_digest(model) == undisturbed


def test_the_newest_states_are_kept_and_none_is_none(tmp_path: Path) -> None:
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


def test_a_finished_training_trains_no_further(few: ImageSet) -> None:
    model, objective = network_and_objective("classifier")
    config = changed(epochs=1)
    (epoch,) = fit(model, objective, few, None, config, 0, nothing, None)
    digest = state_digest(model)
    assert list(fit(model, objective, few, None, config, 0, nothing, epoch.state)) == []
    assert state_digest(model) == digest


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


def test_a_constant_rate_is_constant_and_resuming_meets_the_schedule_where_it_was(
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
def test_the_loss_is_computed_in_the_precision_asked_for(
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


# What an epoch is


def test_every_epoch_shows_every_image_once_in_an_order_of_its_own(few: ImageSet) -> None:
    recorder = record(few, epochs=3, batch_size=30)
    epochs = [list(chain.from_iterable(recorder.ids[k : k + 5])) for k in (0, 5, 10)]
    for shown in epochs:
        assert sorted(shown) == sorted(few.ids.tolist())
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert all(len(batch.labels) == 30 for batch in recorder.batches)


def test_the_remainder_of_an_epoch_is_left_out(few: ImageSet) -> None:
    recorder = record(few, epochs=2, batch_size=40)
    assert [len(ids) for ids in recorder.ids] == [40] * 6
    assert len(set(chain.from_iterable(recorder.ids[:3]))) == 120


def test_batches_are_the_images_with_their_own_labels_and_examples(few: ImageSet) -> None:
    attacked = torch.rand(150, 1, 8, 8)
    recorder = record(few, attacked, epochs=1)
    row_of = {image: row for row, image in enumerate(few.ids.tolist())}
    for batch, ids in zip(recorder.batches, recorder.ids, strict=True):
        rows = torch.tensor([row_of[image] for image in ids])
        assert torch.equal(batch.images, few.pixels()[rows])
        assert torch.equal(batch.labels, few.labels[rows])
        assert batch.attacked is not None and torch.equal(batch.attacked, attacked[rows])
    assert record(few, epochs=1).batches[0].attacked is None


def test_noise_is_new_in_every_epoch_and_belongs_to_the_image(few: ImageSet) -> None:
    recorder = record(few, epochs=2, batch_size=50)
    noise = [
        {image: tuple(row) for ids, rows in zip(recorder.ids[k : k + 3], recorder.noise[k : k + 3],
         strict=True) for image, row in zip(ids, rows.tolist(), strict=True)}
        for k in (0, 3)
    ]  # fmt: skip
    assert all(noise[0][image] != noise[1][image] for image in noise[0])
    other = record(few, epochs=1, batch_size=75)
    for ids, rows in zip(other.ids, other.noise, strict=True):
        assert all(noise[0][i] == tuple(r) for i, r in zip(ids, rows.tolist(), strict=True))


def test_an_epoch_reports_means_and_what_validation_said_in_eval_mode(few: ImageSet) -> None:
    modes = []

    def validate(model: nn.Module, epoch: int) -> Mapping[str, float]:
        modes.append((epoch, model.training))
        return {"val": 0.25}

    config = changed(optimiser="sgd", batch_size=50, epochs=2)
    seen: list[Epoch] = []
    for epoch in fit(Scalar(), Recorder(), few, None, config, 0, validate, None):
        seen.append(epoch)
    assert [e.index for e in seen] == [0, 1] and modes == [(0, False), (1, False)]
    assert seen[0].metrics["step"] == pytest.approx(2) and seen[0].metrics["val"] == 0.25
    assert seen[1].metrics["step"] == pytest.approx(5)


# Augmentation


@pytest.mark.parametrize("kind", ["none", "flip", "flip_crop"])
def test_augmentation_moves_an_image_and_its_example_alike(kind: str, few: ImageSet) -> None:
    """x' is x at half brightness: it stays so whatever was done to x, padding included."""
    recorder = record(few, few.pixels() / 2, epochs=2, augmentation=kind)
    pixels = dict(zip(few.ids.tolist(), few.pixels(), strict=True))
    moves: set[tuple[bool, int, int]] = set()
    for batch, ids in zip(recorder.batches, recorder.ids, strict=True):
        assert batch.attacked is not None
        assert torch.equal(batch.attacked, batch.images / 2)
        for image, shown in zip(ids, batch.images, strict=True):
            moves.add(move(pixels[image], shown))
    flips, downs, rights = ({m[k] for m in moves} for k in range(3))
    everywhere = set(range(-4, 5))
    if kind == "none":
        assert moves == {(False, 0, 0)}
    elif kind == "flip":
        assert moves == {(False, 0, 0), (True, 0, 0)}
    else:
        assert flips == {False, True} and downs == everywhere and rights == everywhere


def move(image: Tensor, shown: Tensor) -> tuple[bool, int, int]:
    """Return how `shown` came from `image`: flipped or not, and how far it was shifted."""
    padded = nn.functional.pad(image, (4, 4, 4, 4))
    for flip in (False, True):
        source = padded.flip(2) if flip else padded
        for down in range(9):
            for right in range(9):
                if torch.equal(source[:, down : down + 8, right : right + 8], shown):
                    return flip, down - 4, right - 4
    raise AssertionError("neither a flip nor a crop of the image")


def test_moves_are_drawn_per_image_and_evenly(train_set: ImageSet) -> None:
    marked = ImageSet(torch.zeros(1200, 1, 9, 9, dtype=torch.uint8), torch.zeros(1200).long(),
                      torch.arange(1200), ("a",))  # fmt: skip
    marked.images[:, 0, 4, 3] = 255  # left of the middle: 5 is where a flip puts it
    flipped = record(marked, epochs=1, batch_size=100, augmentation="flip")
    at = torch.cat([batch.images[:, 0, 4].argmax(1) for batch in flipped.batches])
    assert set(at.tolist()) == {3, 5} and abs((at == 5).float().mean() - 0.5) < 0.08
    marked.images[:, 0, 4] = 255 * (torch.arange(9) == 4)  # no crop loses the very middle
    cropped = record(marked, epochs=1, batch_size=100, augmentation="flip_crop")
    rows = torch.cat([batch.images[:, 0].amax(2).argmax(1) for batch in cropped.batches])
    counts = torch.bincount(rows, minlength=9).double()
    assert ((counts - 1200 / 9) ** 2 / (1200 / 9)).sum() < 35, "8 degrees of freedom: p = 3e-5"


# What must not train


@pytest.mark.parametrize(("optimiser", "rate"), [("sgd", 1e12), ("adam", 1e30)])
def test_a_training_that_diverges_says_so(optimiser: str, rate: float, few: ImageSet) -> None:
    model, objective = network_and_objective("classifier")
    config = changed(optimiser=optimiser, learning_rate=rate, schedule="constant")
    with pytest.raises(Diverged, match=r"diverged in epoch \d: .*lower learning_rate"):
        for _ in fit(model, objective, few, None, config, 0, nothing, None):
            pass


def test_a_batch_larger_than_the_data_is_refused_with_a_sentence(few: ImageSet) -> None:
    model, objective = network_and_objective("classifier")
    with pytest.raises(ValueError, match="batch_size 151 must be at most the 150 training images"):
        next(fit(model, objective, few, None, changed(batch_size=151), 0, nothing, None))
    assert next(fit(model, objective, few, None, changed(batch_size=150), 0, nothing, None))


@pytest.mark.parametrize(
    "change",
    [{"epochs": 0}, {"batch_size": 1}, {"learning_rate": 0.0}, {"weight_decay": -1.0},
     {"schedule": "cosine"}, {"optimizer": "adam"}, {"learning_rate": float("inf")}],
)  # fmt: skip
def test_impossible_settings_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        changed(**change)


# Two workers


class Plain(nn.Module):
    """A network without BatchNorm, whose gradient is the mean over images however they are cut;
    one buffer, to see that buffers are averaged.
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
    """Train as one of two workers; what came of it is left in `folder`."""
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


def test_two_workers_train_what_one_does(few: ImageSet, tmp_path: Path) -> None:
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


def test_training_with_an_attack_in_the_loop_is_repeatable(few: ImageSet) -> None:
    """The attack takes its noise from the images, and its examples follow the network."""
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
