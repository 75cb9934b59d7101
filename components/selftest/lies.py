"""Lies: faults that the harness must catch, each by the check that is named for it.

A lie is added as one entry of `LIES`: its name, the check that must raise it, and a function of the
toy that plants it and returns the findings.
"""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

from components.attacks import Crafted, Linf
from components.attacks.apgd import ApgdCe
from components.attacks.gradient import Fgsm, Noise, Pgd
from components.checks.scores import draws_enough, strong_enough, undefended_falls
from components.checks.sets import agreement, effort
from components.data.draws import NoiseStream
from components.models.defense import Defense
from components.models.identity import state_digest
from components.probes import Finding, probe
from components.probes.models import convention, leakage, unchanged
from components.selftest.toy import (
    EOT,
    PROBED,
    THREAT,
    Case,
    Toy,
    probed,
    purifying,
    stored,
)

WEAK = Fgsm(kind="fgsm", random_start=False, step=1, eot=1)
STRONG = ApgdCe(kind="apgd_ce", steps=100, restarts=1, eot=1)


class _Behind(nn.Module):
    """A classifier whose logits pass through one function."""

    def __init__(self, classifier: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.classifier, self.function = classifier, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.classifier(x))


def _with_logits(function: Callable[[Tensor], Tensor]) -> Case:
    return lambda toy: probed(None, _Behind(toy.classifier, function))(toy)


# Purifiers


def _rounded(x: Tensor, stream: NoiseStream | None) -> Tensor:
    return (3 * x).round() / 3


def _half_detached(x: Tensor, stream: NoiseStream | None) -> Tensor:
    blurred = torch.nn.functional.avg_pool2d(x.detach(), 3, 1, 1)
    return 0.3 * x + 0.7 * blurred


def _with_fixed_noise(x: Tensor, stream: NoiseStream | None) -> Tensor:
    noise = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(0)).to(x.dtype)
    return (x + 0.1 * noise).clamp(0, 1)


def _with_noise_of_content(x: Tensor, stream: NoiseStream | None) -> Tensor:
    keys = (x.detach().double().flatten(1).sum(1) * 1e9).long()
    noise = NoiseStream(keys).normal(tuple(x.shape[1:]), "content").to(x.dtype)
    return (x + 0.1 * noise).clamp(0, 1)


def _less_batch_mean(x: Tensor, stream: NoiseStream | None) -> Tensor:
    return (x - 0.5 * x.mean(0, keepdim=True)).clamp(0, 1)


# Models and data


def _batch_norm_training(toy: Toy) -> list[Finding]:
    classifier = deepcopy(toy.classifier)
    defense = Defense(classifier, None).freeze()
    before = state_digest(defense)
    classifier.train()
    findings = probe(defense, ["full"], toy.test, THREAT, 0, PROBED, EOT, None)
    return [*findings, unchanged(before, state_digest(defense), classifier.training)]


def _test_in_training(toy: Toy) -> list[Finding]:
    train = torch.cat([toy.train.images, toy.test.images[:3]])
    return [leakage(toy.test.images, [("train", train)])]


# Stored sets and attacks


def _pgd(toy: Toy, threat: Linf) -> Crafted:
    attack = Pgd(
        kind="pgd", steps=10, step=0.25, restarts=1, random_start=True, early_stop=True, eot=1
    )
    return toy.craft(attack, threat)


def _doubled(toy: Toy) -> list[Finding]:
    return stored(toy, _pgd(toy, THREAT.scaled(2)).images)


def _truncated(toy: Toy) -> list[Finding]:
    images = _pgd(toy, Linf(norm="linf", eps_255=50.5)).images
    grown = torch.where(images < toy.under_attack().pixels(), images - 0.5 / 255, images)
    return stored(toy, (grown * 255).to(torch.uint8).float() / 255)


def _other_classifier(toy: Toy) -> list[Finding]:
    pair = (state_digest(toy.other), state_digest(toy.classifier))
    return [agreement("full/pgd", {"classifier": pair})]


def _ten_steps(toy: Toy) -> list[Finding]:
    """Store the set of ten steps of APGD under the name of a hundred."""
    short = ApgdCe(kind="apgd_ce", steps=10, restarts=1, eot=1)
    crafted = toy.craft(short, Linf(norm="linf", eps_255=4))
    return [effort("full/autoattack", short.model_copy(update={"steps": 100}), crafted)]


def _finds_nothing(toy: Toy) -> list[Finding]:
    noise = toy.craft(Noise(kind="noise", tries=2))
    return [undefended_falls(1 - float(noise.success.float().mean()), THREAT)]


LIES: dict[str, tuple[str, Case]] = {
    "rounding purifier": ("gradient_present/full", purifying(_rounded)),
    "purifier under no_grad": (
        "gradient_present/full",
        purifying(torch.no_grad()(lambda x, draws: 0.9 * x)),
    ),
    "half of the purifier detached": ("gradient_correct", purifying(_half_detached)),
    "logits scaled by 1000": ("loss_alive/full", _with_logits(lambda logits: 1000 * logits)),
    "frozen noise declared random": (
        "randomness_declared",
        purifying(_with_fixed_noise, random=True),
    ),
    "fresh noise declared deterministic": (
        "randomness_declared",
        purifying(lambda x, draws: (x + 0.1 * torch.randn_like(x)).clamp(0, 1)),
    ),
    "noise keyed on content": ("gradient_correct", purifying(_with_noise_of_content)),
    "NaN logits": ("logits", _with_logits(lambda logits: logits * torch.nan)),
    "softmax for logits": ("logits", _with_logits(lambda logits: logits.softmax(1))),
    "normalised input": (
        "input_convention",
        lambda toy: [convention((toy.test.pixels() - 0.3) / 0.3)],
    ),
    "input in 0..255": ("input_convention", lambda toy: [convention(255 * toy.test.pixels())]),
    "purifier that knows its batch": ("batch_independence", purifying(_less_batch_mean)),
    "batch norm left in train mode": ("state_unchanged", _batch_norm_training),
    "radius doubled": ("threat_model/full/pgd", _doubled),
    "storage that truncates": ("threat_model/full/pgd", _truncated),
    "attack set of another classifier": ("provenance/full/pgd", _other_classifier),
    "ten-step AutoAttack": ("effort/full/autoattack", _ten_steps),
    "nothing but FGSM": ("strong_attack", lambda toy: [strong_enough({"full": [WEAK]}, (), True)]),
    "one of three stand-ins alone": (
        "strong_attack",
        lambda toy: [strong_enough({"plain": [STRONG]}, ("direct", "plain", "detached"), True)],
    ),
    "scoring by a single draw": ("scoring_draws", lambda toy: [draws_enough(True, 32, 1)]),
    "test images in training": ("leakage", _test_in_training),
    "attack that finds nothing": ("undefended_falls", _finds_nothing),
}
