"""Training fit for a GPU, shown on a CPU: no step waits for the device, no bit has changed."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from toys import LINF, head
from training_toys import (
    AUTOENCODER,
    DDPM,
    GAN,
    IN_LOOP,
    MAGNET,
    NOISY,
    SECTIONS,
    bind,
    changed,
    nothing,
    parse,
    untrained,
)

from components.data.draws import Draws
from components.data.image_set import ImageSet
from components.models.checkpoints import latest_state, pack_state, save_state
from components.models.classifiers import DefenseGanA, KeyedDropout, SmallCnn
from components.models.identity import state_digest
from components.training import batches, loop
from components.training.batches import Batches
from components.training.contract import (
    Batch,
    Frozen,
    Metrics,
    Objective,
    Teacher,
    takes_pool,
)
from components.training.loop import Training, fit

CPU, META = torch.device("cpu"), torch.device("meta")
NETWORKS = {
    "denoising": AUTOENCODER, "reformer_detectors": MAGNET, "noise_prediction": DDPM,
    "wgan_gp": GAN, "reconstruction": NOISY, "atop": NOISY,
}  # fmt: skip
CLASSIFIED = ("classification", "adversarial_classification")
# Every objective, and those whose x' is made in the loop.
OBJECTIVES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in SECTIONS),
    ("adversarial_teacher", {"adversary": {"kind": "defense", **IN_LOOP}}),
    ("atop", {"adversary": {"kind": "classifier", **IN_LOOP}}),
]


@pytest.fixture(scope="module")
def few(train_set: ImageSet) -> ImageSet:
    return head(train_set, 150)


def network(name: str) -> nn.Module:
    """Return an untrained network for this objective."""
    torch.manual_seed(0)
    if name in CLASSIFIED:
        return SmallCnn(kind="small_cnn", width=4).build((1, 8, 8), 10)
    model: nn.Module = untrained(NETWORKS.get(name, AUTOENCODER))
    return model


def objective(name: str, device: torch.device, changes: Mapping[str, Any]) -> Objective:
    """Return the objective, bound to untrained networks on a device."""
    torch.manual_seed(1)
    classifier = SmallCnn(kind="small_cnn", width=4).build((1, 8, 8), 10)
    frozen = [classifier, untrained(AUTOENCODER, 1), untrained(AUTOENCODER, 2)]
    classifier, *networks = [one.eval().requires_grad_(False).to(device) for one in frozen]
    teachers = [Teacher(one, normal) for one, normal in zip(networks, (False, True), strict=True)]
    return bind(name, Frozen(classifier, teachers, LINF), **changes)


def pool_of(name: str, data: ImageSet) -> Tensor | None:
    """Return x' of a pool where this objective takes it."""
    if not takes_pool(parse(name)):
        return None
    return LINF.start(data.pixels(), Draws(0, "attack", data.ids), "pool")


# Against a plain loop


def plain_loop(
    model: nn.Module, objective: Objective, data: ImageSet, attacked: Tensor | None,
    config: Training,
) -> list[float]:  # fmt: skip
    """Train as `fit` promises, with nothing but torch; return the mean loss of every epoch."""
    kinds: dict[str, Any] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    settings = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimiser.kind == "sgd":
        optimiser: Any = torch.optim.SGD(
            model.parameters(), momentum=0.9, nesterov=True, **settings
        )
    else:
        optimiser = kinds[config.optimiser.kind](model.parameters(), **settings)
    steps, means = len(data) // config.batch_size, []
    for epoch in range(config.epochs):
        model.train()
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(epoch))
        losses = []
        for step in range(steps):
            rows = order[step * config.batch_size : (step + 1) * config.batch_size]
            draws = Draws(epoch, "train", data.ids[rows])
            images = moved(data.pixels()[rows], config.augmentation, draws)
            pool = None if attacked is None else attacked[rows]
            batch = Batch(images, data.labels[rows], pool, epoch * steps + step)
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
                loss, metrics = objective(
                    model, batch, (batch.step + 1) / (steps * config.epochs), draws
                )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(metrics["loss"].detach().float())
        means.append(torch.stack(losses).mean().item())
    return means


