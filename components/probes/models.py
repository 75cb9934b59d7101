"""Doubts about the models: what goes in, what comes out, and whether they hold still."""

from collections.abc import Sequence

import torch
from torch import Tensor

from components.data.draws import Draws
from components.models.defense import Defense
from components.probes.contract import SIGNIFICANT, Finding
from components.probes.statistics import more_fooled

# Two answers differ if they are further apart than this share of their length; AutoAttack's rule.
SAME = 1e-4
ANSWERS = 5
BATCHES = (1, 7)


def convention(pixels: Tensor) -> Finding:
    """Check 4: what is attacked are pixels in [0,1], not normalised and not 0..255 (N,C,H,W)."""
    low, high = pixels.amin().item(), pixels.amax().item()
    mean, std = pixels.mean().item(), pixels.std().item()
    passed = low >= 0 and high <= 1 and 0.02 <= mean <= 0.98 and std > 0.02
    detail = f"pixels from {low:.3f} to {high:.3f}, mean {mean:.3f}, deviation {std:.3f}"
    return Finding(name="input_convention", level="block", passed=passed, detail=detail)


def logits_sound(logits: Tensor) -> Finding:
    """Check 5: logits (N,K) are finite, no softmax, and not the same for every image."""
    finite = bool(logits.isfinite().all())
    sums = logits.sum(1)
    softmax = finite and bool(
        ((logits >= 0) & (logits <= 1)).all() and (sums - 1).abs().max() < 1e-4
    )
    constant = finite and len(logits) > 1 and bool(logits.std(0).max() < 1e-6)
    faults = [("not finite", not finite), ("already softmaxed", softmax), ("constant", constant)]
    found = [name for name, is_so in faults if is_so]
    detail = f"logits of {len(logits)} images are " + (", ".join(found) or "finite and varied")
    return Finding(name="logits", level="block", passed=not found, detail=detail)


def answers(defense: Defense, x: Tensor, labels: Tensor, draws: Draws) -> list[Finding]:
    """Checks 5, 11, 29 and batch independence, on pixels (N,C,H,W) with labels (N,)."""
    with torch.no_grad():
        given = [defense(x, draws.redraw(draw)) for draw in range(ANSWERS)]
    spread = max(_apart(answer, given[0]) for answer in given)
    random = spread > SAME
    declared = "stochastic" if defense.stochastic else "deterministic"
    detail = f"declared {declared}; {ANSWERS} answers differ by {spread:.1e} of their length"
    return [
        logits_sound(given[0]),
        Finding(
            name="randomness_declared",
            level="block",
            passed=random == defense.stochastic,
            detail=detail,
        ),
        _alone(defense, x, draws, given[0]),
        _anonymous(defense, x, labels, draws),
    ]


def _alone(defense: Defense, x: Tensor, draws: Draws, together: Tensor) -> Finding:
    """Return whether an image is answered alike in any company, under the same noise."""
    apart = 0.0
    with torch.no_grad():
        for size in BATCHES:
            for start in range(0, min(len(x), 3 * size), size):
                rows = torch.arange(start, min(start + size, len(x)), device=x.device)
                apart = max(apart, _apart(defense(x[rows], draws[rows]), together[rows]))
    return Finding(
        name="batch_independence",
        level="block",
        passed=apart <= 10 * SAME,
        detail=f"answers in batches of 1, 7 and {len(x)} differ by {apart:.1e} of their length",
    )


def _anonymous(defense: Defense, x: Tensor, labels: Tensor, draws: Draws) -> Finding:
    """Check 29: the answer depends on the picture and on noise, never on whose picture it is.

    An image's id reaches a purifier with its noise. Every image is shown under the id of another:
    one that knows labels by id names that one's class, more often than under ids nobody knows.
    """
    strange = Draws(draws.seed, draws.role, draws.ids + 1_000_003)
    shown = x.roll(1, 0)
    repeats = ANSWERS if defense.stochastic else 1
    named = []
    with torch.no_grad():
        for noise in (draws, strange):
            said = [defense(shown, noise.redraw(k)).argmax(1) == labels for k in range(repeats)]
            named.append(torch.stack(said).double().mean(0).cpu().numpy())
    p = more_fooled(named[1], named[0])
    return Finding(
        name="labels_unseen",
        level="block",
        passed=p >= SIGNIFICANT,
        detail=f"shown under another's id, that one's class is named for {named[0].mean():.1%}, "
        f"under an unknown id for {named[1].mean():.1%} (p = {p:.3g})",
    )


def _apart(one: Tensor, other: Tensor) -> float:
    """Return the largest distance between rows of logits (N,K), as a share of their length."""
    lengths = other.norm(dim=1).clamp_min(1e-12)
    return float(((one - other).norm(dim=1) / lengths).max()) if len(one) else 0.0


def recorded_accuracy(now: int, then: int, n: int) -> Finding:
    """Check 6: the bare classifier answers as it did when it was trained, on the same images."""
    allowed = 0.001 * n
    return Finding(
        name="recorded_accuracy",
        level="block",
        passed=abs(now - then) <= allowed,
        detail=f"{now} of {n} validation images right now, {then} when it was trained",
    )


def unchanged(before: str, after: str, training: bool) -> Finding:
    """Check 8: scoring left every parameter and buffer as it was, all modules in eval mode."""
    passed = before == after and not training
    detail = "weights and buffers unchanged, eval mode"
    if not passed:
        detail = "a module was in training mode" if training else "weights or buffers changed"
    return Finding(name="state_unchanged", level="block", passed=passed, detail=detail)


def leakage(test: Tensor, others: Sequence[tuple[str, Tensor]]) -> Finding:
    """Check 29: no test image (N,C,H,W) uint8 is, byte for byte, in a split that was learnt from.

    A handful can come from the source itself; one in a hundred moves no accuracy by more than a
    point, and is said all the same.
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
