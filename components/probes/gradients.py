"""Checks of gradients: whether they exist, are right, and agree with each other.

Three figures of them are the certificate beside every result: the fraction of images without a
usable gradient, the cosine between the gradient and central differences (float64, noise frozen),
and the cosine of two independent EOT estimates.
"""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor
from torch.nn import functional as F

from components.attacks.gradient import log_odds
from components.data.draws import Draws
from components.models.defense import Defense, Mode, bind, margin
from components.probes.contract import Finding

# Images and random directions that gradients are measured on.
MEASURED, DIRECTIONS = 8, 4
# Step lengths of the differences. Where the two differ by more than KINK, a ReLU bends between.
STEPS = (1e-5, 2e-6)
KINK = 0.01
# The least cosine between gradient and differences that passes.
FAITHFUL = 0.95
EOT_SIZES = (1, 5, 10, 20)
LARGE_LOGIT = 1e3

Scalar = Callable[[Tensor], Tensor]  # images (N,C,H,W) -> one number each (N,)


def gradient_present(
    defense: Defense, mode: Mode, x: Tensor, labels: Tensor, draws: Draws
) -> Finding:
    """Check 9: the margin has a usable gradient with respect to the input.

    It only warns where the purifier is declared not differentiable: then this rung is void, and the
    score rests on other rungs.
    """
    void = mode in ("full", "fixed_noise") and not defense.differentiable
    unusable = _unusable(_input_gradient(defense, mode, x, labels, draws, margin))
    detail = f"{unusable:.1%} of {len(x)} images have a zero or non-finite gradient in mode {mode}"
    if unusable > 0.01:
        detail += "; attacks in this mode have nothing to follow"
    return Finding(
        name=f"gradient_present/{mode}",
        level="warn" if void else "block",
        passed=unusable <= 0.01,
        detail=detail,
        figures={"unusable": unusable},
    )


def loss_alive(defense: Defense, mode: Mode, x: Tensor, labels: Tensor, draws: Draws) -> Finding:
    """Check 20: the `log_odds`, which attacks climb, have a gradient where the margin has one.

    Very large logits saturate the cross-entropy: attacks on that loss, which other authors write,
    then stand still. Those on the log odds do not.
    """
    with torch.no_grad():
        scale = float(defense(x, draws).abs().amax())
    missing = _unusable(_input_gradient(defense, mode, x, labels, draws, log_odds))
    margin_missing = _unusable(_input_gradient(defense, mode, x, labels, draws, margin))
    return Finding(
        name=f"loss_alive/{mode}",
        level="warn",
        passed=scale <= LARGE_LOGIT and missing <= margin_missing + 0.01,
        detail=f"largest logit {scale:.3g}; {missing:.1%} of {len(x)} images have no gradient of "
        f"the log odds, {margin_missing:.1%} none of the margin",
    )


def gradient_correct(defense: Defense, x: Tensor, labels: Tensor, draws: Draws) -> Finding:
    """Check 10: along random directions the gradient equals central differences.

    In float64, with the noise frozen, for the whole defense and for each half alone: a path that is
    cut out of the purifier shows in the cosine of the purifier. Directions along which two step
    lengths disagree cross a kink and are left out; if most do, the cosine is 0.
    """
    exact = deepcopy(defense).double()
    x, labels, draws = x[:MEASURED].double(), labels[:MEASURED], draws[_first(x)]
    probe = draws.normal(tuple(x.shape[1:]), "probe").double()
    with torch.no_grad():
        purified = exact.purify(x, draws)
    halves: dict[str, tuple[Scalar, Tensor]] = {
        "defense": (lambda images: margin(exact(images, draws), labels), x),
        "classifier": (lambda images: margin(exact.classifier(images), labels), purified),
    }
    if exact.purifier is not None:
        halves["purifier"] = (
            lambda images: (exact.purify(images, draws) * probe).sum((1, 2, 3)),
            x,
        )
    figures = {name: _cosine(scalar, point, draws) for name, (scalar, point) in halves.items()}
    worst = min(figures, key=figures.__getitem__)
    return Finding(
        name="gradient_correct",
        level="warn",
        passed=figures[worst] >= FAITHFUL,
        detail="cosine between gradient and differences: "
        + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()),
        figures=figures,
    )


