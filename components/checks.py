"""Doubts about a score, and the probes behind them.

A check says what it looked at, whether it passed, and how grave a failure is: `block` means that
the number it concerns is shown as an upper bound and never as a result. Probes need gradients and
are taken where attacks are crafted; the rest judges stored sets and counts. `docs/evaluation.md`
says of every name when it is raised, what that means and what to do next.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from components.attacks import L2, Linf, violations
from components.attacks.contract import Search
from components.attacks.gradient import Pgd
from components.config import Config
from components.data import ImageSet
from components.defense import Defense, Mode, aim, margin
from components.draws import Draws
from components.evaluation import holm, more_fooled

PROBED = 128
UNBOUNDED = 64
SIGNIFICANT = 0.01
# The order of strength of attack kinds: none may be beaten by one of a lower tier.
TIERS = {"noise": 0, "fgsm": 1, "bim": 2, "pgd": 2, "apgd_ce": 3, "apgd_t": 3}

Shares = npt.NDArray[np.float64]


class Finding(Config):
    """The outcome of one check: `detail` is a sentence with the figures."""

    name: str
    level: Literal["block", "warn"]
    passed: bool
    detail: str


def probe(
    defense: Defense, modes: Sequence[Mode], data: ImageSet, threat: Linf | L2, seed: int
) -> list[Finding]:
    """Probe what attacks rely on: input convention, logits, randomness, gradients, eps = 1."""
    device = next(defense.classifier.parameters()).device
    rows = torch.arange(min(len(data), PROBED))
    x, y = data[rows].pixels().to(device), data.labels[rows].to(device)
    draws = Draws(seed, "attack", data.ids[rows].to(device))
    findings = [convention(data.pixels()), *_answers(defense, x, draws)]
    for mode in modes:
        findings.append(_gradient_present(defense, mode, x, y, draws))
    findings += _unbounded(defense, modes, data, threat, seed)
    return findings


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


def _answers(defense: Defense, x: Tensor, draws: Draws) -> list[Finding]:
    """Checks 5 and 11: five answers, and whether they differ as much as is declared."""
    with torch.no_grad():
        answers = [defense(x, draws.redraw(draw)) for draw in range(5)]
    lengths = answers[0].norm(dim=1).clamp_min(1e-12)
    spread = max(((a - answers[0]).norm(dim=1) / lengths).max().item() for a in answers)
    random = spread > 1e-4
    declared = "stochastic" if defense.stochastic else "deterministic"
    detail = f"declared {declared}; five answers differ by {spread:.1e} of their length"
    honest = random == defense.stochastic
    return [
        logits_sound(answers[0]),
        Finding(name="randomness_declared", level="block", passed=honest, detail=detail),
    ]


def _gradient_present(
    defense: Defense, mode: Mode, x: Tensor, labels: Tensor, draws: Draws
) -> Finding:
    """Check 9: the margin has a usable gradient with respect to the input."""
    gradient = aim(defense, mode, draws, 1).evaluate(x, labels, margin, 0).gradient.flatten(1)
    unusable = ~gradient.isfinite().all(1) | (gradient == 0).all(1)
    share = unusable.float().mean().item()
    detail = f"{share:.1%} of {len(x)} images have a zero or non-finite gradient in mode {mode}" + (
        "; attacks in this mode have nothing to follow" if share > 0.01 else ""
    )
    return Finding(
        name=f"gradient_present/{mode}", level="block", passed=share <= 0.01, detail=detail
    )


def _unbounded(
    defense: Defense, modes: Sequence[Mode], data: ImageSet, threat: Linf | L2, seed: int
) -> list[Finding]:
    """Check 15: with the whole image space allowed, an attack must reach (almost) zero.

    From the image itself by gradient alone, and from an image of another class: the second must
    succeed for any defense that looks at its input, the first for any whose gradient leads there.
    """
    device = next(defense.classifier.parameters()).device
    rows = torch.arange(min(len(data), UNBOUNDED))
    chosen = data[rows]
    x, y = chosen.pixels().to(device), chosen.labels.to(device)
    draws = Draws(seed, "attack", chosen.ids.to(device))
    whole = Linf(norm="linf", eps_255=255.0)
    left = {"from itself": [], "from another class": []}  # type: dict[str, list[int]]
    for mode in modes:
        target = aim(defense, mode, draws, 4)
        attack = Pgd(
            kind="pgd", steps=40, step=0.05, restarts=1, random_start=True, early_stop=True, eot=4
        )
        margins = attack.run(target, x, y, whole, draws).margin
        left["from itself"].append(int((margins > 0).sum()))
        search = Search(target, x, y, drop=True)
        search.rows = torch.arange(len(x), device=device)
        search.look(_of_another_class(x, y))
        left["from another class"].append(int((search.margin > 0).sum()))
    allowed = max(0.01 * len(x), 2)
    names = {"from itself": "unbounded_by_gradient", "from another class": "unbounded"}
    return [
        Finding(
            name=names[start],
            level="block" if start == "from another class" else "warn",
            passed=min(counts) <= allowed,
            detail=f"at eps 1, started {start}, {min(counts)} of {len(x)} images stay right",
        )
        for start, counts in left.items()
    ]


def _of_another_class(x: Tensor, labels: Tensor) -> Tensor:
    """Return for every image the next one in the batch with another label, or its negative."""
    others = 1 - x
    for row in range(len(x)):
        differing = (labels != labels[row]).nonzero().flatten()
        if len(differing):
            others[row] = x[differing[(differing > row).int().argmax()]]
    return others


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


def order_of_strength(full: Mapping[str, tuple[str, Shares]]) -> list[Finding]:
    """Check 12: on the full rung no attack is beaten by one of a lower tier.

    `full` maps a name to (kind, shares correct per image); compared with the union of all that is
    stronger, by exact paired tests after Holm.
    """
    names, values = [], []
    for name, (kind, shares) in full.items():
        stronger = [s for k, s in full.values() if TIERS.get(k, -1) > TIERS.get(kind, 99)]
        if stronger:
            names.append(name)
            values.append(more_fooled(shares, np.minimum.reduce(stronger)))
    return [
        Finding(
            name=f"order_of_strength/{name}",
            level="block",
            passed=p >= SIGNIFICANT,
            detail=f"p = {p:.3g} that it fools what all stronger attacks together do not",
        )
        for name, p in zip(names, holm(values), strict=True)
    ]


def full_is_strongest(full: Shares, others: Mapping[str, Shares]) -> list[Finding]:
    """Checks 17 and 18: no weaker rung beats the union of the full rung."""
    adjusted = holm([more_fooled(shares, full) for shares in others.values()])
    return [
        Finding(
            name=f"full_is_strongest/{rung}",
            level="block",
            passed=p >= SIGNIFICANT,
            detail=f"p = {p:.3g} that mode {rung} fools what the full gradient does not",
        )
        for rung, p in zip(others, adjusted, strict=True)
    ]


@dataclass(frozen=True)
class Illusion:
    """How much of a weaker rung's accuracy is left under the full gradient."""

    rung: str
    seen: float
    left: float


def illusions(rungs: Mapping[str, Shares], full: Shares) -> list[Illusion]:
    """Return the rungs that show at least 10 points more than the full gradient leaves."""
    left = float(full.mean())
    return [
        Illusion(rung, float(shares.mean()), left)
        for rung, shares in rungs.items()
        if shares.mean() - left >= 0.1 and more_fooled(full, shares) < SIGNIFICANT
    ]
