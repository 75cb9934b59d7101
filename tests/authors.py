"""What the authors' AutoAttack left right of three small models, and what ours leaves.

`benchmarks/agreement.py` makes two of the models and records all outcomes. The third
model, `parity`, is of MNIST and lies with its images in the folder of test data.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from toy_networks import ParityModel

from components.attacks import L2, Attack, Linf, craft
from components.attacks.autoattack import AutoAttack
from components.data.image_set import ImageSet
from components.models.defense import Defense

FOLDER = Path(__file__).parent / "components" / "attacks" / "recorded"
# Radii in [0,1], by model.
RADII: dict[str, dict[str, float]] = {
    "digits8": {"Linf": 0.2, "L2": 0.8},
    "parity": {"Linf": 0.2, "L2": 1.5},
    "cifar32": {"Linf": 8 / 255, "L2": 0.5},
}
PARTS = ("apgd-ce", "apgd-t", "fab-t", "square", "standard")


@dataclass(frozen=True)
class Subject:
    """A frozen model and the images that it was attacked on."""

    name: str
    defense: Defense
    data: ImageSet

    def threat(self, norm: str) -> Linf | L2:
        """Return the ball of the recorded radius."""
        eps = RADII[self.name][norm]
        return Linf(norm="linf", eps_255=255 * eps) if norm == "Linf" else L2(norm="l2", eps_l2=eps)

    def right(self, part: str, norm: str, seed: int) -> Tensor:
        """Return which images (N,) our `part` leaves right, one of `PARTS`."""
        threat, count = self.threat(norm), len(self.data)
        return ~craft(ours(part), self.defense, "full", self.data, threat, seed, count).success


def ours(part: str) -> Attack:
    """Return our form of one of `PARTS`."""
    whole = AutoAttack(kind="autoattack", version="standard")
    return dict(zip(PARTS, (*whole.ensemble(10), whole), strict=True))[part]


def subject(name: str, parity: Path | None = None) -> Subject:
    """Load a model by its name; `parity` is the folder of the one of that name."""
    if name == "parity":
        assert parity is not None
        tensors, network = load_file(parity / "model_and_images.safetensors"), ParityModel()
    else:
        tensors = load_file(FOLDER / f"{name}.safetensors")
        network = small_cnn(*((1, 8, 8) if name == "digits8" else (3, 32, 10)))
    images, labels = tensors.pop("images"), tensors.pop("labels").long()
    network.load_state_dict(tensors)
    data = ImageSet(images, labels, torch.arange(len(labels)), tuple("0123456789"))
    return Subject(name, Defense(network.eval(), None).freeze(), data)


def small_cnn(channels: int, side: int, width: int) -> nn.Module:
    """Return an untrained network of three convolutions, for square images of ten classes."""
    quarter = -(-side // 4)
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * quarter * quarter, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def outcomes(name: str) -> Path:
    """Return the file with what the authors' code left of a model: norm -> part -> flags by seed.

    The flags of a seed are a string with a 1 for every image that was still right.
    """
    return FOLDER / f"{name}.json"


def recorded(name: str, norm: str, part: str) -> list[str]:
    """Return the flags of every recorded seed."""
    found: list[str] = json.loads(outcomes(name).read_text("utf-8"))[norm][part]
    return found


def allowed(flags: Sequence[str]) -> range:
    """Return how many images ours may leave right: the range of the flags, widened by one."""
    counts = [each.count("1") for each in flags]
    return range(min(counts) - 1, max(counts) + 2)
