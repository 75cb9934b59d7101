"""Every optimiser takes the steps that its formula gives; names stand for settings."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from toys import head
from training_toys import Scalar, changed, nothing

from components.data.draws import Draws
from components.data.image_set import ImageSet
from components.training.contract import Batch, Metrics
from components.training.loop import fit

RATE = 0.1


def steps(optimiser: Any, data: ImageSet, count: int) -> list[float]:
    """Return how far a weight falls, in rates, by gradients 1, 2, 3, ..."""
    weights: list[float] = []

    def objective(
        model: nn.Module, batch: Batch, progress: float, draws: Draws
    ) -> tuple[Tensor, Metrics]:
        weight = model.get_parameter("weight")
        weights.append(weight.item())
        loss = (batch.step + 1) * weight.sum()
        return loss, {"loss": loss}

    model = Scalar()
    config = changed(
        epochs=1, batch_size=2, optimiser=optimiser, learning_rate=RATE, weight_decay=0.0,
        schedule="constant", augmentation="none",
    )  # fmt: skip
    for _ in fit(model, objective, head(data, 2 * count), None, config, 0, nothing, None):
        pass
    weights.append(model.weight.item())
    return [(a - b) / RATE for a, b in pairwise(weights)]


def test_sgd_takes_the_steps_of_its_momentum(train_set: ImageSet) -> None:
    """Momentum b = 0.9 b + g; the classical step is b, Nesterov's g + 0.9 b. Here b = 1, 2.9, 5.61.

    Sutskever et al. 2013.
    """
    classical = {"kind": "sgd", "momentum": 0.9, "nesterov": False}
    assert steps(classical, train_set, 3) == pytest.approx([1, 2.9, 5.61], rel=1e-4)
    nesterov = [1.9, 2 + 0.9 * 2.9, 3 + 0.9 * 5.61]
    for named in ({**classical, "nesterov": True}, "sgd"):
        assert steps(named, train_set, 3) == pytest.approx(nesterov, rel=1e-4)
    bare = {"kind": "sgd", "momentum": 0, "nesterov": False}
    assert steps(bare, train_set, 3) == pytest.approx([1, 2, 3], rel=1e-4)


@pytest.mark.parametrize("kind", ["adam", "adamw"])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.999), (0.5, 0.9)])
def test_adam_takes_the_steps_of_its_betas(
    kind: str, betas: tuple[float, float], train_set: ImageSet
) -> None:
    """From the gradients 1 and 2: m = (b1 + 2) / (1 + b1) and v = (b2 + 4) / (1 + b2), unbiased."""
    first, second = betas
    expected = [1, (first + 2) / (1 + first) / math.sqrt((second + 4) / (1 + second))]
    found = steps({"kind": kind, "betas": list(betas)}, train_set, 2)
    assert found == pytest.approx(expected, rel=1e-4)
    if betas == (0.9, 0.999):
        assert steps(kind, train_set, 2) == found


def test_only_the_decoupled_decay_of_adamw_is_in_rates(train_set: ImageSet) -> None:
    """Without a gradient AdamW shrinks a weight by rate * decay, and Adam moves it by the rate."""
    ends = {}
    for kind in ("adam", "adamw"):
        model = Scalar(2.0)
        config = changed(
            epochs=1, batch_size=2, optimiser=kind, learning_rate=RATE, weight_decay=0.5,
            schedule="constant", augmentation="none",
        )  # fmt: skip

        def flat(model: nn.Module, *_: Any) -> tuple[Tensor, Metrics]:
            loss = 0 * model.get_parameter("weight").sum()
            return loss, {"loss": loss}

        list(fit(model, flat, head(train_set, 2), None, config, 0, nothing, None))
        ends[kind] = model.weight.item()
    assert ends == pytest.approx({"adam": 2 - RATE, "adamw": 2 * (1 - RATE * 0.5)}, rel=1e-5)


@pytest.mark.parametrize(
    "optimiser", ["adamw", {"kind": "sgd", "momentum": 0.5, "nesterov": False}]
)
def test_an_optimiser_is_written_as_it_was_read(optimiser: Any) -> None:
    config = changed(optimiser=optimiser)
    assert config.model_dump(mode="json")["optimiser"] == optimiser
    assert type(config).model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("optimiser", "reason"),
    [
        ("adamm", "does not match any of the expected tags: 'sgd', 'adam', 'adamw'"),
        ({"kind": "sgd", "momentum": 0.9}, "nesterov"),
        ({"kind": "adam", "betas": [0.9]}, "at least 2 items"),
        ({"kind": "adam", "betas": [0.9, 1]}, "less than 1"),
        ({"kind": "sgd", "momentum": 0, "nesterov": True}, "needs a momentum above 0"),
    ],
)
def test_half_an_optimiser_is_refused(optimiser: Any, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        changed(optimiser=optimiser)


def test_a_state_of_momentum_resumes(train_set: ImageSet) -> None:
    optimiser = {"kind": "sgd", "momentum": 0.9, "nesterov": False}
    config = changed(epochs=2, batch_size=10, optimiser=optimiser, augmentation="none")

    def constant(model: nn.Module, *_: Any) -> tuple[Tensor, Metrics]:
        loss = model.get_parameter("weight").sum()
        return loss, {"loss": loss}

    whole, half, rest = Scalar(), Scalar(), Scalar(5.0)
    some = head(train_set, 30)
    list(fit(whole, constant, some, None, config, 0, nothing, None))
    first = next(fit(half, constant, some, None, config, 0, nothing, None))
    list(fit(rest, constant, some, None, config, 0, nothing, first.state))
    assert torch.equal(rest.weight, whole.weight)
