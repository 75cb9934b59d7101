"""The boxes of `gpu.py`: what is measured on a GPU, and beside what."""

import importlib
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch
from synthetic import CLASSES, THREAT, images, pgd, recipe, trained
from torch import Tensor, nn
from torch.nn import functional as F

from components.attacks import Linf, craft, violations
from components.attacks.autoattack import STEPS as AUTOATTACK_STEPS
from components.attacks.autoattack import AutoAttack
from components.data import image_set
from components.data.image_set import ImageSet
from components.models.checkpoints import ModelCard, save
from components.models.classifiers import ResNet, ResNet18
from components.models.defense import Defense, channels_last
from components.models.precision import full_precision
from components.training.classification import Classification
from components.training.contract import Frozen
from components.training.loop import fit

Attacker = Callable[[ImageSet], Tensor]
Figures = dict[str, Any]
ROOT = Path(__file__).parent.parent
STEPS, STEP = 20, 0.25
REHEARSAL = "LIMPID_GPU_REHEARSAL"


@dataclass
class Setting:
    """The device, the sizes and the network of a run."""

    device: torch.device
    small: bool
    out: Path
    rounds: int = field(init=False)

    def __post_init__(self) -> None:
        self.rounds = 2 if self.small else 3
        self.shape = (3, 16, 16) if self.small else (3, 32, 32)
        self.threat = Linf(norm="linf", eps_255=128.0) if self.small else THREAT

    @property
    def model(self) -> ResNet | ResNet18:
        """The section of the network."""
        small, whole = ResNet(kind="resnet", depth=8, width=4), ResNet18(kind="resnet18", width=64)
        return small if self.small else whole

    @cached_property
    def network(self) -> nn.Module:
        """The network, trained for seconds, frozen, in eval mode."""
        began = time.perf_counter()
        data = images(200 if self.small else 5000, self.shape, seed=1)
        network = trained(self.model, data, self.device, epochs=2 if self.small else 6)
        print(f"the network is trained ({time.perf_counter() - began:.0f} s)", flush=True)
        return network

    def images(self, count: int, seed: int) -> ImageSet:
        """Return synthetic images."""
        return images(count, self.shape, seed)

    def seconds(self, work: Callable[[], Any]) -> tuple[Any, float]:
        """Return what `work` returns and how long it took: of the clock, or CPU time on a CPU."""
        clock = time.perf_counter if self.device.type == "cuda" else time.process_time
        self.wait()
        began = clock()
        result = work()
        self.wait()
        return result, clock() - began

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


# The boxes


def marked_tests(setting: Setting, figures: Figures) -> None:
    """Run the tests that are marked `gpu`; keep what they recorded."""
    report = setting.out / "tests.xml"
    report.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "pytest", "-m", "gpu", str(ROOT / "tests" / "gpu"),
        f"--junitxml={report}", "-o", "junit_family=legacy", "-p", "no:cacheprovider",
    ]  # fmt: skip
    if setting.small:
        command += ["-k", "draws or batches or averaged"]
    environment = {**os.environ, **({REHEARSAL: "1"} if setting.device.type == "cpu" else {})}
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        code = process.wait()
    finally:
        process.kill()
    suite = next(ElementTree.parse(report).iter("testsuite"))
    figures |= {
        name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")
    }
    for one in suite.iter("property"):
        figures[str(one.get("name"))] = one.get("value")
    assert code == 0, f"pytest ended with {code}"


def pgd20(setting: Setting, figures: Figures) -> None:
    """Compare PGD-20 with a bare loop and torchattacks."""
    n = 8 if setting.small else 500
    attacks = {
        "bare loop": bare_pgd(setting),
        # Which layout full float32 is faster in differs by card.
        "bare loop, channels first": bare_pgd(setting, torch.contiguous_format),
        "ours, last iterate": crafted(setting, pgd(early_stop=False)),
        "ours, early stop": crafted(setting, pgd(early_stop=True)),
    }
    peer = torchattacks()
    if peer is not None:
        eps = setting.threat.eps
        library = peer.PGD(setting.network, eps, STEP * eps, STEPS)
        attacks["torchattacks"] = as_attacker(setting, library)
    compare(setting, figures, attacks, n, setting.rounds)


def autoattack(setting: Setting, figures: Figures) -> None:
    """Compare AutoAttack with that of torchattacks, given the 100 steps of its authors."""
    n = 4 if setting.small else 100
    ours = AutoAttack(kind="autoattack", version="standard")
    attacks = {"ours": crafted(setting, ours)}
    peer = torchattacks()
    if peer is not None:
        library = peer.AutoAttack(
            setting.network, norm="Linf", eps=setting.threat.eps, n_classes=CLASSES, seed=0
        )
        for member in library._autoattack.attacks:
            if hasattr(member, "steps"):
                member.steps = AUTOATTACK_STEPS
        attacks["torchattacks"] = as_attacker(setting, library)
    compare(setting, figures, attacks, n, rounds=1)


