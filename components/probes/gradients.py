"""Checks of gradients: whether they exist, are right, and agree with each other.

Three figures of them are the certificate beside every result: the fraction of images without a
usable gradient, the cosine between the gradient and central differences (float64, noise frozen),
and the cosine of two independent EOT estimates.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from components.attacks.contract import normalised
from components.attacks.gradient import log_odds
from components.data.draws import Draws
from components.models.defense import Defense, Loss, Mode, bind, margin
from components.probes.bench import WAY, Bench
from components.probes.contract import Finding
from components.probes.slopes import agree, slopes

# Images that the agreement of gradients over the noise is measured on.
MEASURED = 8
# Directions along which a gradient is compared with differences.
DIRECTIONS = 4
# The fraction of judged images whose gradient may be wrong: a kink may be missed.
TOLERATED = 0.03
EOT_SIZES = (1, 5, 10, 20)
# On how many images a step along the gradient is compared with a random one, however dear an answer
# is; how many radii both are long, and under how many draws of noise.
STEPPED, STRIDE, SHARED = 32, 0.5, 16
# Right images that a point must have to be judged, and the share on which the gradient must win.
LEAST, WINS = 20, 0.75


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

    Large logits are no fault: they saturate the cross-entropy, and not the log odds.
    """
    missing = _unusable(_input_gradient(defense, mode, x, labels, draws, log_odds))
    margin_missing = _unusable(_input_gradient(defense, mode, x, labels, draws, margin))
    return Finding(
        name=f"loss_alive/{mode}",
        level="warn",
        passed=missing <= margin_missing + 0.01,
        detail=f"{missing:.1%} of {len(x)} images have no gradient of the log odds, "
        f"{margin_missing:.1%} none of the margin",
    )


def gradient_honest(bench: Bench, points: Mapping[str, Tensor]) -> Finding:
    """Check 10: the gradient that attacks take is that of the defense that is scored.

    At every point of `points`, which hold the first images of the bench or all (n,C,H,W), for each
    image by itself: the slope that the float32 gradient of the folded copy claims along random
    directions, and along itself, against central differences of the defense in float64 with the
    noise frozen (`slopes`, `agree`). Attacks that follow a wrong gradient say nothing, so a failure
    makes the rung void. Where kinks or rounding leave fewer than half of the images to judge, at
    every point of an attack, it is undecided.
    """
    judged, wrong, said = 0, 0, []
    passed, decided = True, False
    for name, x in points.items():
        # A backward pass may be right for one loss and wrong for another.
        fine, right = _compared(bench.first(len(x)), x, log_odds if name == "ball" else margin)
        count, bad = int(fine.sum()), int((fine & ~right).sum())
        judged, wrong = judged + count, wrong + bad
        # A random point is smoother than those that an attack passes.
        decided |= name not in ("clean", "ball") and count >= len(x) / 2
        passed &= bad <= max(1, TOLERATED * count)
        said.append(f"{name} {bad} of {count}")
    return Finding(
        name="gradient_honest/full",
        level="warn",
        passed=passed and decided,
        detail=f"wrong gradients among the judged of {len(bench.x)} images: {', '.join(said)}"
        + ("" if decided else "; undecided, since kinks or rounding hide most slopes"),
        figures={"judged": judged, "wrong": wrong, "undecided": float(not decided)},
    )


