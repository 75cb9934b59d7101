"""Does the harness catch lies, and does it leave the honest alone? Known answers, planted faults.

Every lie is a fault that has inflated a published or a near-published number, planted into a small
classifier of real digits; the named check must raise it. Honest defenses of many kinds must pass.
Two answers are known without any attack: an undefended network falls, and a linear model is
robust exactly where its margin exceeds the radius times the dual norm of the weights.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from components.attacks import Attack, Crafted, Linf, craft
from components.attacks.apgd import ApgdCe
from components.attacks.gradient import Fgsm, Noise, Pgd
from components.checks.scores import draws_enough, strong_enough, undefended_falls
from components.checks.sets import agreement, effort, stored_set
from components.config import Config
from components.data.draws import Draws
from components.data.image_set import ImageSet
from components.models.checkpoints import state_digest
from components.models.classifiers import Classifier, ResNet, SmallCnn
from components.models.defense import Defense
from components.models.purifiers import Purifier
from components.models.purifiers.autoencoder import ConvAutoencoder
from components.models.purifiers.controls import BitDepth, GaussianNoise, Identity, Median
from components.models.purifiers.transforms import RandomTransform, Rt2
from components.probes import Finding, probe
from components.probes.models import convention, leakage, unchanged
from components.sources.digits import Digits
from components.training.classification import AdversarialClassification, Classification
from components.training.contract import Frozen, InLoop, Objective
from components.training.koo import NormalTeacher
from components.training.loop import Training, fit

THREAT = Linf(norm="linf", eps_255=51)
PROBED, TRAINED, BATCH = 48, 900, 48
EOT = 4


class Result(Config):
    """One case: what was planted, which check must raise it (None: no check may), and the outcome.

    `raised` are the names of all checks that failed.
    """

    case: str
    expected: str | None
    raised: list[str]
    caught: bool


@dataclass(frozen=True)
class Toy:
    """What the cases are planted into: digits to learn from and to attack, trained classifiers."""

    train: ImageSet
    test: ImageSet
    classifier: Classifier
    other: Classifier


Case = Callable[[Toy], list[Finding]]


def run(toy: Toy) -> Iterator[Result]:
    """Run every case, one result at a time."""
    for case, (expected, findings) in LIES.items():
        raised = _raised(findings(toy))
        yield Result(case=case, expected=expected, raised=raised, caught=expected in raised)
    for case, findings in HONEST.items():
        raised = _raised(findings(toy), blocking=True)
        yield Result(case=case, expected=None, raised=raised, caught=not raised)


def toy() -> Toy:
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
    first, other = (_classifier(SmallCnn(kind="small_cnn", width=width), train) for width in (8, 6))
    return Toy(train, test, first, other)


def _raised(findings: list[Finding], blocking: bool = False) -> list[str]:
    return [f.name for f in findings if not f.passed and (f.level == "block" or not blocking)]


def _train(model: nn.Module, objective: Objective, data: ImageSet, epochs: int) -> None:
    config = Training(
        epochs=epochs, batch_size=50, optimiser="adam", learning_rate=0.01, weight_decay=0,
        schedule="one_cycle", augmentation="none", precision="float32",
    )  # fmt: skip
    nothing: Mapping[str, float] = {}
    for _ in fit(model, objective, data, None, config, 0, lambda *_: nothing, None):
        pass
    model.eval().requires_grad_(False)


def _classifier(config: SmallCnn | ResNet, train: ImageSet, robust: bool = False) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = config.build(train.shape, 10)
    model.normalise_by(train.pixels())
    frozen = Frozen(None, (), THREAT)
    plain = Classification(kind="classification").bind(frozen)
    hard = AdversarialClassification(
        kind="adversarial_classification",
        attack=InLoop(steps=1, step=1.25, random_start=True, ramp=0.3),
        w_clean=0.5,
    ).bind(frozen)
    _train(model, hard if robust else plain, train, 5)
    return model


def _probed(purifier: Purifier | None, classifier: nn.Module | None = None) -> Case:
    """Return the case of a defense that is probed as every defense is."""

    def case(toy: Toy) -> list[Finding]:
        defense = Defense(classifier or toy.classifier, purifier).freeze()
        return probe(defense, ["full"], toy.test, THREAT, 0, PROBED, EOT, None)

    return case


class _Lie(Purifier):
    """A purifier made of one function of (x, draws)."""

    def __init__(self, function: Callable[[Tensor, Draws | None], Tensor], random: bool) -> None:
        super().__init__()
        self.function = function
        self.stochastic = random

    def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
        return self.function(x, draws)


class _Answers(nn.Module):
    """A classifier whose logits pass through one function."""

    def __init__(self, classifier: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.classifier, self.function = classifier, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.classifier(x))


def _answering(function: Callable[[Tensor], Tensor]) -> Case:
    return lambda toy: _probed(None, _Answers(toy.classifier, function))(toy)


def _purifying(function: Callable[[Tensor, Draws | None], Tensor], random: bool = False) -> Case:
    return _probed(_Lie(function, random))


def _rounded(x: Tensor, draws: Draws | None) -> Tensor:
    return (3 * x).round() / 3


def _frozen(x: Tensor, draws: Draws | None) -> Tensor:
    noise = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(0)).to(x.dtype)
    return (x + 0.1 * noise).clamp(0, 1)


def _noise_on_content(x: Tensor, draws: Draws | None) -> Tensor:
    keys = (x.detach().double().flatten(1).sum(1) * 1e9).long()
    noise = Draws(0, "clean", keys).normal(tuple(x.shape[1:]), "content").to(x.dtype)
    return (x + 0.1 * noise).clamp(0, 1)


def _half_detached(x: Tensor, draws: Draws | None) -> Tensor:
    blurred = torch.nn.functional.avg_pool2d(x.detach(), 3, 1, 1)
    return 0.3 * x + 0.7 * blurred


def _company(x: Tensor, draws: Draws | None) -> Tensor:
    return (x - 0.5 * x.mean(0, keepdim=True)).clamp(0, 1)


def _labels_leaked(toy: Toy) -> list[Finding]:
    """A purifier that looks the label up by id and paints a training image of that class."""
    labels = dict(zip(toy.test.ids.tolist(), toy.test.labels.tolist(), strict=True))
    pixels = toy.train.pixels()
    example = {k: pixels[(toy.train.labels == k).nonzero()[0, 0]] for k in range(10)}

    def painted(x: Tensor, draws: Draws | None) -> Tensor:
        assert draws is not None
        known = [labels.get(int(image)) for image in draws.ids]
        return torch.stack(
            [x[i] if k is None else example[k].to(x.dtype) for i, k in enumerate(known)]
        )

    return _purifying(painted)(toy)


def _batch_norm_training(toy: Toy) -> list[Finding]:
    classifier = deepcopy(toy.classifier)
    defense = Defense(classifier, None).freeze()
    before = state_digest(defense)
    classifier.train()
    findings = probe(defense, ["full"], toy.test, THREAT, 0, PROBED, EOT, None)
    return [*findings, unchanged(before, state_digest(defense), classifier.training)]


def _some(toy: Toy) -> ImageSet:
    return toy.test[torch.arange(PROBED)]


def _crafted(toy: Toy, threat: Linf = THREAT, steps: int = 10) -> Crafted:
    attack = Pgd(
        kind="pgd", steps=steps, step=0.25, restarts=1, random_start=True, early_stop=True, eot=1
    )
    defense = Defense(toy.classifier, None).freeze()
    return craft(attack, defense, "full", _some(toy), threat, 0, BATCH)


def _stored(toy: Toy, images: Tensor) -> list[Finding]:
    data = _some(toy)
    return stored_set("full/pgd", images, data.ids, data.labels, data, THREAT)


def _doubled(toy: Toy) -> list[Finding]:
    return _stored(toy, _crafted(toy, THREAT.scaled(2)).images)


def _truncated(toy: Toy) -> list[Finding]:
    images = _crafted(toy, Linf(norm="linf", eps_255=50.5)).images
    grown = torch.where(images < _some(toy).pixels(), images - 0.5 / 255, images)
    return _stored(toy, (grown * 255).to(torch.uint8).float() / 255)


def _other_classifier(toy: Toy) -> list[Finding]:
    pair = (state_digest(toy.other), state_digest(toy.classifier))
    return [agreement("full/pgd", {"classifier": pair})]


def _ten_steps(toy: Toy) -> list[Finding]:
    """Call by the name of APGD with 100 steps what took ten."""
    short = ApgdCe(kind="apgd_ce", steps=10, restarts=1, eot=1)
    defense = Defense(toy.classifier, None).freeze()
    small = Linf(norm="linf", eps_255=4)
    crafted = craft(short, defense, "full", _some(toy), small, 0, BATCH)
    return [effort("full/autoattack", short.model_copy(update={"steps": 100}), crafted)]


def _leaking(toy: Toy) -> list[Finding]:
    return [
        leakage(toy.test.images, [("train", torch.cat([toy.train.images, toy.test.images[:3]]))])
    ]


def _weak() -> Attack:
    return Fgsm(kind="fgsm", random_start=False, step=1, eot=1)


def _strong() -> Attack:
    return ApgdCe(kind="apgd_ce", steps=100, restarts=1, eot=1)


def _idle(toy: Toy) -> list[Finding]:
    """An attack that finds nothing: its undefended control does not fall."""
    data = _some(toy)
    defense = Defense(toy.classifier, None).freeze()
    noise = craft(Noise(kind="noise", tries=2), defense, "full", data, THREAT, 0, BATCH)
    return [undefended_falls(1 - float(noise.success.float().mean()), THREAT)]


def _falls(toy: Toy) -> list[Finding]:
    attack = ApgdCe(kind="apgd_ce", steps=100, restarts=1, eot=1)
    defense = Defense(toy.classifier, None).freeze()
    crafted = craft(attack, defense, "full", _some(toy), THREAT, 0, BATCH)
    return [
        undefended_falls(1 - float(crafted.success.float().mean()), THREAT),
        effort("full/apgd_ce", attack, crafted),
        *_stored(toy, crafted.images),
    ]


class _Linear(nn.Module):
    """Logits of pixels (N,C,H,W) by one matrix: robust where the margin says so."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias

    def robust(self, x: Tensor, labels: Tensor, eps: float) -> Tensor:
        """Return which images (N,) no change below `eps` in L-infinity fools (box aside)."""
        logits = self(x)
        gaps = logits.gather(1, labels[:, None]) - logits
        dual = (self.weight[labels][:, None] - self.weight[None]).abs().sum(2)
        held: Tensor = (gaps > eps * dual) | (torch.arange(len(self.bias)) == labels[:, None])
        return held.all(1)


