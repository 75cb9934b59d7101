"""AutoAttack: ours beside the code of its authors and torchattacks.

    OMP_WAIT_POLICY=passive python benchmarks/autoattack.py --data DIR --cache MODEL
    OMP_WAIT_POLICY=passive python benchmarks/autoattack.py --demo LINE --n 24 --rounds 2

DIR and MODEL are as in `pgd.py`, whose ResNet-20 is attacked: L-inf 8/255. LINE is the folder of
the finished demo, whose network of `models/robust` is attacked on its test images: L-inf 0.2. All
attack the same images in one process, in turns; each round takes new images and starts with another
one. The authors' code (github.com/fra31/auto-attack, on no package index) takes part if `--authors`
names the folder of its checkout.

By default the attacks inside torchattacks.AutoAttack run 10 steps where AutoAttack has 100. Here
they get 100: with fewer it is neither as strong nor as slow. It also reseeds the global random
stream at every call, which does not matter here, and judges each attack within its batch. Passes
are counted per image: by hooks on the network, and by `craft` for ours. A call of the network
answers a batch.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torchattacks
from pgd import SEED, THREAT, Run, hardware, measure, model_and_images
from torch import Tensor, nn

from components.attacks import Linf, craft
from components.attacks.autoattack import STEPS, AutoAttack
from components.data.image_set import ImageSet, read
from components.models.checkpoints import load
from components.models.defense import Defense

OURS, AUTHORS, LIBRARY = "ours (craft)", "its authors' code", "torchattacks, 100 steps"
DEMO = Linf(norm="linf", eps_255=51)


@dataclass
class Passes:
    """Forward and backward passes so far, counted per image, and calls of the network."""

    forward: int = 0
    backward: int = 0
    calls: int = 0


Attacker = Callable[[ImageSet], Tensor]


def ours(classifier: nn.Module, threat: Linf, passes: Passes) -> Attacker:
    """Return our AutoAttack as users run it."""
    defense = Defense(classifier, None).freeze()
    attack = AutoAttack(kind="autoattack", version="standard")

    def run(data: ImageSet) -> Tensor:
        with _counted(classifier, Passes()) as seen:
            crafted = craft(attack, defense, "full", data, threat, SEED, len(data))
        passes.calls += seen.calls
        passes.forward += int(crafted.forward.sum())
        passes.backward += int(crafted.backward.sum())
        return crafted.images

    return run


def authors(classifier: nn.Module, threat: Linf, passes: Passes, folder: Path) -> Attacker:
    """Return the AutoAttack of its authors, whose checkout is in `folder`."""
    # This file has the name of their package, and Python would find it first.
    sys.path.insert(0, str(folder))
    package = importlib.import_module("autoattack")
    attack = package.AutoAttack(
        classifier, norm="Linf", eps=threat.eps, version="standard", seed=SEED, device="cpu",
        verbose=False,
    )  # fmt: skip

    def run(data: ImageSet) -> Tensor:
        with _counted(classifier, passes):
            # Their code takes contiguous images alone.
            images: Tensor = attack.run_standard_evaluation(
                data.pixels().contiguous(), data.labels, bs=len(data)
            )
        return images

    return run


def library(classifier: nn.Module, classes: int, threat: Linf, passes: Passes) -> Attacker:
    """Return the AutoAttack of torchattacks with 100 steps, as published."""
    attack = torchattacks.AutoAttack(
        classifier, norm="Linf", eps=threat.eps, version="standard", n_classes=classes, seed=SEED
    )
    for member in attack._autoattack.attacks:
        if hasattr(member, "steps"):
            member.steps = STEPS

    def run(data: ImageSet) -> Tensor:
        with _counted(classifier, passes):
            images: Tensor = attack(data.pixels(), data.labels)
        return images

    return run


@contextmanager
def _counted(classifier: nn.Module, passes: Passes) -> Iterator[Passes]:
    """Count the passes of a network in here, and of its copies."""

    def count(module: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> None:
        passes.calls, passes.forward = passes.calls + 1, passes.forward + len(logits)
        if logits.requires_grad:
            logits.register_hook(backwards)  # type: ignore[no-untyped-call]

    def backwards(gradient: Tensor) -> None:
        passes.backward += len(gradient)

    handle = classifier.register_forward_hook(count)
    try:
        yield passes
    finally:
        handle.remove()


def table(runs: dict[str, list[Run]], passes: dict[str, Passes], n: int) -> str:
    """Return the runs (attack -> one per round) as a Markdown table."""
    peer = AUTHORS if AUTHORS in runs else LIBRARY
    lines = [
        "| AutoAttack | robust | robust % | CPU s | wall s | CPU ms per image "
        "| forward per image | backward per image | calls of the network "
        f"| CPU to {peer} | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rounds in runs.items():
        robust, images = sum(run.robust for run in rounds), n * len(rounds)
        cpu = sum(run.cpu for run in rounds)
        cost = [run.cpu / other.cpu for run, other in zip(rounds, runs[peer], strict=True)]
        lines.append(
            f"| {name} | {robust} of {images} | {100 * robust / images:.1f} | {cpu:.0f} "
            f"| {sum(run.wall for run in rounds):.0f} | {1000 * cpu / images:.0f} "
            f"| {passes[name].forward / images:.0f} | {passes[name].backward / images:.0f} "
            f"| {passes[name].calls} | {median(cost):.2f} [{min(cost):.2f}-{max(cost):.2f}] "
            f"| {max(run.memory for run in rounds):.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="AutoAttack: ours, its authors', torchattacks")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--data", type=Path, help="folder of CIFAR-10 in Parquet")
    where.add_argument("--demo", type=Path, help="folder of the finished demo, in place of --data")
    parser.add_argument("--cache", type=Path, help="model folder of the network, as in pgd.py")
    parser.add_argument("--authors", type=Path, help="folder that holds the package autoattack")
    parser.add_argument("--n", type=int, default=64, help="images per round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of the attacks; training uses all"
    )
    options = parser.parse_args()
    if options.data and not options.cache:
        parser.error("--data needs --cache, the model folder of the network")
    if options.authors and not (options.authors / "autoattack").is_dir():
        parser.error(f"--authors: no package autoattack in {options.authors}: give its checkout")
    n, rounds = options.n, options.rounds
    if options.demo:
        classifier, images = load(options.demo / "models/robust"), read(options.demo / "data/test")
        threat = DEMO
    else:
        classifier, images = model_and_images(options.data, options.cache, n * rounds)
        threat = THREAT
    torch.set_num_threads(options.threads)
    passes = {OURS: Passes(), AUTHORS: Passes(), LIBRARY: Passes()}
    attacks = {OURS: ours(classifier, threat, passes[OURS])}
    if options.authors:
        attacks[AUTHORS] = authors(classifier, threat, passes[AUTHORS], options.authors)
    attacks[LIBRARY] = library(classifier, len(images.class_names), threat, passes[LIBRARY])
    runs: dict[str, list[Run]] = {name: [] for name in attacks}
    for index in range(rounds):
        batch = images[torch.arange(index * n, (index + 1) * n)]
        names = list(attacks)
        for name in names[index % len(names) :] + names[: index % len(names)]:
            run = measure(name, attacks[name], batch, classifier, threat)
            print(f"round {index + 1}, {name}: {run}", flush=True)
            runs[name].append(run)
    print(
        f"\n{hardware()}; {options.threads} threads; {rounds} rounds of {n} images\n\n"
        f"{table(runs, passes, n)}"
    )


if __name__ == "__main__":
    main()
