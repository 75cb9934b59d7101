"""Doubts about gradients: whether they are there, are right, and agree with each other.

Together these are the certificate that stands beside every result: the share of images without a
usable gradient, the cosine between the gradient and what differences measure in float64 with the
noise frozen, and the cosine of two independent EOT estimates.
"""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor
from torch.nn import functional as F

from components.attacks.gradient import cross_entropy
from components.data.draws import Draws
from components.models.defense import Defense, Mode, bind, margin
from components.probes.contract import Finding

MEASURED = 8
DIRECTIONS = 4
# Two step lengths of the differences; where they disagree by more than KINK, a ReLU bends between.
STEPS = (1e-5, 2e-6)
KINK = 0.01
FAITHFUL = 0.95
EOT_SIZES = (1, 5, 10, 20)
LARGE = 1e3

Scalar = Callable[[Tensor], Tensor]  # images (N,C,H,W) -> one number each (N,)


def gradient_present(
    defense: Defense, mode: Mode, x: Tensor, labels: Tensor, draws: Draws
) -> Finding:
    """Check 9: the margin has a usable gradient with respect to the input.

    Of a purifier that says it has none, this condemns the rung alone: other rungs carry the number.
    """
    void = mode in ("full", "fixed_noise") and not defense.differentiable
    share = _unusable(_input_gradient(defense, mode, x, labels, draws, margin))
    detail = f"{share:.1%} of {len(x)} images have a zero or non-finite gradient in mode {mode}" + (
        "; attacks in this mode have nothing to follow" if share > 0.01 else ""
    )
    return Finding(
        name=f"gradient_present/{mode}",
        level="warn" if void else "block",
        passed=share <= 0.01,
        detail=detail,
        figures={"unusable": share},
    )


def loss_alive(defense: Defense, mode: Mode, x: Tensor, labels: Tensor, draws: Draws) -> Finding:
    """Check 20: the cross-entropy has a gradient where the margin has one.

    Logits on a large scale saturate it: attacks on that loss alone then stand still.
    """
    with torch.no_grad():
        scale = float(defense(x, draws).abs().amax())
    dead = _unusable(_input_gradient(defense, mode, x, labels, draws, cross_entropy))
    alive = _unusable(_input_gradient(defense, mode, x, labels, draws, margin))
    return Finding(
        name=f"loss_alive/{mode}",
        level="warn",
        passed=scale <= LARGE and dead <= alive + 0.01,
        detail=f"largest logit {scale:.3g}; {dead:.1%} of {len(x)} images have no gradient of the "
        f"cross-entropy, {alive:.1%} none of the margin",
    )


def gradient_correct(defense: Defense, x: Tensor, labels: Tensor, draws: Draws) -> Finding:
    """Check 10: along random directions the gradient says what central differences measure.

    In float64, with the noise frozen, on the whole defense and on either half by itself: a
    purifier that is cut out of the graph in part shows in its own half. Directions along which two
    step lengths disagree cross a kink and say nothing; if most do, nothing is differentiable here.
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
    """Check 21: two independent estimates of the gradient, of `eot` draws each, point one way."""
    rows, most = _first(x), max(*EOT_SIZES, eot)
    target = bind(defense, "full", draws[rows], 1)
    # An estimate is the mean over its draws, so the large ones hold the small ones.
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
    """Return the median over images of the cosine over directions; 0 where nothing can be said."""
    point = x.detach().requires_grad_()
    with torch.enable_grad():
        value = scalar(point)
    slope = torch.zeros_like(x)
    if value.requires_grad:
        (found,) = torch.autograd.grad(value.sum(), point, allow_unused=True)
        slope = slope if found is None else found.nan_to_num(0, 0, 0)
    claimed, measured, smooth = [], [], []
    for index in range(DIRECTIONS):
        way = draws.redraw(index).normal(tuple(x.shape[1:]), "direction").double()
        way = way / way.flatten(1).norm(dim=1)[:, None, None, None]
        coarse, fine = (_difference(scalar, x, way, step) for step in STEPS)
        claimed.append((slope * way).sum((1, 2, 3)))
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


def _difference(scalar: Scalar, x: Tensor, way: Tensor, step: float) -> Tensor:
    with torch.no_grad():
        found: Tensor = (scalar(x + step * way) - scalar(x - step * way)) / (2 * step)
    return found