def _linear(toy: Toy) -> list[Finding]:
    """Robust accuracy of a linear model against its closed form, away from the box."""
    generator = torch.Generator().manual_seed(0)
    model = _Linear(torch.randn(4, 16, generator=generator), torch.zeros(4)).requires_grad_(False)
    levels = torch.randint(102, 154, (500, 1, 4, 4), generator=generator, dtype=torch.uint8)
    x = levels.float() / 255
    labels = model(x).argmax(1)
    data = ImageSet(levels, labels, torch.arange(500), ("0", "1", "2", "3"))
    threat = Linf(norm="linf", eps_255=4)
    attack = ApgdCe(kind="apgd_ce", steps=100, restarts=1, eot=1)
    crafted = craft(attack, Defense(model, None).freeze(), "full", data, threat, 0, 500)
    exact = int(model.robust(x, labels, threat.eps).sum())
    found = int((~crafted.success).sum())
    return [
        Finding(
            name="closed_form",
            level="block",
            passed=abs(found - exact) <= 0.005 * len(data),
            detail=f"APGD-CE leaves {found} of {len(data)} images right, the closed form {exact}",
        )
    ]


def _restoring(config: ConvAutoencoder | RandomTransform) -> Case:
    """Return the case of a purifier that was briefly trained to give clean images back."""

    def case(toy: Toy) -> list[Finding]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            purifier = config.build(toy.train.shape)
        frozen = Frozen(toy.classifier, (), THREAT)
        objective = NormalTeacher(kind="normal_teacher").bind(frozen)
        _train(purifier, objective, toy.train, 3)
        return _probed(purifier)(toy)

    return case