def training(setting: Setting, figures: Figures) -> None:
    """Compare an epoch of `fit` with a bare loop, and the precisions with each other."""
    n, size = (64, 16) if setting.small else (10_000, 128)
    data, gpu = setting.images(n, seed=5), setting.device.type == "cuda"
    figures |= {"n": n, "batch_size": size}
    precisions = ["float32", "tf32", "bfloat16"] if gpu else ["float32", "bfloat16"]
    running = {
        "bare loop": bare_training(setting, data, size),
        **{f"ours, {name}": our_training(setting, data, size, name) for name in precisions},
    }
    spent: dict[str, list[float]] = {name: [] for name in running}
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    for index in range(setting.rounds + 1):
        for name, epochs in running.items():
            _, seconds = setting.seconds(lambda epochs=epochs: next(epochs))
            if index:  # the first one starts the libraries up
                spent[name].append(seconds)
                figures[name] = {"seconds an epoch": median(spent[name]), "epochs": index}
    ratio(figures, "times the bare loop", spent["ours, float32"], spent["bare loop"])
    if gpu:
        figures["MiB at the peak"] = torch.cuda.max_memory_allocated() / 2**20


def processes(setting: Setting, figures: Figures) -> None:
    """Compare one process that crafts with two on the same GPU."""
    try:
        importlib.import_module("pipelines.tasks.crafting")
    except ModuleNotFoundError as error:
        figures["left out"] = f"the pipeline needs {error.name}"
        return
    n = 4 if setting.small else 250
    figures |= {"n": 4 * n, "shards": 4}
    with tempfile.TemporaryDirectory() as folder:
        spec = set_to_craft(setting, Path(folder), n)
        for name, parts in (("one", [[0, 1, 2, 3]]), ("two", [[0, 1], [2, 3]])):
            figures[name] = side_by_side(spec, parts, setting.device.type)
    gain = figures["one"]["seconds"] / figures["two"]["seconds"]
    figures["two processes are faster by"] = round(gain, 2)


# The parts of the boxes


def compare(
    setting: Setting, figures: Figures, attacks: dict[str, Attacker], n: int, rounds: int
) -> None:
    """Run all attacks on the same images in turns; note counts, seconds and ratios."""
    figures |= {"n": n, "rounds": rounds, "eps_255": round(255 * setting.threat.eps, 2)}
    spent: dict[str, list[float]] = {name: [] for name in attacks}
    right = dict.fromkeys(attacks, 0)
    with full_precision():
        for attack in attacks.values() if rounds > 1 else ():
            attack(setting.images(n, seed=99))  # starts the libraries up
    for index in range(rounds):
        data, names = setting.images(n, seed=10 + index), list(attacks)
        for name in names[index % len(names) :] + names[: index % len(names)]:
            if setting.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with full_precision():
                found, seconds = setting.seconds(lambda name=name, data=data: attacks[name](data))
            broken = violations(found.cpu(), data.pixels(), setting.threat)
            assert not broken, f"{name} left the threat: {broken}"
            spent[name].append(seconds)
            right[name] += count_right(setting, found, data.labels)
            figures[name] = {"seconds": median(spent[name]), "right": right[name]}
            if setting.device.type == "cuda":
                figures[name]["MiB at the peak"] = torch.cuda.max_memory_allocated() / 2**20
    first, *others = attacks
    for name in others:
        for other in (first, "torchattacks"):
            if name != other and other in attacks:
                ratio(figures, f"{name}: times {other}", spent[name], spent[other])


def ratio(figures: Figures, name: str, ours: list[float], other: list[float]) -> None:
    """Note the median and the range of a ratio of seconds."""
    found = [a / b for a, b in zip(ours, other, strict=True)]
    figures[name] = [round(f(found), 3) for f in (median, min, max)]


def count_right(setting: Setting, found: Tensor, labels: Tensor) -> int:
    """Return how many images the network classifies as labelled."""
    with torch.no_grad():
        logits = setting.network(found.to(setting.device))
    return int((logits.argmax(1).cpu() == labels).sum())


def crafted(setting: Setting, attack: Any) -> Attacker:
    """Return one of our attacks, as `craft` runs it."""
    defense = Defense(deepcopy(setting.network), None).freeze()
    return lambda data: craft(attack, defense, "full", data, setting.threat, 0, len(data)).images


def as_attacker(setting: Setting, library: Any) -> Attacker:
    """Return an attack of torchattacks."""

    def run(data: ImageSet) -> Tensor:
        found: Tensor = library(
            data.pixels().to(setting.device), data.labels.to(setting.device)
        ).detach()
        return found

    return run


def torchattacks() -> Any:
    """Return the library, or None."""
    try:
        return importlib.import_module("torchattacks")
    except ImportError as error:
        print(f"torchattacks is left out ({error})", flush=True)
        return None


def bare_pgd(setting: Setting, layout: torch.memory_format = torch.channels_last) -> Attacker:
    """Return the least that PGD can do: forward pass, input gradient, step."""
    network, eps = deepcopy(setting.network), setting.threat.eps
    if layout is torch.channels_last:
        channels_last(network)

    def attack(data: ImageSet) -> Tensor:
        clean = data.pixels().to(setting.device).contiguous(memory_format=layout)
        labels = data.labels.to(setting.device)
        low, high = (clean - eps).clamp_(min=0), (clean + eps).clamp_(max=1)
        x = torch.empty_like(clean).uniform_(-eps, eps).add_(clean).clamp_(0, 1)
        for _ in range(STEPS):
            x.requires_grad_()
            loss = F.cross_entropy(network(x), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, x)
            x = torch.clamp(x.detach() + STEP * eps * gradient.sign(), low, high)
        return x

    return attack


