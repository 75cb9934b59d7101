"""PGD-20 on an adversarially trained ResNet-20: ours, the bare loop, and other libraries.

    OMP_WAIT_POLICY=passive python benchmarks/pgd.py --data DIR --cache MODEL [--peers]

DIR holds train.parquet and test.parquet of CIFAR-10. MODEL is the folder of the network, which the
first run trains in some minutes. All attack the same images in one process, in turns; each round
takes new images and starts with another attack. Ratios are medians over the rounds, of CPU seconds.
Peak memory is what an attack adds to the process, measured on Linux only.

The *bare loop* is the least that PGD can do: forward pass, input gradient, step; on frozen
channels-last weights, without folding, bookkeeping or checks. Every library gets the frozen network
in eval mode as `checkpoints.load` returns it. With early stop an image counts as fooled at any
iterate, without it at the last one; everything else follows Madry et al. 2018.
"""

import argparse
import ctypes
import importlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torchattacks
from torch import Tensor, nn
from torch.nn import functional as F

from components.attacks import Linf, craft, violations
from components.attacks.gradient import Pgd, ascend
from components.data.draws import Draws
from components.data.image_set import ImageSet
from components.models.checkpoints import ModelCard, load, read_card, save
from components.models.classifiers import ResNet
from components.models.defense import Defense, bind, channels_last
from components.sources import prepare
from components.sources.parquet import ParquetFiles
from components.training.classification import AdversarialClassification, Classification
from components.training.contract import Batch, Frozen, InLoop, Metrics, Objective
from components.training.loop import Training, fit

Attacker = Callable[[ImageSet], Tensor]

SEED = 0
THREAT = Linf(norm="linf", eps_255=8)
STEPS, STEP = 20, 0.25  # the step is a multiple of the radius
PEERS = ("foolbox==3.3.4", "adversarial-robustness-toolbox==1.20.1", "packaging")
BARE, LIBRARY = "bare loop, channels last", "torchattacks"

TRAIN_IMAGES = 25_000
NETWORK = ResNet(kind="resnet", depth=20, width=16)
SHORT = Training(
    epochs=5, batch_size=125, optimiser="sgd", learning_rate=0.1, weight_decay=5e-4,
    schedule="one_cycle", augmentation="flip_crop", precision="float32",
)  # fmt: skip
HARDENING = SHORT.model_copy(update={"epochs": 2, "batch_size": 200, "learning_rate": 0.05})
FGSM_RS = AdversarialClassification(
    kind="adversarial_classification",
    attack=InLoop(steps=1, step=1.25, random_start=True, ramp=0),
    w_clean=0,
)


def model_and_images(data: Path, cache: Path, count: int) -> tuple[nn.Module, ImageSet]:
    """Return a weakly but truly robust ResNet-20, frozen, and `count` test images.

    It is trained for a few epochs and then adversarially, by FGSM from a random start (Wong et al.
    2020), so that PGD-20 leaves a quarter of the images: attacks are hard to compare if they fool
    all or none. The model folder `cache` is reused if this recipe made it, else written.
    """
    source = ParquetFiles(
        kind="parquet", path=str(data), val=1, test=0, train_limit=TRAIN_IMAGES, test_limit=count,
        max_reject_fraction=0,
    )  # fmt: skip
    sets = prepare(source, SEED, scratch=data)
    card = ModelCard(
        format=1, family="classifier", model=NETWORK.model_dump(), shape=list(sets.train.shape),
        class_names=list(sets.train.class_names),
        provenance={
            "seed": SEED, "images": TRAIN_IMAGES, "objective": FGSM_RS.model_dump(),
            "trainings": [SHORT.model_dump(), HARDENING.model_dump()],
        },
    )  # fmt: skip
    if not (cache.exists() and read_card(cache) == card):
        save(cache, _train(sets.train), card)
    return load(cache), sets.test


