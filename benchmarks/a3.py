"""A3 beside AutoAttack: the images that each leaves, and the passes that each takes.

    python benchmarks/a3.py mnist --data DIR    small networks, trained adversarially
    python benchmarks/a3.py cifar --data DIR    a narrow ResNet-20, trained adversarially
    python benchmarks/a3.py masked              networks on digits whose gradient hides

DIR holds train.parquet and test.parquet. All networks are trained here, shortly, by PGD or FGSM. A
backward pass counts as two passes. The last column names the checks that block, among those that
meet the defense (`probe`): A3 is deceived unnoticed if it leaves more than AutoAttack by over half
a point, and none blocks.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from components.attacks import L2, Attack, Crafted, Linf, craft
from components.attacks.a3 import A3
from components.attacks.autoattack import AutoAttack
from components.data.image_set import ImageSet
from components.models.classifiers import ResNet, SmallCnn
from components.models.defense import Defense
from components.probes import Stored, probe
from components.selftest.toy import train
from components.sources import SourceConfig, prepare
from components.sources.digits import Digits
from components.sources.parquet import ParquetFiles
from components.training.classification import AdversarialClassification
from components.training.contract import Frozen, InLoop

SEED, VAL = 0, 100
QUICK, SLOW = A3(kind="a3"), AutoAttack(kind="autoattack", version="standard")
SMALLER, SMALL = (SmallCnn(kind="small_cnn", width=width) for width in (4, 8))
RESNET = ResNet(kind="resnet", depth=20, width=4)
PGD = InLoop(steps=3, step=0.7, random_start=True, ramp=0.3)
FGSM = InLoop(steps=1, step=1.25, random_start=True, ramp=0.3)
# Without a random start FGSM overfits to its own single step.
OVERFITTING = InLoop(steps=1, step=1, random_start=False, ramp=0.1)


@dataclass(frozen=True)
class Net:
    """A network under attack, images that it was not trained on, and others to compare with."""

    name: str
    classifier: nn.Module
    threat: Linf | L2
    test: ImageSet
    val: ImageSet


class Changed(nn.Module):
    """A network that is asked by way of a function of (network, pixels)."""

    def __init__(self, network: nn.Module, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.function = network, function

    def forward(self, x: Tensor) -> Tensor:
        """Return what the function returns."""
        return self.function(self.network, x)


def trained(
    config: SmallCnn | ResNet, data: ImageSet, attack: InLoop, eps_255: float, epochs: int
) -> nn.Module:
    """Return a network that was trained against `attack` within the radius."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = config.build(data.shape, len(data.class_names))
    model.normalise_by(data.pixels())
    objective = AdversarialClassification(
        kind="adversarial_classification", attack=attack, w_clean=0
    )
    train(model, objective.bind(Frozen(None, (), within(eps_255))), data, epochs)
    return model


def within(eps_255: float) -> Linf:
    """Return the L-infinity ball of this radius."""
    return Linf(norm="linf", eps_255=eps_255)


def mnist(source: SourceConfig, folder: Path) -> Iterator[Net]:
    """Yield small networks of different strength."""
    sets = prepare(source, SEED, folder)
    against_pgd = trained(SMALLER, sets.train, PGD, 51, 3)
    against_fgsm = trained(SMALLER, sets.train, FGSM, 25.5, 1)
    one, other = ("PGD", against_pgd), ("FGSM", against_fgsm)
    for (name, model), eps in ((one, 63), (other, 40), (one, 66), (other, 51)):
        yield Net(f"MNIST, trained by {name}", model, within(eps), sets.test, sets.val)


def cifar(source: SourceConfig, folder: Path) -> Iterator[Net]:
    """Yield a ResNet-20 of a quarter of the usual width."""
    sets = prepare(source, SEED, folder)
    model = trained(RESNET, sets.train, FGSM, 4, 4)
    yield Net("CIFAR-10, ResNet-20", model, within(4), sets.test, sets.val)


def masked(source: SourceConfig, folder: Path) -> Iterator[Net]:
    """Yield one network that overfits to FGSM, and a robust one behind three kinds of layers."""
    sets = prepare(source, SEED, folder)
    robust = trained(SMALL, sets.train, PGD, 51, 8)
    overfitted = trained(SMALL, sets.train, OVERFITTING, 102, 12)
    nets = {
        "robust, nothing hidden": robust,
        "overfitted to FGSM": overfitted,
        "logits times 300": Changed(robust, lambda net, x: 300 * net(x)),
        "pixels rounded to five levels": Changed(robust, lambda net, x: net((4 * x).round() / 4)),
        "softmax of the logits times 8": Changed(robust, lambda net, x: (8 * net(x)).softmax(1)),
    }
    for name, model in nets.items():
        yield Net(name, model, within(51), sets.test, sets.val)
    yield Net("robust, in L2", robust, L2(norm="l2", eps_l2=0.8), sets.test, sets.val)


def attacked(net: Net, attack: Attack) -> Crafted:
    """Run an attack on all images of a network, as one part."""
    defense = Defense(net.classifier, None).freeze()
    return craft(attack, defense, "full", net.test, net.threat, SEED, len(net.test))


def passes(found: Crafted) -> int:
    """Return the passes of a set, a backward pass counted as two."""
    return int(found.forward.sum() + 2 * found.backward.sum())


def blocking(net: Net, found: Crafted) -> str:
    """Return the probes that block."""
    defense = Defense(net.classifier, None).freeze()
    findings = probe(
        defense, ["full"], net.test, net.threat, SEED, 128, 1, len(net.test),
        Stored([found], defense.digest, passes(found)), net.val, thorough=False,
    )  # fmt: skip
    failed = [one.name for one in findings if not one.passed and one.level == "block"]
    return ", ".join(failed) or "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("group", choices=("mnist", "cifar", "masked"))
    parser.add_argument("--data", type=Path, default=Path(), help="folder of Parquet files")
    options = parser.parse_args()
    torch.set_num_threads(1)
    groups: dict[str, tuple[Callable[[SourceConfig, Path], Iterator[Net]], int]]
    groups = {"mnist": (mnist, 1000), "cifar": (cifar, 250), "masked": (masked, 400)}
    nets, n = groups[options.group]
    source: SourceConfig = ParquetFiles(
        kind="parquet", path=str(options.data), val=VAL, test=0, train_limit=8000, test_limit=n,
        max_reject_fraction=0,
    )  # fmt: skip
    if options.group == "masked":
        source = Digits(
            kind="digits", val=VAL, test=n, train_limit=None, test_limit=None, max_reject_fraction=0
        )
    print(
        "| network | radius | n | A3 | AutoAttack | passes of A3 | of AutoAttack | ratio | block |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for net in nets(source, options.data):
        quick, slow = attacked(net, QUICK), attacked(net, SLOW)
        left = [int((~found.success).sum()) for found in (quick, slow)]
        cost = [passes(found) for found in (quick, slow)]
        checks = blocking(net, quick)
        print(
            f"| {net.name} | {net.threat.norm} {net.threat.eps:.4g} | {len(net.test)} | {left[0]} "
            f"| {left[1]} | {cost[0]} | {cost[1]} | {cost[1] / cost[0]:.1f} | {checks} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