def untrained(setting: Setting) -> nn.Module:
    """Return the network before its training, channels last."""
    torch.manual_seed(0)
    network: nn.Module = setting.model.build(setting.shape, CLASSES).to(setting.device)
    channels_last(network)
    return network.train()


def our_training(setting: Setting, data: ImageSet, size: int, precision: str) -> Iterator[float]:
    """Yield after every epoch of `fit`."""
    config = recipe(
        epochs=100, batch_size=size, optimiser="sgd", weight_decay=5e-4, schedule="constant",
        augmentation="flip_crop", precision=precision,
    )  # fmt: skip
    objective = Classification(kind="classification").bind(Frozen(None, (), THREAT))
    for epoch in fit(untrained(setting), objective, data, None, config, 0, lambda *_: {}, None):
        yield epoch.metrics["loss"]


def bare_training(setting: Setting, data: ImageSet, size: int) -> Iterator[float]:
    """Yield after every epoch of a plain loop: bytes and augmentation on the device, no metrics."""
    device, network = setting.device, untrained(setting)
    pixels, labels = data.images.to(device), data.labels.to(device)
    optimiser = torch.optim.SGD(
        network.parameters(), 0.01, momentum=0.9, weight_decay=5e-4, nesterov=True,
        fused=device.type == "cuda" or None,
    )  # fmt: skip
    offsets = torch.arange(setting.shape[2], device=device)
    with_rows = torch.arange(size, device=device)[:, None, None]
    while True:
        total = torch.zeros((), device=device)
        order = torch.randperm(len(data), device=device)
        with full_precision():
            for rows in order[: len(data) // size * size].split(size):
                x = pixels[rows].float() / 255
                x = torch.where(torch.rand(size, 1, 1, 1, device=device) < 0.5, x.flip(3), x)
                x = F.pad(x, (4, 4, 4, 4)).permute(0, 2, 3, 1)
                shift = torch.randint(9, (2, size, 1), device=device) + offsets
                x = x[with_rows, shift[0][:, :, None], shift[1][:, None, :]].permute(0, 3, 1, 2)
                loss = F.cross_entropy(network(x), labels[rows])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                total += loss.detach()
        yield float(total)


def set_to_craft(setting: Setting, folder: Path, n: int) -> Any:
    """Write four shards of `n` images and the network; return the set to craft on them."""
    from pipelines.tasks.crafting import SetSpec
    from pipelines.tasks.subject import Subject

    data = setting.images(4 * n, seed=6)
    image_set.write(folder / "images", data, n)
    card = ModelCard(
        format=1, family="classifier", provenance={}, shape=list(setting.shape),
        model=setting.model.model_dump(), class_names=list(data.class_names),
    )  # fmt: skip
    save(folder / "model", setting.network, card)
    return SetSpec(
        Subject(folder / "model"), "full", pgd(), folder / "images", setting.threat, 0, n,
        folder / "out",
    )  # fmt: skip


def side_by_side(spec: Any, parts: list[list[int]], device: str) -> Figures:
    """Craft the shards of `parts`, each part in a process of its own; return seconds and memory."""
    context = torch.multiprocessing.get_context("spawn")
    begin, queue = context.Barrier(len(parts)), context.SimpleQueue()
    workers = [
        context.Process(target=craft_part, args=(spec, part, device, begin, queue), daemon=True)
        for part in parts
    ]
    try:
        for worker in workers:
            worker.start()
        while queue.empty() or any(worker.is_alive() for worker in workers):
            assert not any(worker.exitcode for worker in workers), "a process failed"
            time.sleep(0.01)
        found = [queue.get() for _ in workers]
    finally:
        for worker in workers:
            worker.kill()
    seconds, peaks = zip(*found, strict=True)
    return {"seconds": max(seconds), "MiB at the peak of a process": max(peaks)}


def craft_part(spec: Any, shards: list[int], device: str, begin: Any, queue: Any) -> None:
    """Craft some shards as a worker of the pipeline does, after one to start the libraries up."""
    from pipelines.tasks.crafting import craft_shard

    path = spec.out / f"{os.getpid()}.parquet"
    craft_shard(spec, shards[0], path, device)
    begin.wait()
    began = time.perf_counter()
    for shard in shards:
        craft_shard(spec, shard, path, device)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else 0.0
    queue.put((time.perf_counter() - began, peak))


# Every box, and the part of the time that is over when it must end.
BOXES: dict[str, tuple[Callable[[Setting, Figures], None], float]] = {
    "tests": (marked_tests, 0.3),
    "pgd": (pgd20, 0.45),
    "training": (training, 0.6),
    "processes": (processes, 0.7),
    "autoattack": (autoattack, 0.97),
}
