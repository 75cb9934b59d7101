"""Checks of the models: what goes in, what comes out, and that nothing changes meanwhile."""

from collections.abc import Sequence

import torch
from torch import Tensor

from components.data.draws import Draws
from components.models.defense import Defense
from components.probes.contract import Finding

# Logits further apart than this fraction of their norm are different; AutoAttack's rule.
TOLERANCE = 1e-4
REPEATS = 5
BATCH_SIZES = (1, 7)


def convention(pixels: Tensor) -> Finding:
    """Check 4: pixels (N,C,H,W) are in [0,1], neither normalised nor in 0..255."""
    low, high = pixels.amin().item(), pixels.amax().item()
    mean, std = pixels.mean().item(), pixels.std().item()
    passed = low >= 0 and high <= 1 and 0.02 <= mean <= 0.98 and std > 0.02
    detail = f"pixels from {low:.3f} to {high:.3f}, mean {mean:.3f}, deviation {std:.3f}"
    return Finding(name="input_convention", level="block", passed=passed, detail=detail)


def logits_sound(logits: Tensor) -> Finding:
    """Check 5: logits (N,K) are finite, not softmaxed, and not the same for every image."""
    finite = bool(logits.isfinite().all())
    sums = logits.sum(1)
    softmax = finite and bool(
        ((logits >= 0) & (logits <= 1)).all() and (sums - 1).abs().max() < 1e-4
    )
    constant = finite and len(logits) > 1 and bool(logits.std(0).max() < 1e-6)
    faults = [("not finite", not finite), ("already softmaxed", softmax), ("constant", constant)]
    found = [name for name, present in faults if present]
    detail = f"logits of {len(logits)} images are " + (", ".join(found) or "finite and varied")
    return Finding(name="logits", level="block", passed=not found, detail=detail)


def check_logits(defense: Defense, x: Tensor, draws: Draws) -> list[Finding]:
    """Checks 5 and 11 and batch independence, on pixels (N,C,H,W)."""
    with torch.no_grad():
        logits = [defense(x, draws.redraw(draw)) for draw in range(REPEATS)]
    spread = max(_relative_distance(one, logits[0]) for one in logits)
    random = spread > TOLERANCE
    declared = "stochastic" if defense.stochastic else "deterministic"
    detail = f"declared {declared}; {REPEATS} answers differ by {spread:.1e} of their length"
    return [
        logits_sound(logits[0]),
        Finding(
            name="randomness_declared",
            level="block",
            passed=random == defense.stochastic,
            detail=detail,
        ),
        _batch_independence(defense, x, draws, logits[0]),
    ]


def _batch_independence(defense: Defense, x: Tensor, draws: Draws, whole: Tensor) -> Finding:
    """Compare logits of small batches with `whole` (N,K), those of one batch, under equal noise."""
    largest = 0.0
    with torch.no_grad():
        for size in BATCH_SIZES:
            for start in range(0, min(len(x), 3 * size), size):
                rows = torch.arange(start, min(start + size, len(x)), device=x.device)
                distance = _relative_distance(defense(x[rows], draws[rows]), whole[rows])
                largest = max(largest, distance)
    return Finding(
        name="batch_independence",
        level="block",
        passed=largest <= 10 * TOLERANCE,
        detail=f"answers in batches of 1, 7 and {len(x)} differ by {largest:.1e} of their length",
    )


def _relative_distance(one: Tensor, other: Tensor) -> float:
    """Return the largest distance between rows of logits (N,K), as a fraction of their norm."""
    norms = other.norm(dim=1).clamp_min(1e-12)
    return float(((one - other).norm(dim=1) / norms).max()) if len(one) else 0.0


def recorded_accuracy(now: int, then: int, n: int) -> Finding:
    """Check 6: the bare classifier is right on as many of n images as when it was trained."""
    allowed = 0.001 * n
    return Finding(
        name="recorded_accuracy",
        level="block",
        passed=abs(now - then) <= allowed,
        detail=f"{now} of {n} validation images right now, {then} when it was trained",
    )


def unchanged(before: str, after: str, training: bool) -> Finding:
    """Check 8: scoring changed no parameter and no buffer, and all modules were in eval mode."""
    passed = before == after and not training
    detail = "weights and buffers unchanged, eval mode"
    if not passed:
        detail = "a module was in training mode" if training else "weights or buffers changed"
    return Finding(name="state_unchanged", level="block", passed=passed, detail=detail)


def leakage(test: Tensor, others: Sequence[tuple[str, Tensor]]) -> Finding:
    """Check 29: no test image (N,C,H,W) uint8 is, byte for byte, in `others`, the training splits.

    It fails for a single image, though one in a hundred changes no accuracy by more than a point.
    """
    known = {image.numpy().tobytes() for image in test}
    counts = {name: sum(i.numpy().tobytes() in known for i in images) for name, images in others}
    found = ", ".join(f"{count} in {name}" for name, count in counts.items() if count)
    return Finding(
        name="leakage",
        level="block",
        passed=not found,
        detail=f"of {len(test)} test images, equal ones elsewhere: {found or 'none'}",
    )
