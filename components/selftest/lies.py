"""Lies: faults that the harness must catch, each by the check that is named for it.

A lie is added as one entry of `LIES`: its name, the check that must raise it, and a function of the
toy that plants it and returns the findings.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from components.attacks import Crafted, Linf
from components.attacks.apgd import ApgdCe, ApgdT
from components.attacks.autoattack import AutoAttack
from components.attacks.gradient import Fgsm, Noise
from components.checks.scores import draws_enough, strong_enough, undefended_falls
from components.checks.sets import agreement, effort, stored_probes
from components.data.draws import NoiseStream
from components.models.defense import Defense
from components.models.identity import state_digest
from components.models.purifiers.controls import GaussianNoise
from components.probes import Finding, required
from components.probes.models import convention, leakage, unchanged
from components.selftest.changing import (
    PGD,
    first_questions,
    long_logits,
    safe_between_levels,
    wrong_while_crafted,
)
from components.selftest.hidden import (
    behind_stand_in,
    decoys_next_to_the_first,
    hidden_label,
    of_codebook,
    votes,
)
from components.selftest.toy import (
    THREAT,
    Case,
    FunctionPurifier,
    Toy,
    probed,
    probed_by,
    purifying,
    stored,
)

WEAK = Fgsm(kind="fgsm", random_start=False, step=1, eot=1)
NARROW = Linf(norm="linf", eps_255=4)
STRONG = ApgdCe(kind="apgd_ce", steps=100, restarts=1, eot=1)
BOTH = [STRONG, ApgdT(kind="apgd_t", steps=100, targets=9, eot=1)]


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


class _Backward(torch.autograd.Function):
    """The identity, with another derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, derivative: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.derivative = derivative
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.derivative(gradients[0]), None


def _with_derivative(derivative: Callable[[Tensor], Tensor]) -> Case:
    """Return the case of an identity whose gradient is `derivative` of the right one."""

    def purify(x: Tensor, stream: NoiseStream | None) -> Tensor:
        moved: Tensor = _Backward.apply(x, derivative)  # type: ignore[no-untyped-call]
        return moved

    return purifying(purify)


def _rolled(gradient: Tensor) -> Tensor:
    return gradient.roll(3, dims=3)


def _rolled_in_float32(gradient: Tensor) -> Tensor:
    return gradient if gradient.dtype == torch.float64 else _rolled(gradient)


def _off_the_grid(x: Tensor, stream: NoiseStream | None) -> Tensor:
    """Give the right gradient at levels k/255 alone, where an image starts."""
    levels = 255 * x.detach()
    on_grid = bool(((levels - levels.round()).abs() < 1e-3).all())
    moved: Tensor = _Backward.apply(x, (lambda g: g) if on_grid else _rolled)  # type: ignore[no-untyped-call]
    return moved


def _painted(toy: Toy, near: Tensor, x: Tensor) -> Tensor:
    """Return the nearest image of `near` (M,C,H,W) where it is within 1.5 radii, else `x`."""
    far = (x[:, None] - near[None].to(x.dtype)).abs().flatten(2).amax(2)
    nearest = far.min(1)
    known = nearest.values <= 1.5 * THREAT.eps
    return torch.where(known[:, None, None, None], near[nearest.indices].to(x.dtype) + 0 * x, x)


def _remembers(toy: Toy) -> list[Finding]:
    """Return the test image near by; its gradient is that of the identity."""
    images = toy.test.pixels()

    def purify(x: Tensor, stream: NoiseStream | None) -> Tensor:
        return x + (_painted(toy, images, x) - x).detach()

    return purifying(purify)(toy)


def _two_faced(attacked: Callable[[Tensor], bool]) -> Case:
    """Return the case of a purifier that is the identity for those that it takes for attackers."""

    def purify(x: Tensor, stream: NoiseStream | None) -> Tensor:
        return x if attacked(x) else torch.nn.functional.avg_pool2d(x, 3, 1, 1)

    return purifying(purify)


