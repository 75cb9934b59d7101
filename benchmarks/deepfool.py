"""DeepFool, ours beside torchattacks: time and outcomes.

    python benchmarks/deepfool.py

Trains a small CNN on the digits of scikit-learn and attacks 100 unseen digits with both, in turns,
on one thread. Ours is timed as users run it: folding, attack and the final check. Prints the median
and range of the ratios per round, and how many images have the same outcome.

There are two reasons for the difference, so passes are printed too. A pass costs less in a batch.
And ours needs fewer: torchattacks applies the overshoot to every step instead of their sum, so
where pixels are clipped it approaches the boundary and crosses it by rounding, if at all.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torchattacks
from torch import Tensor, nn

from components.attacks import L2, Crafted, Linf, craft
from components.attacks.distance.deepfool import DeepFool
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier, SmallCnn
from components.models.defense import Defense
from components.sources.digits import Digits
from components.training.classification import Classification
from components.training.contract import Frozen
from components.training.loop import Training, fit

STEPS, OVERSHOOT, IMAGES, ROUNDS = 50, 0.02, 100, 4
BALL = L2(norm="l2", eps_l2=1.0)  # only to measure distances: DeepFool has no ball


def digits() -> tuple[ImageSet, ImageSet]:
    """Return 1,297 digits to train on and 500 others, in a fixed random order."""
    source = Digits(
        kind="digits", val=1, test=1, train_limit=None, test_limit=None, max_reject_fraction=0.0
    )
    raw = source.load(Path("unused"))
    order = torch.randperm(len(raw.train.labels), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(raw.train.images)[order]
    labels = torch.from_numpy(raw.train.labels)[order]
    data = ImageSet(images, labels, order, raw.class_names)
    return data[torch.arange(1297)], data[torch.arange(1297, len(data))]


def train(data: ImageSet) -> Classifier:
    torch.manual_seed(0)
    model = SmallCnn(kind="small_cnn", width=16).build(data.shape, 10)
    model.normalise_by(data.pixels())
    frozen = Frozen(None, (), Linf(norm="linf", eps_255=8.0))
    objective = Classification(kind="classification").bind(frozen)
    config = Training(
        epochs=8, batch_size=50, optimiser="adam", learning_rate=0.01, weight_decay=0.0,
        schedule="one_cycle", augmentation="none", precision="float32",
    )  # fmt: skip
    for _ in fit(model, objective, data, None, config, 0, lambda *_: {}, None):
        pass
    return model.eval().requires_grad_(False)


class Counted(nn.Module):
    """A model that counts the backward passes through it, per image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.backward_passes = model, 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of `x`; their gradients are counted."""
        logits: Tensor = self.model(x)
        if logits.requires_grad:
            logits.register_hook(self.count)  # type: ignore[no-untyped-call]
        return logits

    def count(self, gradient: Tensor) -> None:
        """Add one pass per image."""
        self.backward_passes += len(gradient)


def seconds(attack: Callable[[], object]) -> tuple[float, float]:
    """Return the CPU and the wall seconds that an attack took."""
    cpu, wall = time.process_time(), time.perf_counter()
    attack()
    return time.process_time() - cpu, time.perf_counter() - wall


def main() -> None:
    torch.set_num_threads(1)
    train_set, test_set = digits()
    model, data = train(train_set), test_set[torch.arange(IMAGES)]
    defense, counted = Defense(model, None), Counted(model).eval()
    section = DeepFool(kind="deepfool", steps=STEPS, overshoot=OVERSHOOT, classes=10, eot=1)

    def ours() -> Crafted:
        return craft(section, defense, "full", data, BALL, 0, IMAGES)

    def theirs(model: nn.Module = model) -> Tensor:
        library = torchattacks.DeepFool(model, steps=STEPS, overshoot=OVERSHOOT)
        found: Tensor = library(data.pixels(), data.labels)
        return found.detach()

    mine, its = ours(), theirs(counted)
    rounds = [(seconds(ours), seconds(theirs)) for _ in range(ROUNDS)]
    print(f"DeepFool, {IMAGES} digits, {STEPS} steps, overshoot {OVERSHOOT}, {ROUNDS} rounds")
    print(f"{'':24}{'limpid':>10}{'torchattacks':>14}{'ratio':>8}   range")
    for name, index in (("CPU seconds", 0), ("wall seconds", 1)):
        show(name, [one[index] for one, _ in rounds], [other[index] for _, other in rounds])
    passes = int(mine.backward.sum()), counted.backward_passes
    show("backward passes / image", [passes[0] / IMAGES], [passes[1] / IMAGES])
    show(
        "CPU ms / backward pass",
        [1e3 * one[0] / passes[0] for one, _ in rounds],
        [1e3 * other[0] / passes[1] for _, other in rounds],
    )
    compare(model, data, mine.images, its)


def show(name: str, mine: list[float], its: list[float]) -> None:
    ratios = [b / a for a, b in zip(mine, its, strict=True)]
    print(
        f"{name:24}{median(mine):10.3f}{median(its):14.3f}{median(ratios):8.1f}"
        f"   {min(ratios):.1f} to {max(ratios):.1f}"
    )


def compare(model: nn.Module, data: ImageSet, mine: Tensor, its: Tensor) -> None:
    fooled = [model(images).argmax(1) != data.labels for images in (mine, its)]
    lengths = [BALL.distance(images, data.pixels()) for images in (mine, its)]
    print(f"{'fooled':24}{int(fooled[0].sum()):10}{int(fooled[1].sum()):14}")
    print(f"{'median L2':24}{lengths[0].median().item():10.4f}{lengths[1].median().item():14.4f}")
    same = int((fooled[0] == fooled[1]).sum())
    close = int(((lengths[0] - lengths[1]).abs() <= 0.02 * lengths[1] + 1e-6).sum())
    print(f"same outcome on {same} of {IMAGES} images, L2 within 2 % on {close}")


if __name__ == "__main__":
    main()