def moved(x: Tensor, kind: str, draws: Draws) -> Tensor:
    """Flip and crop image by image."""
    if kind == "none":
        return x
    flips = draws.uniform((1,), "flip")[:, 0] < 0.5
    x = torch.stack([one.flip(2) if flip else one for one, flip in zip(x, flips, strict=True)])
    if kind == "flip":
        return x
    shifts = (draws.uniform((2,), "crop") * 9).long().tolist()
    height, width = x.shape[2:]
    crops = [
        F.pad(one, (4, 4, 4, 4)).permute(1, 2, 0)[down : down + height, right : right + width]
        for one, (down, right) in zip(x, shifts, strict=True)
    ]
    # Channels last, as crops are made: the layout decides how a convolution rounds.
    return torch.stack(crops).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("classification", {"augmentation": "flip_crop", "optimiser": "sgd"}),
        ("classification", {"augmentation": "flip", "optimiser": "adam"}),
        ("classification", {"augmentation": "none", "precision": "bfloat16"}),
        ("adversarial_classification", {"augmentation": "none"}),
        ("adversarial_teacher", {"augmentation": "none"}),
    ],
)
def test_fit_trains_the_weights_of_a_plain_loop_to_the_bit(
    name: str, changes: dict[str, Any], few: ImageSet
) -> None:
    attacked = pool_of(name, few)
    config = changed(epochs=2, schedule="constant", **changes)
    ours, plain = network(name), network(name)
    bound = objective(name, CPU, {})
    epochs = [e.metrics for e in fit(ours, bound, few, attacked, config, 0, nothing, None)]
    losses = plain_loop(plain, bound, few, attacked, config)
    assert state_digest(ours) == state_digest(plain)
    assert [epoch["loss"] for epoch in epochs] == losses


# No step waits


class Reads(TorchDispatchMode):
    """Notes every operation that makes the host wait for a GPU: it reads a value, or a size."""

    NAMES = ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), settings: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        indices = arguments[1] if name.startswith(("index", "_index")) else []
        masks = [
            one for one in (indices if isinstance(indices, list | tuple) else [])
            if isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8)
        ]  # fmt: skip
        if name in self.NAMES or masks:
            self.found.append(name)
        return function(*arguments, **(settings or {}))


def test_reads_of_values_are_noticed() -> None:
    """What the next test rests on."""
    x = torch.arange(4.0)
    for read in (
        lambda: x.sum().item(), lambda: float(x[0]), lambda: bool((x > 5).any()), lambda: x[x > 1],
        lambda: x.nonzero(), lambda: torch.where(x > 1), lambda: x.masked_select(x > 1),
        lambda: x.index_put((x > 1,), x.new_zeros(())), lambda: torch.equal(x, x),
    ):  # fmt: skip
        with Reads() as reads:
            read()
        assert reads.found
    with Reads() as reads:
        torch.where(x > 1, x, 0 * x)[torch.arange(2)].argmax()
    assert not reads.found


