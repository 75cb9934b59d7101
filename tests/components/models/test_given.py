"""Networks that a caller holds: their weights are stored, and only their process builds them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from components.data.shards import DataError
from components.models.checkpoints import ModelCard, load, save
from components.models.given import hold


class Tied(nn.Module):
    """Two layers that share one weight, as language models do, and a setting beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.two.weight = self.one.weight
        self.shift = torch.ones(4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.two(self.one(x.flatten(1))) + self.shift
        return found


def stored(folder: Path, network: nn.Module, model: dict[str, str]) -> None:
    card = ModelCard(
        format=1, family="classifier", model=model, shape=[1, 2, 2], class_names=list("abcd"),
        provenance={},
    )  # fmt: skip
    save(folder, network, card)


def test_a_held_network_is_loaded_as_a_copy_with_its_stored_weights(tmp_path: Path) -> None:
    network, x = Tied(), torch.rand(3, 1, 2, 2)
    expected = network(x).detach()
    with hold(network) as given:
        stored(tmp_path / "model", network, given.model_dump())
        loaded = load(tmp_path / "model")
    assert torch.equal(loaded(x), expected) and loaded is not network
    assert not loaded.training and network.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_another_process_is_told_to_give_it_again(tmp_path: Path) -> None:
    network = Tied()
    with hold(network) as given:
        stored(tmp_path / "model", network, given.model_dump())
    with pytest.raises(DataError, match=r"Tied was given as an object, .* give it again"):
        load(tmp_path / "model")


def test_other_weights_are_another_network(tmp_path: Path) -> None:
    with hold(Tied()) as one, hold(Tied()) as other:
        assert one.identity != other.identity and one.made_by == other.made_by
