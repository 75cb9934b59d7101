"""AutoAttack beside the code of its authors on small models: how many images each leaves right.

    python benchmarks/agreement.py models --data DIR
    python benchmarks/agreement.py record [--parity DIR] [--models ...] [--parts ...] [--seeds 5]
    python benchmarks/agreement.py compare [the same]

`models` trains the two models of `tests/components/attacks/recorded`, on the digits of scikit-learn
and on the first train file of CIFAR-10 in DIR (Parquet: an image and a label a row). `record` runs
the authors' code on them, and on the model in the folder named by --parity; it goes on where it was
cut off. It needs their package, of the commit that was recorded:

    pip install git+https://github.com/fra31/auto-attack@a392200

`compare` runs ours and prints a table. All is computed on the CPU in one thread.
"""

import argparse
import io
import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

# A file in this folder has the name of the authors' package.
sys.path.remove(str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from authors import FOLDER, PARTS, RADII, Subject, allowed, outcomes, recorded, small_cnn, subject

DIGITS, CIFAR = 256, 128  # images that are kept and attacked
TRAIN_IMAGES = 10_000


def train(
    network: nn.Module, x: Tensor, y: Tensor, eps: float, epochs: int, rate: float, steps: int
) -> nn.Module:
    """Train by PGD in the L-inf ball, whose radius grows to `eps` over the first half."""
    torch.manual_seed(0)
    optimiser = torch.optim.Adam(network.parameters(), rate)
    batches = epochs * -(-len(x) // 100)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, batches)
    for epoch in range(epochs):
        grown = min(1, (epoch + 1) / (0.5 * epochs))
        for rows in torch.randperm(len(x)).split(100):
            images, labels = x[rows], y[rows]
            delta, radius = (2 * torch.rand_like(images) - 1) * eps * grown, eps * grown
            for _ in range(steps):
                delta.requires_grad_()
                loss = F.cross_entropy(network((images + delta).clamp(0, 1)), labels)
                (slope,) = torch.autograd.grad(loss, delta)
                delta = (delta.detach() + 1.5 * radius / steps * slope.sign()).clamp(
                    -radius, radius
                )
            optimiser.zero_grad()
            F.cross_entropy(network((images + delta).clamp(0, 1)), labels).backward()
            optimiser.step()
            schedule.step()
    return network.eval().requires_grad_(False)


def digits() -> None:
    """Train and keep `digits8`."""
    found = load_digits()
    images = torch.from_numpy((found.images * 255 / 16).round().astype(np.uint8))[:, None]
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, rest = order[:DIGITS], order[DIGITS:]
    torch.manual_seed(0)
    network = small_cnn(1, 8, 8)
    train(network, images[rest] / 255, labels[rest], 0.2, epochs=40, rate=0.01, steps=5)
    keep("digits8", network, images[test], labels[test])


def cifar(data: Path) -> None:
    """Train and keep `cifar32`."""
    (first, *_), (test, *_) = (sorted(data.glob(f"*{part}*.parquet")) for part in ("train", "test"))
    images, labels = rows_of(first, TRAIN_IMAGES)
    torch.manual_seed(0)
    network = small_cnn(3, 32, 10)
    train(network, images / 255, labels, 8 / 255, epochs=8, rate=0.004, steps=3)
    keep("cifar32", network, *rows_of(test, CIFAR))


def rows_of(file: Path, count: int) -> tuple[Tensor, Tensor]:
    """Return the first images (N,3,H,W), uint8, and labels (N,) of a Parquet file."""
    table = pq.read_table(file).slice(0, count)
    coded = [each["bytes"] if isinstance(each, dict) else each for each in table[0].to_pylist()]
    pixels = [np.asarray(Image.open(io.BytesIO(each)).convert("RGB")) for each in coded]
    # The stack keeps the channels last in memory, on which the rounding of the training depends.
    images = torch.from_numpy(np.stack([each.transpose(2, 0, 1) for each in pixels]))
    return images, torch.tensor(table[1].to_pylist())


def keep(name: str, network: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Write a model and its images."""
    right = int((network(images / 255).argmax(1) == labels).sum())
    print(f"{name}: {right} of {len(labels)} are right")
    tensors = {**network.state_dict(), "images": images.contiguous(), "labels": labels.byte()}
    save_file(tensors, FOLDER / f"{name}.safetensors")


def record(model: Subject, parts: list[str], seeds: int) -> None:
    """Run the authors' code where no outcome is kept yet."""
    file = outcomes(model.name)
    kept: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.exists() else {}
    for norm, part in product(RADII[model.name], parts):
        runs = kept.setdefault(norm, {}).setdefault(part, [])
        for seed in range(len(runs), seeds):
            # FAB-T, which takes longest, draws nothing in its one run.
            drawn = part != "fab-t" or not runs
            runs.append(theirs(model, part, norm, seed) if drawn else runs[0])
            print(model.name, norm, part, seed, runs[-1].count("1"), flush=True)
            file.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")


def theirs(model: Subject, part: str, norm: str, seed: int) -> str:
    """Return the flags of one run of the authors' code."""
    from autoattack import AutoAttack

    network = model.defense.classifier
    attack = AutoAttack(
        network, norm=norm, eps=RADII[model.name][norm], seed=seed, device="cpu", verbose=False
    )
    if part != "standard":
        attack.attacks_to_run = [part]
    x, y = model.data.pixels(), model.data.labels
    found = attack.run_standard_evaluation(x, y, bs=len(y))
    return "".join(str(int(flag)) for flag in network(found).argmax(1) == y)


def compare(model: Subject, parts: list[str], seeds: int) -> None:
    """Print rows of a table: how many images ours leaves right, and the range of theirs."""
    for norm, part in product(RADII[model.name], parts):
        flags = recorded(model.name, norm, part)
        span = allowed(flags)
        counts = [int(model.right(part, norm, seed).sum()) for seed in range(seeds)]
        ours = ", ".join(str(n) if n in span else f"**{n}**" for n in counts)
        theirs = f"{span[1]} to {span[-2]} | {len(flags)}"
        print(f"| {model.name} | {norm} | {part} | {ours} | {theirs} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="AutoAttack beside its authors' code")
    parser.add_argument("what", choices=["models", "record", "compare"])
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10 in Parquet")
    parser.add_argument("--parity", type=Path, help="folder of the model on MNIST")
    parser.add_argument("--models", nargs="+", default=[*RADII], choices=[*RADII])
    parser.add_argument("--parts", nargs="+", default=[*PARTS], choices=PARTS)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    if options.what == "models":
        if options.data is None:
            parser.error("models needs --data, the folder of CIFAR-10 in Parquet")
        digits()
        cifar(options.data)
        return
    if options.what == "compare":
        print(
            "| model | norm | part | ours | theirs | seeds of theirs |\n|---|---|---|---|---|---|"
        )
    for name in options.models:
        if name != "parity" or options.parity:
            run = record if options.what == "record" else compare
            run(subject(name, options.parity), options.parts, options.seeds)


if __name__ == "__main__":
    main()