def _train(data: ImageSet) -> nn.Module:
    frozen = Frozen(classifier=None, teachers=(), threat=THREAT)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = NETWORK.build(data.shape, len(data.class_names))
    model.normalise_by(data.pixels())
    channels_last(model)
    standard = Classification(kind="classification").bind(frozen)
    for objective, training in ((standard, SHORT), (FGSM_RS.bind(frozen), HARDENING)):
        for epoch in fit(model, _mixed(objective), data, None, training, SEED, lambda *_: {}, None):
            shown = ", ".join(f"{name} {value:.3f}" for name, value in epoch.metrics.items())
            print(f"training, epoch {epoch.index + 1} of {training.epochs}: {shown}", flush=True)
    return model


def _mixed(objective: Objective) -> Objective:
    """Compute an objective in bfloat16 if the CPU supports it."""
    supported = torch.cpu._is_avx512_bf16_supported()

    def mixed(
        model: nn.Module, batch: Batch, progress: float, draws: Draws
    ) -> tuple[Tensor, Metrics]:
        with torch.autocast("cpu", torch.bfloat16, enabled=supported):
            return objective(model, batch, progress, draws)

    return mixed


def ours(classifier: nn.Module) -> dict[str, Attacker]:
    """Return our PGD: at the settings of the bare loop, and as `craft` runs it."""
    defense = Defense(classifier, None).freeze()
    unfolded = deepcopy(defense)
    channels_last(unfolded)

    def crafted(early_stop: bool) -> Attacker:
        attack = Pgd(
            kind="pgd", steps=STEPS, step=STEP, restarts=1, random_start=True,
            early_stop=early_stop, eot=1,
        )  # fmt: skip
        return lambda data: craft(attack, defense, "full", data, THREAT, SEED, len(data)).images

    def same_settings(data: ImageSet) -> Tensor:
        draws, images = Draws(SEED, "attack", data.ids), data.pixels()
        target, start = bind(unfolded, "full", draws, 1), THREAT.start(images, draws, "start")
        return ascend(target, start, images, data.labels, THREAT, STEPS, STEP)

    return {
        "ours, at the settings of the bare loop": same_settings,
        "ours (craft), last iterate": crafted(early_stop=False),
        "ours (craft), early stop": crafted(early_stop=True),
    }


def bare(classifier: nn.Module) -> Attacker:
    """Return the bare loop."""
    network, eps = deepcopy(classifier), THREAT.eps
    channels_last(network)

    def attack(data: ImageSet) -> Tensor:
        images = data.pixels().contiguous(memory_format=torch.channels_last)
        low, high = (images - eps).clamp_(min=0), (images + eps).clamp_(max=1)
        x = torch.empty_like(images).uniform_(-eps, eps).add_(images).clamp_(0, 1)
        for _ in range(STEPS):
            x.requires_grad_()
            loss = F.cross_entropy(network(x), data.labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, x)
            x = torch.clamp(x.detach() + STEP * eps * gradient.sign(), low, high)
        return x

    return attack


def libraries(classifier: nn.Module, data: ImageSet) -> dict[str, Attacker]:
    """Return the PGD of other libraries, as far as they are installed."""
    attack = torchattacks.PGD(classifier, THREAT.eps, STEP * THREAT.eps, STEPS)
    found: dict[str, Attacker] = {LIBRARY: lambda data: attack(data.pixels(), data.labels)}
    if (foolbox := _installed("foolbox")) is not None:
        found["foolbox"] = _foolbox(foolbox, classifier)
    if _installed("art") is not None:
        found["ART"] = _art(classifier, data)
    return found


def _installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        print(f"{name} is left out ({error}); --peers installs it")
        return None


