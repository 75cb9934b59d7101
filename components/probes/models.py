"""Checks of what the models get, and that nothing changes meanwhile."""

from collections.abc import Sequence

from torch import Tensor

from components.probes.contract import Finding, not_asked


def convention(pixels: Tensor) -> Finding:
    """Check 4: pixels (N,C,H,W) are in [0,1], neither normalised nor in 0..255."""
    low, high = pixels.amin().item(), pixels.amax().item()
    mean, std = pixels.mean().item(), pixels.std().item()
    passed = low >= 0 and high <= 1 and 0.02 <= mean <= 0.98 and std > 0.02
    detail = f"pixels from {low:.3f} to {high:.3f}, mean {mean:.3f}, deviation {std:.3f}"
    return Finding(name="input_convention", level="block", passed=passed, detail=detail)


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
    Without `others` it is not asked.
    """
    if not others:
        return not_asked("leakage", "it takes the images that the networks were trained on")
    known = {image.numpy().tobytes() for image in test}
    counts = {name: sum(i.numpy().tobytes() in known for i in images) for name, images in others}
    found = ", ".join(f"{count} in {name}" for name, count in counts.items() if count)
    return Finding(
        name="leakage",
        level="block",
        passed=not found,
        detail=f"of {len(test)} test images, equal ones elsewhere: {found or 'none'}",
    )