@pytest.mark.parametrize("name", [name for name, changes in OBJECTIVES if not changes])
def test_no_step_of_a_training_reads_a_value(
    name: str, few: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the fused optimiser of a GPU: the one of a CPU keeps its counters in main memory."""
    made = loop._optimiser
    monkeypatch.setattr(loop, "_optimiser", lambda model, config, fused: made(model, config, True))
    pool = pool_of(name, few)
    moves = "flip_crop" if pool is None else "none"
    config = changed(epochs=1, batch_size=25, augmentation=moves)
    model, bound = network(name), objective(name, CPU, {})
    trained, reads = [], Reads()

    def counted(model: nn.Module, *others: Any) -> tuple[Tensor, Metrics]:
        trained.append(len(reads.found))
        return bound(model, *others)

    with reads:
        (epoch,) = fit(model, counted, few, pool, config, 0, nothing, None)
    assert len(trained) == 6 and reads.found == [] and "loss" in epoch.metrics


@pytest.mark.parametrize(("name", "changes"), OBJECTIVES)
def test_every_objective_runs_on_a_device_that_nothing_can_be_read_from(
    name: str, changes: dict[str, Any], few: ImageSet
) -> None:
    """Nor is there a copy to main memory, nor a tensor that was left there."""
    model = network(name).to(META).train()
    bound = objective(name, META, changes)
    seen = 0
    pool = pool_of(name, few) if not changes else None
    moves = "flip_crop" if pool is None else "none"
    for batch, draws in Batches(few, pool, 50, moves, 0, META).epoch(0):
        loss, metrics = bound(model, batch, 0.5, draws)
        loss.backward()  # type: ignore[no-untyped-call]
        assert {one.device for one in (loss, *metrics.values())} == {META}
        seen += 1
    assert seen == 3


def test_dropout_reads_its_counters_in_main_memory() -> None:
    images = torch.rand(4, 1, 28, 28)
    model = DefenseGanA(kind="defense_gan_a").build((1, 28, 28), 10).train()
    twin = DefenseGanA(kind="defense_gan_a").build((1, 28, 28), 10).train()
    twin.load_state_dict(model.state_dict())
    there = model.to(META)
    dropouts = [one for one in there.modules() if isinstance(one, KeyedDropout)]
    assert there(images.to(META)).shape == (4, 10)
    assert [int(one.calls) for one in dropouts] == [1, 1]
    # A copy that stays goes on with the same noise.
    ones = torch.ones(4, 128)
    first, second = (
        next(d for d in one.modules() if isinstance(d, KeyedDropout) and d.use == "head")
        for one in (there, twin)
    )
    second.calls += 1
    assert torch.equal(first(ones), second(ones)) and not torch.equal(first(ones), ones)


# Where the training set lies


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("pool", [True, False])
def test_batches_are_the_same_wherever_the_set_lies(
    pool: bool, world: int, few: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    attacked, moves = (few.pixels() / 2, "none") if pool else (None, "flip_crop")

    def made() -> list[tuple[Batch, Draws]]:
        return [
            pair
            for rank in range(world)
            for pair in Batches(few, attacked, 30, moves, 3, CPU, rank, world).epoch(1)
        ]

    resident = made()
    monkeypatch.setattr(batches, "fits", lambda tensor, device: False)
    for (one, draws), (other, others) in zip(resident, made(), strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
        assert torch.equal(draws.ids, others.ids)
        assert (one.attacked is not None) == (other.attacked is not None) == pool
        if one.attacked is not None and other.attacked is not None:
            assert torch.equal(one.attacked, other.attacked)
        assert len(one.labels) == 30 // world and one.step == other.step


def test_bytes_cross_to_the_device_and_not_floats(few: ImageSet) -> None:
    made = Batches(few, None, 30, "none", 0, CPU)
    assert made.images.tensor.dtype == torch.uint8
    every = ImageSet(
        torch.arange(256, dtype=torch.uint8).view(16, 1, 4, 4), torch.zeros(16).long(),
        torch.arange(16), ("a",),
    )  # fmt: skip
    ((batch, draws),) = Batches(every, None, 16, "none", 0, CPU).epoch(0)
    assert batch.images.dtype == torch.float32
    assert torch.equal(batch.images[draws.ids.argsort()], every.pixels())


def test_a_set_is_resident_up_to_a_part_of_the_free_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu, tensor = torch.device("cuda", 0), torch.zeros(100, 3, dtype=torch.uint8)
    for free, expected in ((2400, True), (2399, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**9))
        assert batches.fits(tensor, gpu) is expected
        assert batches.fits(tensor.float(), gpu) is False
    assert batches.fits(tensor, CPU)


# States that another device wrote


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_a_state_of_a_fused_optimiser_goes_on_as_one_of_this_device(
    optimiser: str, few: ImageSet, tmp_path: Any
) -> None:
    config = changed(epochs=2, optimiser=optimiser, batch_size=75)
    whole, half = network("classification"), network("classification")
    bound = objective("classification", CPU, {})
    epochs = list(fit(whole, bound, few, None, config, 0, nothing, None))
    first = next(fit(half, bound, few, None, config, 0, nothing, None))
    groups = [{**group, "fused": True} for group in first.state["optimiser"]["param_groups"]]
    fused = {**first.state, "optimiser": {**first.state["optimiser"], "param_groups": groups}}
    save_state(tmp_path, 0, pack_state(fused))
    stored = latest_state(tmp_path)
    other = network("classification")
    (last,) = fit(other, bound, few, None, config, 0, nothing, stored)
    assert state_digest(other) == state_digest(whole)
    assert not last.state["optimiser"]["param_groups"][0]["fused"]
    assert replace(last, state={}) == replace(epochs[-1], state={})


def test_a_state_is_read_where_the_device_that_wrote_it_is_missing(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as there:
        there.setattr(torch.serialization, "location_tag", lambda storage: "cuda:7")
        packed = pack_state({"epoch": 0, "weight": torch.ones(3)})
    save_state(tmp_path, 0, packed)
    stored = latest_state(tmp_path, lambda path: pytest.fail(f"{path} was taken for damaged"))
    assert stored is not None and torch.equal(stored["weight"], torch.ones(3))