def _declared_without(toy: Toy) -> list[Finding]:
    """Declare an honest purifier not differentiable, so that no attack need go through it."""
    purifier = FunctionPurifier(lambda x, stream: 0.9 * x, False)
    purifier.differentiable = False
    return probed(purifier)(toy)


class _ForTwo(torch.autograd.Function):
    """Passes gradients of at most two logits on: those of a margin, and of no cross-entropy."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        few = (gradients[0] != 0).sum(1, keepdim=True) <= 2
        return gradients[0] * few


def _for_two_logits(logits: Tensor) -> Tensor:
    passed: Tensor = _ForTwo.apply(logits)  # type: ignore[no-untyped-call]
    return passed


class _Shattered(nn.Module):
    """A classifier made of another, of pixels x and of x W: its gradient is right, and useless."""

    ways: Tensor

    def __init__(
        self, classifier: nn.Module, function: Callable[[nn.Module, Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.classifier, self.function = classifier, function
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("ways", torch.randn(64, 10, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.classifier, x, self.ways)


def _rippled(classifier: nn.Module, x: Tensor, ways: Tensor) -> Tensor:
    """Add a ripple to the logits, so fast that the gradient is all but its own."""
    rippled: Tensor = classifier(x) + 3 * (300 * x.flatten(1) @ ways).sin()
    return rippled


def _terraced(classifier: nn.Module, x: Tensor, ways: Tensor) -> Tensor:
    """Round pixels to the centres of cells; inside a cell, logits rise along ways of their own."""
    centre = ((40 * x.detach()).floor() + 0.5) / 40
    terraced: Tensor = classifier(centre) + (x - centre).flatten(1) @ ways
    return terraced


def _rippled_behind_noise(toy: Toy) -> list[Finding]:
    noise = GaussianNoise(kind="gaussian_noise", sigma=0.1).build(toy.test.shape)
    return probed(noise, _Shattered(toy.classifier, _rippled))(toy)


# Models and data


def _batch_norm_training(toy: Toy) -> list[Finding]:
    classifier = deepcopy(toy.classifier)
    defense = Defense(classifier, None).freeze()
    before = state_digest(defense)
    classifier.train()
    findings = probed_by(defense, toy)
    return [*findings, unchanged(before, state_digest(defense), classifier.training)]


def _test_in_training(toy: Toy) -> list[Finding]:
    train = torch.cat([toy.train.images, toy.test.images[:3]])
    return [leakage(toy.test.images, [("train", train)])]


# Stored sets and attacks


def _pgd(toy: Toy, threat: Linf) -> Crafted:
    return toy.craft(PGD, threat)


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
    """Store the set of ten steps of APGD under the name of AutoAttack."""
    crafted = toy.craft(ApgdCe(kind="apgd_ce", steps=10, restarts=1, eot=1), NARROW)
    whole = AutoAttack(kind="autoattack", version="standard")
    return [effort("full/autoattack", whole, crafted, 10, stochastic=False)]


def _three_targets(toy: Toy) -> list[Finding]:
    """Store the set of three targets under the name of nine."""
    some = ApgdT(kind="apgd_t", steps=10, targets=3, eot=1)
    every = some.model_copy(update={"targets": 9})
    return [effort("full/apgd_t", every, toy.craft(some, NARROW), 10, stochastic=False)]


def _finds_nothing(toy: Toy) -> list[Finding]:
    noise = toy.craft(Noise(kind="noise", tries=2))
    return [undefended_falls(1 - float(noise.success.float().mean()), THREAT)]


LIES: dict[str, tuple[str, Case]] = {
    "rounding purifier": ("gradient_present/full", purifying(_rounded)),
    "purifier under no_grad": (
        "gradient_present/full",
        purifying(torch.no_grad()(lambda x, draws: 0.9 * x)),
    ),
    "half of the purifier detached": ("gradient_honest/full", purifying(_half_detached)),
    "gradient for two logits at most": ("loss_alive/full", _with_logits(_for_two_logits)),
    "frozen noise declared random": (
        "randomness_declared",
        purifying(_with_fixed_noise, random=True),
    ),
    "fresh noise declared deterministic": (
        "randomness_declared",
        purifying(lambda x, draws: (x + 0.1 * torch.randn_like(x)).clamp(0, 1)),
    ),
    "noise keyed on content": ("gradient_honest/full", purifying(_with_noise_of_content)),
    "derivative of another function": ("gradient_honest/full", _with_derivative(_rolled)),
    "derivative reversed": ("gradient_honest/full", _with_derivative(lambda g: -g)),
    "right in float64 only": ("gradient_honest/full", _with_derivative(_rolled_in_float32)),
    "right on the grid of levels only": ("gradient_honest/full", purifying(_off_the_grid)),
    "ripple behind noise": ("gradient_pays/full", _rippled_behind_noise),
    "terraces with slopes of their own": (
        "gradient_pays/full",
        lambda toy: probed(None, _Shattered(toy.classifier, _terraced))(toy),
    ),
    "label of a hidden network": ("gradient_adds_up/full", hidden_label),
    "votes about noisy copies": ("gradient_adds_up/full", votes),
    "hidden network behind a stand-in": ("gradient_adds_up/short", behind_stand_in),
    "nearest image of a codebook": ("gradient_pays/bpda", of_codebook),
    "derivative reversed while sets are crafted": ("stored_attacks", wrong_while_crafted),
    "found by Square, not by gradients": ("blind_attack", _with_derivative(_rolled)),
    "declared not differentiable": ("gradient_declared", _declared_without),
    "test images remembered": ("remembered", _remembers),
    "identity where gradients are on": (
        "one_answer",
        _two_faced(lambda x: torch.is_grad_enabled()),
    ),
    "identity in large batches": ("one_answer", _two_faced(lambda x: len(x) > 20)),
    "asks where it runs": ("looks_around", _two_faced(lambda x: torch.is_grad_enabled())),
    "NaN logits": ("logits", _with_logits(lambda logits: logits * torch.nan)),
    "softmax for logits": ("logits", _with_logits(lambda logits: logits.softmax(1))),
    "normalised input": (
        "input_convention",
        lambda toy: [convention((toy.test.pixels() - 0.3) / 0.3)],
    ),
    "input in 0..255": ("input_convention", lambda toy: [convention(255 * toy.test.pixels())]),
    "purifier that knows its batch": ("one_answer", purifying(_less_batch_mean)),
    "batch norm left in train mode": ("state_unchanged", _batch_norm_training),
    "radius doubled": ("threat_model/full/pgd", _doubled),
    "storage that truncates": ("threat_model/full/pgd", _truncated),
    "first questions remembered": ("same_answer/full/pgd", first_questions),
    "decoys next to the first class": ("transfer_attack/none", decoys_next_to_the_first),
    "another network behind long logits": ("same_answer/full/pgd", long_logits),
    "another function at levels k/255": ("quantisation", safe_between_levels),
    "attack set of another classifier": ("provenance/full/pgd", _other_classifier),
    "ten-step AutoAttack": ("effort/full/autoattack", _ten_steps),
    "three targets for nine": ("effort/full/apgd_t", _three_targets),
    "nothing but FGSM": (
        "strong_attack",
        lambda toy: [strong_enough({"full": [WEAK]}, (), True, 10)],
    ),
    "cross-entropy alone": (
        "strong_attack",
        lambda toy: [strong_enough({"full": [STRONG]}, (), True, 10)],
    ),
    "probes left out": (
        "probes_complete",
        lambda toy: stored_probes(required(["full"], False, True, False), [], {}),
    ),
    "probes of another defense": (
        "provenance/probes",
        lambda toy: stored_probes([], [], {"defense": ("a", state_digest(toy.other))}),
    ),
    "one of three stand-ins alone": (
        "strong_attack",
        lambda toy: [strong_enough({"plain": BOTH}, ("direct", "plain", "detached"), True, 10)],
    ),
    "scoring by a single draw": ("scoring_draws", lambda toy: [draws_enough(True, 32, 1)]),
    "test images in training": ("leakage", _test_in_training),
    "attack that finds nothing": ("undefended_falls", _finds_nothing),
}