def _foolbox(foolbox: Any, classifier: nn.Module) -> Attacker:
    wrapped = foolbox.PyTorchModel(classifier, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(abs_stepsize=STEP * THREAT.eps, steps=STEPS, random_start=True)
    return lambda data: attack(wrapped, data.pixels(), data.labels, epsilons=THREAT.eps)[1]


def _art(classifier: nn.Module, data: ImageSet) -> Attacker:
    wrapper = importlib.import_module("art.estimators.classification").PyTorchClassifier(
        classifier, nn.CrossEntropyLoss(), data.shape, len(data.class_names),
        clip_values=(0, 1), device_type="cpu",
    )  # fmt: skip
    attacks = importlib.import_module("art.attacks.evasion")

    def run(data: ImageSet) -> Tensor:
        attack = attacks.ProjectedGradientDescentPyTorch(
            wrapper, eps=THREAT.eps, eps_step=STEP * THREAT.eps, max_iter=STEPS,
            num_random_init=1, batch_size=len(data), verbose=False,
        )  # fmt: skip
        return torch.from_numpy(attack.generate(data.pixels().numpy(), data.labels.numpy()))

    return run


@dataclass(frozen=True)
class Run:
    """The cost of one attack on one batch, in seconds and MiB, and the images left correct."""

    cpu: float
    wall: float
    memory: float
    robust: int


def measure(
    name: str, attack: Attacker, data: ImageSet, classifier: nn.Module, threat: Linf = THREAT
) -> Run:
    """Run an attack once; raise AssertionError if an image leaves the threat."""
    before = _memory("VmRSS", reset_peak=True)
    wall, cpu = time.perf_counter(), time.process_time()
    images = attack(data)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    memory = _memory("VmHWM", reset_peak=False) - before
    broken = violations(images, data.pixels(), threat)
    assert not broken, f"{name} left the threat: {broken}"
    return Run(cpu, wall, memory, _right(classifier, images, data.labels))


def _right(classifier: nn.Module, images: Tensor, labels: Tensor) -> int:
    with torch.no_grad():
        return int((classifier(images).argmax(1) == labels).sum())


def _memory(field: str, reset_peak: bool) -> float:
    """Return a memory figure of this process in MiB; NaN without /proc."""
    process = Path("/proc/self")
    if not process.exists():
        return float("nan")
    if reset_peak:
        # Memory that the allocator keeps after a free would hide the need of the next attack.
        ctypes.CDLL(None).malloc_trim(0)
        (process / "clear_refs").write_text("5")
    lines = (process / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def table(runs: dict[str, list[Run]], n: int) -> str:
    """Return the runs (attack -> one per round) as a Markdown table."""
    lines = [
        "| PGD-20 | robust % | CPU s | wall s | CPU to the bare loop | faster than torchattacks "
        "| peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rounds in runs.items():
        robust = 100 * sum(run.robust for run in rounds) / (n * len(rounds))
        cost = [run.cpu / other.cpu for run, other in zip(rounds, runs[BARE], strict=True)]
        gain = [other.cpu / run.cpu for run, other in zip(rounds, runs[LIBRARY], strict=True)]
        lines.append(
            f"| {name} | {robust:.1f} | {median(run.cpu for run in rounds):.2f} "
            f"| {median(run.wall for run in rounds):.2f} "
            f"| {median(cost):.2f} [{min(cost):.2f}-{max(cost):.2f}] "
            f"| {median(gain):.2f} [{min(gain):.2f}-{max(gain):.2f}] "
            f"| {max(run.memory for run in rounds):.0f} |"
        )
    return "\n".join(lines)


def hardware() -> str:
    """Return the date, the CPU and the version of torch."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{date.today()}, {next(named, platform.processor())}, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description="PGD-20: ours, the bare loop, other libraries")
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10 in Parquet")
    parser.add_argument("--cache", type=Path, required=True, help="model folder of the network")
    parser.add_argument("--n", type=int, default=250, help="images per round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of the attacks; training uses all"
    )
    parser.add_argument("--peers", action="store_true", help="pip install foolbox and ART")
    options = parser.parse_args()
    if options.peers:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *PEERS], check=True)
    n, rounds = options.n, options.rounds
    classifier, images = model_and_images(options.data, options.cache, n * rounds)
    torch.set_num_threads(options.threads)
    attacks = {
        BARE: bare(classifier),
        **ours(classifier),
        **libraries(classifier, images),
    }
    runs: dict[str, list[Run]] = {name: [] for name in attacks}
    for index in range(rounds):
        batch = images[torch.arange(index * n, (index + 1) * n)]
        names = list(attacks)
        for name in names[index % len(names) :] + names[: index % len(names)]:
            runs[name].append(measure(name, attacks[name], batch, classifier))
    clean = _right(classifier, images.pixels(), images.labels) / len(images)
    print(
        f"\n{hardware()}; {options.threads} threads; {rounds} rounds of {n} images; "
        f"clean accuracy {clean:.1%}\n\n{table(runs, n)}"
    )


if __name__ == "__main__":
    main()
