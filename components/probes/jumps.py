"""A check of labels that jump: what changes at one point has no gradient that leads there."""

import torch
from torch import Tensor

from components.models.defense import bind, margin
from components.probes.attacks import of_another_class
from components.probes.bench import Bench, rough
from components.probes.contract import Finding

# The place where a label changes is halved in so often.
BISECTIONS = 14
# The fraction of the way to both sides of it at which margins are compared, and the fraction of the
# whole fall of the margin that must not lie between: smooth networks leave a fiftieth there.
WINDOW, JUMP = 1 / 128, 0.25
# The fraction of images that may jump, and the least number of images that say anything.
JUMPING, LEAST = 0.25, 8


def boundary_jump(bench: Bench) -> Finding:
    """Check 41: on the way to an image of another class, the margin does not fall at one point.

    Where a label comes from something that has no gradient, such as the answer of a network behind
    `detach`, a nearest prototype or a vote, logits are plateaus, and whatever gradient there is
    belongs to something else. The gradient may then be exact, and pay, and still lead nowhere. For
    each image that is right, on the straight way to one that is right as another class, the place
    is found where the label changes. Over a quarter of the whole fall of the margin within 1/128 of
    the way, to both sides of that place, is a jump. The noise is fixed. A purifier that descends
    or rounds may jump from one solution to another. It has to face its stand-ins, and here the
    classifier behind it is judged, between purified images.
    """
    if rough(bench.defense):
        bench = bench.behind
    x, labels = bench.x, bench.labels
    others, known = of_another_class(bind(bench.defense, "full", bench.draws, 1), x, labels)

    def margins(part: Tensor) -> Tensor:
        with torch.no_grad():
            points = x + part[:, None, None, None] * (others - x)
            return margin(bench.defense(points, bench.draws), labels)

    near = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    far = torch.ones_like(near)
    start, end = margins(near), margins(far)
    judged = known & (start > 0) & (end <= 0)
    for _ in range(BISECTIONS):
        middle = (near + far) / 2
        right = margins(middle) > 0
        near, far = torch.where(right, middle, near), torch.where(right, far, middle)
    fall = margins((near - WINDOW).clamp(min=0)) - margins((far + WINDOW).clamp(max=1))
    jumps = int((judged & (fall > JUMP * (start - end))).sum())
    count = int(judged.sum())
    return Finding(
        name="boundary_jump/full",
        level="warn",
        passed=count < LEAST or jumps <= JUMPING * count,
        detail=f"the label of {jumps} of {count} images changes by a jump of the margin"
        + ("" if count >= LEAST else "; too few are right to be judged"),
        figures={"jumps": jumps, "judged": count},
    )
