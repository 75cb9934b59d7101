"""AutoAttack on an adversarially trained ResNet-20: ours beside torchattacks.

    OMP_WAIT_POLICY=passive python benchmarks/autoattack.py --data DIR --cache MODEL

DIR and MODEL are as in `pgd.py`, whose network is attacked: L-inf 8/255, version standard. Both
attack the same images in one process, in turns; each round takes new images and swaps the order.

By default the attacks inside torchattacks.AutoAttack run 10 steps where AutoAttack has 100. Here
they get 100: with fewer it is neither as strong nor as slow. It also reseeds the global random
stream at every call, which does not matter here, and judges each attack within its batch. Passes
are counted per image: by hooks on its network, and by `craft` for ours.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torchattacks
from pgd import SEED, THREAT, Run, hardware, measure, model_and_images
from torch import Tensor, nn

from components.attacks import craft
from components.attacks.autoattack import STEPS, AutoAttack
from components.data.image_set import ImageSet
from components.models.defense import Defense

OURS, LIBRARY = "ours (craft)", "torchattacks, 100 steps"


@dataclass
class Passes:
    """Forward and backward passes so far, counted per image."""

    forward: int = 0
    backward: int = 0


Attacker = Callable[[ImageSet], Tensor]


def ours(classifier: nn.Module, passes: Passes) -> Attacker:
    """Return our AutoAttack as users run it."""
    defense = Defense(classifier, None).freeze()
    attack = AutoAttack(kind="autoattack", version="standard")

    def run(data: ImageSet) -> Tensor:
        crafted = craft(attack, defense, "full", data, THREAT, SEED, len(data))
        passes.forward += int(crafted.forward.sum())
        passes.backward += int(crafted.backward.sum())
        return crafted.images

    return run


def library(classifier: nn.Module, classes: int, passes: Passes) -> Attacker:
    """Return the AutoAttack of torchattacks with 100 steps, as published."""
    attack = torchattacks.AutoAttack(
        classifier, norm="Linf", eps=THREAT.eps, version="standard", n_classes=classes, seed=SEED
    )
    for member in attack._autoattack.attacks:
        if hasattr(member, "steps"):
            member.steps = STEPS

    def count(module: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> None:
        passes.forward += len(logits)
        if logits.requires_grad:
            logits.register_hook(backwards)

    def backwards(gradient: Tensor) -> None:
        passes.backward += len(gradient)

    def run(data: ImageSet) -> Tensor:
        handle = classifier.register_forward_hook(count)
        try:
            images: Tensor = attack(data.pixels(), data.labels)
        finally:
            handle.remove()
        return images

    return run


def table(runs: dict[str, list[Run]], passes: dict[str, Passes], n: int) -> str:
    """Return the runs (attack -> one per round) as a Markdown table."""
    lines = [
        "| AutoAttack | robust | robust % | CPU s | wall s | CPU ms per image "
        "| forward per image | backward per image | faster than torchattacks | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rounds in runs.items():
        robust, images = sum(run.robust for run in rounds), n * len(rounds)
        cpu = sum(run.cpu for run in rounds)
        gain = [other.cpu / run.cpu for run, other in zip(rounds, runs[LIBRARY], strict=True)]
        lines.append(
            f"| {name} | {robust} of {images} | {100 * robust / images:.1f} | {cpu:.0f} "
            f"| {sum(run.wall for run in rounds):.0f} | {1000 * cpu / images:.0f} "
            f"| {passes[name].forward / images:.0f} | {passes[name].backward / images:.0f} "
            f"| {median(gain):.2f} [{min(gain):.2f}-{max(gain):.2f}] "
            f"| {max(run.memory for run in rounds):.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="AutoAttack: ours beside torchattacks")
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10 in Parquet")
    parser.add_argument(
        "--cache", type=Path, required=True, help="model folder of the network, as in pgd.py"
    )
    parser.add_argument("--n", type=int, default=64, help="images per round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of the attacks; training uses all"
    )
    options = parser.parse_args()
    n, rounds = options.n, options.rounds
    classifier, images = model_and_images(options.data, options.cache, n * rounds)
    torch.set_num_threads(options.threads)
    passes = {OURS: Passes(), LIBRARY: Passes()}
    attacks = {
        OURS: ours(classifier, passes[OURS]),
        LIBRARY: library(classifier, len(images.class_names), passes[LIBRARY]),
    }
    runs: dict[str, list[Run]] = {name: [] for name in attacks}
    for index in range(rounds):
        batch = images[torch.arange(index * n, (index + 1) * n)]
        for name in (OURS, LIBRARY) if index % 2 == 0 else (LIBRARY, OURS):
            run = measure(name, attacks[name], batch, classifier)
            print(f"round {index + 1}, {name}: {run}", flush=True)
            runs[name].append(run)
    print(
        f"\n{hardware()}; {options.threads} threads; {rounds} rounds of {n} images\n\n"
        f"{table(runs, passes, n)}"
    )


if __name__ == "__main__":
    main()
