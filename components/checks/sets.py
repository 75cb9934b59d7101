"""Doubts about stored adversarial sets: the bytes, what they were crafted for, and how hard."""

from collections.abc import Mapping

import torch
from torch import Tensor

from components.attacks import L2, Attack, Crafted, Linf, violations
from components.data.image_set import ImageSet
from components.probes.contract import Finding


def stored_set(
    name: str, images: Tensor, ids: Tensor, labels: Tensor, data: ImageSet, threat: Linf | L2 | None
) -> list[Finding]:
    """Checks 1, 2 and 7 on the bytes that were read back: the ball, the range, every image once.

    `threat` is None for attacks without a ball, whose range is checked all the same.
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
        held = "inside the ball, " if threat else "without a ball: "
        broken = violations(images, data.pixels(), threat or whole)
        findings.append(
            Finding(
                name=f"threat_model/{name}",
                level="block",
                passed=not broken,
                detail="; ".join(broken) or f"{held}in [0,1], finite, float32",
            )
        )
    return findings


def agreement(name: str, what: Mapping[str, tuple[str, str]]) -> Finding:
    """Check 30: the set was crafted against the very models it is scored on.

    `what` maps a name to (fingerprint at crafting, fingerprint now).
    """
    odd = [part for part, (then, now) in what.items() if then != now]
    detail = "crafted against the models that are scored"
    if odd:
        detail = f"crafted against another {' and '.join(odd)}: a transfer, not robust accuracy"
    return Finding(name=f"provenance/{name}", level="block", passed=not odd, detail=detail)


def effort(name: str, attack: Attack, crafted: Crafted) -> Finding:
    """Check 26: an image that withstood was attacked for as long as the attack's name promises.

    Counted in backward passes, as they were stored. A few images may lie so close to the boundary
    that the copy with folded normalisation was fooled and the defense itself is not.
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
    """Check 3: the worst examples, rounded to 8 bits, fool about as many of n images."""
    return Finding(
        name="quantisation",
        level="warn",
        passed=abs(exact - rounded) <= max(0.01 * n, 2),
        detail=f"of {n} images {exact} are right on the stored examples, {rounded} once these are "
        "rounded to 8 bits",
    )