def eot_agreement(defense: Defense, x: Tensor, labels: Tensor, draws: Draws, eot: int) -> Finding:
    """Check 21: two independent estimates of the gradient, of `eot` draws each, agree."""
    rows, most = _first(x), max(*EOT_SIZES, eot)
    target = bind(defense, "full", draws[rows], 1)
    # An estimate is a mean over draws, so the larger ones reuse the draws of the smaller ones.
    singles = [
        target.evaluate(x[rows], labels[rows], margin, draw).gradient for draw in range(2 * most)
    ]
    figures = {}
    for size in sorted({*EOT_SIZES, eot}):
        pair = [torch.stack(singles[start : start + size]).mean(0) for start in (0, most)]
        cosines = F.cosine_similarity(pair[0].flatten(1), pair[1].flatten(1))
        figures[f"cosine_{size}"] = float(cosines.nan_to_num(0).median())
    found = figures[f"cosine_{eot}"]
    return Finding(
        name="eot_agreement",
        level="warn",
        passed=found >= 0.5,
        detail=f"median cosine of two gradients of {eot} draws each is {found:.2f}; "
        + ", ".join(f"{k.removeprefix('cosine_')}: {v:.2f}" for k, v in figures.items()),
        figures={"cosine": found, **figures},
    )


def _first(x: Tensor) -> Tensor:
    return torch.arange(min(len(x), MEASURED), device=x.device)


def _input_gradient(
    defense: Defense, mode: Mode, x: Tensor, labels: Tensor, draws: Draws,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:  # fmt: skip
    return bind(defense, mode, draws, 1).evaluate(x, labels, loss, 0).gradient


def _unusable(gradient: Tensor) -> float:
    flat = gradient.flatten(1)
    return float((~flat.isfinite().all(1) | (flat == 0).all(1)).float().mean())


def _cosine(scalar: Scalar, x: Tensor, draws: Draws) -> float:
    """Return the median over images of the cosine over directions; 0 if most cross a kink."""
    point = x.detach().requires_grad_()
    with torch.enable_grad():
        value = scalar(point)
    slope = torch.zeros_like(x)
    if value.requires_grad:
        (found,) = torch.autograd.grad(value.sum(), point, allow_unused=True)
        slope = slope if found is None else found.nan_to_num(0, 0, 0)
    claimed, measured, smooth = [], [], []
    for index in range(DIRECTIONS):
        direction = draws.redraw(index).normal(tuple(x.shape[1:]), "direction").double()
        direction = direction / direction.flatten(1).norm(dim=1)[:, None, None, None]
        coarse, fine = (_difference(scalar, x, direction, step) for step in STEPS)
        claimed.append((slope * direction).sum((1, 2, 3)))
        measured.append(fine)
        size = torch.maximum(coarse.abs(), fine.abs()).clamp_min(1e-9)
        smooth.append(((coarse - fine).abs() <= KINK * size) & fine.isfinite())
    usable = torch.stack(smooth)
    if usable.double().mean() < 0.5:
        return 0.0
    one, two = (torch.stack(v).nan_to_num() * usable for v in (claimed, measured))
    lengths = one.norm(dim=0) * two.norm(dim=0)
    cosines = torch.where(lengths > 0, (one * two).sum(0) / lengths.clamp_min(1e-30), 0.0)
    return float(cosines.median())


def _difference(scalar: Scalar, x: Tensor, direction: Tensor, step: float) -> Tensor:
    with torch.no_grad():
        found: Tensor = (scalar(x + step * direction) - scalar(x - step * direction)) / (2 * step)
    return found
