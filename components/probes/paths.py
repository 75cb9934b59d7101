"""A check of the way between two images: its gradients must add up to what changes along it."""

import torch
from torch import Tensor

from components.models.defense import Target, bind, margin
from components.probes.attacks import of_another_class
from components.probes.bench import Bench, rough
from components.probes.contract import Finding

# The gradients that are added up, at the middles of so many equal parts of the way. Images whose
# sum is too far off are asked again with more parts: in a smooth network the sum converges.
PARTS = (16, 64)
# How far the sum may lie from the fall of the margin, as a fraction of it.
APART = 0.25
# The fraction of images that may be further apart, and the most and the least that are judged.
TOLERATED, MOST, LEAST = 0.15, 32, 8


def gradient_adds_up(bench: Bench) -> Finding:
    """Check 41: along the way to an image of another class, gradients add up to the margin's fall.

    By the fundamental theorem of calculus, the change of a smooth function along a way is the
    integral of its slope. What jumps has no slope that shows it: where a label comes from the
    answer of a network behind `detach`, a nearest prototype or a vote, logits are plateaus, and
    whatever gradient there is belongs to something else. It may be exact at every point, and pay,
    and still lead nowhere. Ripples and terraces do not add up either. For each image that is right,
    on the straight way to one that is right as another class, the slopes of the margin at a few
    points stand for the integral. The noise is fixed. A purifier that descends or rounds may jump
    from one solution to another. It has to face its stand-ins, and here the classifier behind it is
    judged, between purified images.
    """
    alone = rough(bench.defense)
    bench = bench.behind if alone else bench
    target = bind(bench.folded, "full", bench.draws, 1)
    others, known = of_another_class(target, bench.x, bench.labels)
    start, end = (target.margins(x, bench.labels, 0) for x in (bench.x, others))
    left = (known & (start > 0) & (end <= 0)).nonzero()[:MOST, 0]
    count = len(left)
    for parts in PARTS if count >= LEAST else ():
        x, way = bench.x[left], (others - bench.x)[left]
        total = _sum(target[left], x, way, bench.labels[left], parts)
        fall = (end - start)[left]
        left = left[(total - fall).abs() > APART * fall.abs()]
        if len(left) <= TOLERATED * count:
            break
    bad = len(left) if count >= LEAST else 0
    return Finding(
        name="gradient_adds_up/full",
        level="warn",
        passed=bad <= TOLERATED * count,
        detail=f"on the way to an image of another class, for {bad} of {count} images gradients do "
        "not add up to the fall of the margin"
        + (" of the classifier alone" if alone else "")
        + ("" if count >= LEAST else "; too few are right to be judged"),
        figures={"apart": bad, "judged": count},
    )


def _sum(target: Target, x: Tensor, way: Tensor, labels: Tensor, parts: int) -> Tensor:
    """Return the slopes of the margin (N,) along `way` from `x` (N,C,H,W), summed over its parts.

    A gradient that is not finite counts as none.
    """
    total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for part in range(parts):
        gradient = target.evaluate(x + (part + 0.5) / parts * way, labels, margin, 0).gradient
        total += (gradient.nan_to_num(0, 0, 0) * way).sum((1, 2, 3)) / parts
    return total