def _control(config: Identity | GaussianNoise | Median | BitDepth) -> Case:
    return lambda toy: _probed(config.build(toy.test.shape))(toy)


def _trained(config: SmallCnn | ResNet, robust: bool) -> Case:
    return lambda toy: _probed(None, _classifier(config, toy.train, robust))(toy)


SMALL = SmallCnn(kind="small_cnn", width=8)
AUTOENCODER = ConvAutoencoder(
    kind="conv_autoencoder", blocks=2, width=12, strided=[2], residual="none"
)

LIES: dict[str, tuple[str, Case]] = {
    "rounding purifier": ("gradient_present/full", _purifying(_rounded)),
    "purifier under no_grad": (
        "gradient_present/full",
        _purifying(torch.no_grad()(lambda x, draws: 0.9 * x)),
    ),
    "half of the purifier detached": ("gradient_correct", _purifying(_half_detached)),
    "logits scaled by 1000": ("loss_alive/full", _answering(lambda logits: 1000 * logits)),
    "frozen noise declared random": ("randomness_declared", _purifying(_frozen, random=True)),
    "fresh noise declared deterministic": (
        "randomness_declared",
        _purifying(lambda x, draws: (x + 0.1 * torch.randn_like(x)).clamp(0, 1)),
    ),
    "noise keyed on content": ("gradient_correct", _purifying(_noise_on_content)),
    "NaN logits": ("logits", _answering(lambda logits: logits * torch.nan)),
    "softmax for logits": ("logits", _answering(lambda logits: logits.softmax(1))),
    "normalised input": (
        "input_convention",
        lambda toy: [convention((toy.test.pixels() - 0.3) / 0.3)],
    ),
    "input in 0..255": ("input_convention", lambda toy: [convention(255 * toy.test.pixels())]),
    "purifier that knows its batch": ("batch_independence", _purifying(_company)),
    "labels leaked": ("labels_unseen", _labels_leaked),
    "batch norm left in train mode": ("state_unchanged", _batch_norm_training),
    "radius doubled": ("threat_model/full/pgd", _doubled),
    "storage that truncates": ("threat_model/full/pgd", _truncated),
    "attack set of another classifier": ("provenance/full/pgd", _other_classifier),
    "ten-step AutoAttack": ("effort/full/autoattack", _ten_steps),
    "nothing but FGSM": (
        "strong_attack",
        lambda toy: [strong_enough({"full": [_weak()]}, (), True)],
    ),
    "one of three stand-ins alone": (
        "strong_attack",
        lambda toy: [strong_enough({"plain": [_strong()]}, ("direct", "plain", "detached"), True)],
    ),
    "scoring by a single draw": ("scoring_draws", lambda toy: [draws_enough(True, 32, 1)]),
    "test images in training": ("leakage", _leaking),
    "attack that finds nothing": ("undefended_falls", _idle),
}
HONEST: dict[str, Case] = {
    "known answer: undefended falls": _falls,
    "known answer: linear model": _linear,
    "bare classifier": _probed(None),
    "residual classifier": _trained(ResNet(kind="resnet", depth=8, width=4), False),
    "adversarially trained classifier": _trained(SMALL, True),
    "identity": _control(Identity(kind="identity")),
    "Gaussian noise": _control(GaussianNoise(kind="gaussian_noise", sigma=0.1)),
    "median filter": _control(Median(kind="median", size=3)),
    "autoencoder": _restoring(AUTOENCODER),
    "masking autoencoder": _restoring(
        RandomTransform(
            kind="random_transform",
            transform=Rt2(kind="rt2", patch=1, missing=0.15, sigma=0.05),
            inner=AUTOENCODER,
        )
    ),
    "scaled input": _purifying(lambda x, draws: 0.5 * x + 0.25),
    "blur": _purifying(lambda x, draws: torch.nn.functional.avg_pool2d(x, 3, 1, 1)),
}
