"""Checks of stored adversarial sets: their bytes, their provenance, and the effort behind them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from components.attacks import L2, Attack, Crafted, Linf, violations
from components.data.image_set import ImageSet
from components.probes.contract import Finding


def stored_set(
    name: str, images: Tensor, ids: Tensor, labels: Tensor, data: ImageSet, threat: Linf | L2 | None
) -> list[Finding]:
    """Checks 1, 2 and 7 on stored images (N,C,H,W): the ball, the range, every image once.

    For attacks without a ball `threat` is None, and only the range is checked.
    """
    complete = torch.equal(ids, data.ids) and torch.equal(labels, data.labels)
    findings = [
        Finding(
            name=f"accounting/{name}",
            level="block",
            passed=complete,
            detail=f"{len(ids)} stored images against {len(data)} test images"
            + ("" if complete else ": not the same images in the same order"),
        )
    ]
    if complete:
        whole = Linf(norm="linf", eps_255=255.0)
        ball = "inside the ball, " if threat else "without a ball: "
        broken = violations(images, data.pixels(), threat or whole)
        findings.append(
            Finding(
                name=f"threat_model/{name}",
                level="block",
                passed=not broken,
                detail="; ".join(broken) or f"{ball}in [0,1], finite, float32",
            )
        )
    return findings


def agreement(name: str, digests: Mapping[str, tuple[str, str]]) -> Finding:
    """Check 30: the set was crafted against exactly the models on which it is scored.

    `digests` maps what it was crafted with to (digest at crafting, digest now).
    """
    changed = [what for what, (then, now) in digests.items() if then != now]
    detail = "crafted against the models that are scored"
    if changed:
        detail = f"crafted against another {' and '.join(changed)}: a transfer, not robust accuracy"
    return Finding(name=f"provenance/{name}", level="block", passed=not changed, detail=detail)


def effort(name: str, attack: Attack, crafted: Crafted) -> Finding:
    """Check 26: every image that withstood cost the backward passes that the attack promises.

    A few images may have cost fewer. They lie so close to the boundary that the copy with folded
    normalisation, which attacks run on, was fooled, and the defense itself is not.
    """
    withstood = ~crafted.success
    spent, promised = crafted.backward[withstood], attack.effort()
    short = int((spent < promised).sum())
    allowed = max(0.01 * len(crafted.ids), 2)
    least = int(spent.min()) if len(spent) else promised
    return Finding(
        name=f"effort/{name}",
        level="block",
        passed=short <= allowed,
        detail=f"{int(withstood.sum())} images withstood at least {least} backward passes; "
        f"{attack.kind} promises {promised}",
    )


def rounding(exact: int, rounded: int, n: int) -> Finding:
    """Check 3: the worst examples fool about as many of n images after rounding to 8 bits.

    `exact` and `rounded` are how many images are right before and after.
    """
    return Finding(
        name="quantisation",
        level="warn",
        passed=abs(exact - rounded) <= max(0.01 * n, 2),
        detail=f"of {n} images {exact} are right on the stored examples, {rounded} once these are "
        "rounded to 8 bits",
    )