def gradient_pays(bench: Bench, points: Mapping[str, Tensor], mode: Mode = "full") -> Finding:
    """Check 39: a step along the gradient of a mode lowers the margin further than a random step.

    A gradient may be right and useless: on terraces and under a fast ripple, the slope at a point
    says nothing about the next one (shattered gradients, Athalye et al. 2018). Clean, at a random
    point of the ball and half of the way of `points` (N,C,H,W each), of the images that are right
    there, the step along the gradient of the log odds must win on 75 %. Both steps are half a
    radius long and projected, and compared under the same noise, which is not that of the gradient.
    A point with fewer than 20 right images is not judged. `points` are of the first images of the
    bench; clean and in the ball, as many are tried, or 32, out of all those that are right.
    """
    answered = bind(bench.folded, "full", bench.draws, 1).margins(bench.x, bench.labels, 0)
    count = max(len(points["clean"]), STEPPED)
    more = bench.pick((answered > 0).nonzero()[:count, 0])
    half = "half of the way"
    tried = {"clean": (more, more.x), "ball": (more, more.ball)}
    tried[half] = (bench.first(len(points[half])), points[half])
    shares, said = [], []
    for name, (some, x) in tried.items():
        judged = better = 0
        # Not every network takes a batch of no images.
        if len(x):
            right, won = _won(some, x, mode, f"step: {name}")
            judged, better = int(right.sum()), int((right & won).sum())
        said.append(f"{name} {better} of {judged}")
        shares += [better / judged] if judged >= LEAST else []
    return Finding(
        name=f"gradient_pays/{mode}",
        level="warn",
        passed=all(share >= WINS for share in shares),
        detail=f"right images on which a step along the gradient beats a random one: "
        f"{', '.join(said)}"
        + ("" if shares else f"; fewer than {LEAST} are right, too few to be judged"),
        figures={"share": min(shares, default=1.0), "judged": len(shares)},
    )


def gradient_declared(bench: Bench) -> Finding:
    """Check 32: a gradient that is declared absent is absent.

    It blocks where the plain backward pass of a purifier that is declared not differentiable gives
    a gradient, and a right one: attacks were spared it.
    """
    fine, right = _compared(bench, bench.x, margin)
    target = bind(bench.folded, "full", bench.draws, 1)
    gradient = target.evaluate(bench.x, bench.labels, margin, 0).gradient
    present = gradient.flatten(1).ne(0).any(1)
    usable = int((fine & right & present).sum())
    return Finding(
        name="gradient_declared",
        level="block",
        passed=usable <= max(1, TOLERATED * len(bench.x)),
        detail=f"declared not differentiable; {usable} of {len(bench.x)} images have a gradient, "
        "and it is right",
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


def _won(bench: Bench, x: Tensor, mode: Mode, use: str) -> tuple[Tensor, Tensor]:
    """Return which images are right at `x`, and which fall further along its gradient (N,).

    The rival is a step in a random direction, named `use`.
    """
    target, judge = (bind(bench.folded, mode, bench.draws, eot) for eot in (WAY.eot, SHARED))
    found = target.evaluate(x, bench.labels, log_odds, 0)
    random = bench.draws.normal(tuple(x.shape[1:]), use).to(x.dtype)
    margins = []
    for way in (found.gradient.nan_to_num(0, 0, 0), random):
        moved = bench.threat.ascend(x, way, STRIDE * bench.threat.eps)
        # Query 0 would ask the judge under the noise that made the gradient.
        margins.append(judge.margins(bench.threat.project(moved, bench.x), bench.labels, 1))
    return found.margin > 0, margins[0] < margins[1]


def _compared(bench: Bench, x: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """Compare the gradient of a loss that attacks take at `x` with differences: see `agree`."""
    draws, labels = bench.draws.redraw(0), bench.labels
    exact = bench.precise
    target = bind(bench.folded, "full", bench.draws, 1)
    gradient = target.evaluate(x, labels, loss, 0).gradient
    point = x.to(next(exact.parameters()).dtype)
    shape = tuple(x.shape[1:])
    ways = [draws.redraw(k).normal(shape, "direction") for k in range(DIRECTIONS - 1)]
    # The claimed direction itself: there the slope is as large as the gradient is long.
    ways.append(gradient.nan_to_num(0, 0, 0))
    claimed, measured, sound = [], [], []
    for way in ways:
        unit = normalised(way).to(point.dtype)
        slope, fine = slopes(lambda p: loss(exact(p, draws), labels), point, unit)
        claimed.append((gradient.to(point.dtype) * unit).sum((1, 2, 3)))
        measured.append(slope)
        sound.append(fine & unit.flatten(1).ne(0).any(1))
    return agree(torch.stack(claimed), torch.stack(measured), torch.stack(sound))
