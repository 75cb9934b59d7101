"""What the cases are made of: digits, small trained classifiers, purifiers of one function."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from components.attacks import Attack, Crafted, Linf, craft
from components.checks.sets import stored_set
from components.data.draws import NoiseStream
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier, ResNet, SmallCnn
from components.models.defense import Defense, Mode
from components.models.purifiers import Purifier
from components.probes import Finding, answers, gradients, masking, paths, probe
from components.probes.bench import Bench
from components.sources.digits import Digits
from components.training.classification import AdversarialClassification, Classification
from components.training.contract import Frozen, InLoop, Objective
from components.training.loop import Training, fit
from components.training.optimisers import Adam

THREAT = Linf(norm="linf", eps_255=51)
PROBED, TRAINED, BATCH = 48, 900, 48
SEED = 0
EOT = 4


@dataclass(frozen=True)
class Toy:
    """Digits to train on, to compare with and to attack, and two classifiers of them.

    `only` names the one check that a lie must raise, where the others need not be run.
    """

    train: ImageSet
    val: ImageSet
    test: ImageSet
    classifier: Classifier
    other: Classifier
    only: str | None = None

    def under_attack(self) -> ImageSet:
        """Return the digits that sets are crafted from."""
        return self.test[torch.arange(PROBED)]

    def craft(self, attack: Attack, threat: Linf = THREAT) -> Crafted:
        """Attack the bare classifier."""
        defense = Defense(self.classifier, None).freeze()
        return craft(attack, defense, "full", self.under_attack(), threat, 0, BATCH)


Case = Callable[[Toy], list[Finding]]
Function = Callable[[Tensor, NoiseStream | None], Tensor]


def train_toy() -> Toy:
    """Train what the cases need; seconds on one core, the same weights every time."""
    source = Digits(
        kind="digits", max_reject_fraction=0, val=1, test=1, train_limit=None, test_limit=None
    )
    raw = source.load(Path()).train
    order = torch.randperm(len(raw.labels), generator=torch.Generator().manual_seed(0))
    images = ImageSet(
        torch.from_numpy(raw.images)[order], torch.from_numpy(raw.labels)[order], order,
        tuple(str(k) for k in range(10)),
    )  # fmt: skip
    train = images[torch.arange(TRAINED)]
    test = images[torch.arange(TRAINED, TRAINED + 2 * PROBED)]
    val = images[torch.arange(TRAINED + 2 * PROBED, TRAINED + 4 * PROBED)]
    first, other = (
        train_classifier(SmallCnn(kind="small_cnn", width=width), train) for width in (8, 6)
    )
    return Toy(train, val, test, first, other)


def train_classifier(config: SmallCnn | ResNet, data: ImageSet, robust: bool = False) -> Classifier:
    """Return a frozen classifier of `data`; `robust` trains it adversarially."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = config.build(data.shape, 10)
    model.normalise_by(data.pixels())
    frozen = Frozen(None, (), THREAT)
    objective = Classification(kind="classification").bind(frozen)
    if robust:
        objective = AdversarialClassification(
            kind="adversarial_classification",
            attack=InLoop(steps=1, step=1.25, random_start=True, ramp=0.3),
            w_clean=0.5,
        ).bind(frozen)
    train(model, objective, data, 5)
    return model


def train(
    model: nn.Module, objective: Objective, data: ImageSet, epochs: int, gan: bool = False
) -> None:
    """Train `model` in place, and freeze it; `gan` takes the rate and moments of such a pair."""
    config = Training(
        epochs=epochs, batch_size=50,
        optimiser=Adam(kind="adam", betas=[0.5, 0.9] if gan else [0.9, 0.999]),
        learning_rate=0.002 if gan else 0.01, weight_decay=0,
        schedule="constant" if gan else "one_cycle", augmentation="none", precision="float32",
    )  # fmt: skip
    nothing: Mapping[str, float] = {}
    for _ in fit(model, objective, data, None, config, 0, lambda *_: nothing, None):
        pass
    model.eval().requires_grad_(False)


class FunctionPurifier(Purifier):
    """A purifier of one function of (x, stream); `random` is what it declares itself to be."""

    def __init__(self, function: Function, random: bool) -> None:
        super().__init__()
        self.function = function
        self.stochastic = random

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        """Return what the function returns."""
        return self.function(x, stream)


def probed(
    purifier: Purifier | None,
    classifier: nn.Module | None = None,
    modes: Sequence[Mode] = ("full",),
) -> Case:
    """Return the case of a defense that is probed as every defense is, in the `modes` of a ladder.

    Without a `classifier` it is that of the toy.
    """

    def case(toy: Toy) -> list[Finding]:
        behind = toy.classifier if classifier is None else classifier
        defense = Defense(behind, purifier).freeze()
        return probed_by(defense, toy, modes)

    return case


def probed_by(defense: Defense, toy: Toy, modes: Sequence[Mode] = ("full",)) -> list[Finding]:
    """Probe a defense as every defense is probed, on the images to attack.

    Where the toy names the `only` check that matters, that one alone is run, if it is dear.
    """
    one = ALONE.get(toy.only or "")
    if one:
        data = toy.under_attack()
        bench = Bench(
            defense, data.pixels(), data.labels, data.ids, THREAT, SEED, None, BATCH, modes[0]
        )
        return [one(bench, toy)]
    return probe(
        defense, modes, toy.test, THREAT, SEED, PROBED, EOT, BATCH, None, toy.val, thorough=False
    )


# Checks that can be run without all the others, by the name of their finding.
ALONE: dict[str, Callable[[Bench, Toy], Finding]] = {
    "logits": lambda bench, toy: answers.check_logits(bench.defense, bench.x, bench.draws)[0],
    "randomness_declared": lambda bench, toy: answers.check_logits(
        bench.defense, bench.x, bench.draws
    )[1],
    "one_answer": lambda bench, toy: answers.one_answer(bench, bench.points()),
    "looks_around": lambda bench, toy: answers.looks_around(bench.defense),
    "gradient_honest/full": lambda bench, toy: gradients.gradient_honest(bench, bench.points()),
    "gradient_pays/full": lambda bench, toy: gradients.gradient_pays(bench, bench.points()),
    "gradient_pays/bpda": lambda bench, toy: gradients.gradient_pays(bench, bench.points(), "bpda"),
    "gradient_declared": lambda bench, toy: gradients.gradient_declared(bench),
    "gradient_present/full": lambda bench, toy: gradients.gradient_present(
        bench.defense, "full", bench.x, bench.labels, bench.draws
    ),
    "gradient_adds_up/full": lambda bench, toy: paths.gradient_adds_up(bench),
    "loss_alive/full": lambda bench, toy: gradients.loss_alive(
        bench.defense, "full", bench.x, bench.labels, bench.draws
    ),
    "blind_attack": lambda bench, toy: masking.blind_attack(bench),
    "remembered": lambda bench, toy: masking.remembered(bench, toy.test, toy.val),
}


def purifying(function: Function, random: bool = False) -> Case:
    """Return the case of a `FunctionPurifier`."""
    return probed(FunctionPurifier(function, random))


def stored(toy: Toy, images: Tensor) -> list[Finding]:
    """Check `images` (N,C,H,W) as a set that was read back from disk."""
    data = toy.under_attack()
    return stored_set("full/pgd", [(images, data.ids, data.labels, data)], len(data), THREAT)
