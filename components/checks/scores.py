"""Doubts about counts: attacks out of order, rungs out of order, claims that n cannot carry."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from components.attacks import L2, Attack, Linf
from components.probes.contract import SIGNIFICANT, Accuracies, Finding
from components.probes.statistics import holm, more_fooled

# The order of strength of attack kinds: none may be beaten by one of a lower tier.
# Under noise APGD's choice of steps gains nothing on fixed ones (Lee and Kim 2023): there all that
# iterates is one tier.
TIERS = {
    "noise": 0, "fgsm": 1, "r_fgsm": 1, "bim": 2, "pgd": 2, "apgd_ce": 3, "apgd_dlr": 3,
    "apgd_t": 3, "autoattack": 4,
}  # fmt: skip
# Attacks that see answers only; what follows gradients should leave them nothing to find.
BLIND = ("square", "flip")
LEAST_DRAWS = 10


def order_of_strength(
    full: Mapping[str, tuple[str, Accuracies]], stochastic: bool
) -> list[Finding]:
    """Check 12: on the full rung no attack is beaten by one of a lower tier.

    `full` maps a name to (kind, shares correct per image); compared with the union of all that is
    stronger, by exact paired tests after Holm.
    """

    def tier(kind: str, unknown: int) -> int:
        known = TIERS.get(kind, unknown)
        return min(known, 2) if stochastic and kind in TIERS else known

    names, values = [], []
    for name, (kind, shares) in full.items():
        stronger = [s for k, s in full.values() if tier(k, -1) > tier(kind, 99)]
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


def full_is_strongest(full: Accuracies, others: Mapping[str, Accuracies]) -> list[Finding]:
    """Checks 17 and 18: no weaker rung beats the union of the white rungs.

    White are the full gradient and, where a purifier has them, its stand-ins.
    """
    adjusted = holm([more_fooled(shares, full) for shares in others.values()])
    return [
        Finding(
            name=f"full_is_strongest/{rung}",
            level="block",
            passed=p >= SIGNIFICANT,
            detail=f"p = {p:.3g} that mode {rung} fools what white-box attacks do not",
        )
        for rung, p in zip(others, adjusted, strict=True)
    ]


@dataclass(frozen=True)
class Illusion:
    """How much of a weaker rung's accuracy is left in white box."""

    rung: str
    seen: float
    left: float


def illusions(rungs: Mapping[str, Accuracies], white: Accuracies) -> list[Illusion]:
    """Return the rungs that show at least 10 points more than white-box attacks leave."""
    left = float(white.mean())
    return [
        Illusion(rung, float(shares.mean()), left)
        for rung, shares in rungs.items()
        if shares.mean() - left >= 0.1 and more_fooled(white, shares) < SIGNIFICANT
    ]


def white_is_strongest(full: Mapping[str, tuple[str, Accuracies]]) -> list[Finding]:
    """Check 16: on the full rung, attacks that see answers only find next to nothing more.

    `full` as in `order_of_strength`. An honest small network lets Square fool a few images that
    gradients miss; what blocks is a significant loss of over a point on at least 1,000 images.
    """
    seen = [shares for kind, shares in full.values() if kind not in BLIND]
    findings = []
    for name, (kind, shares) in full.items():
        if kind not in BLIND or not seen:
            continue
        union = np.minimum.reduce(seen)
        lost = float((union - np.minimum(union, shares)).mean())
        p = more_fooled(np.minimum(union, shares), union)
        fired = lost > 0.002 and (p < SIGNIFICANT or lost > 0.02)
        grave = fired and lost > 0.01 and len(union) >= 1000
        findings.append(
            Finding(
                name=f"white_is_strongest/{name}",
                level="block" if grave else "warn",
                passed=not fired,
                detail=f"without gradients it fools a further {lost:.1%} of images (p = {p:.3g})",
            )
        )
    return findings


def stand_ins_tried(
    known: Sequence[str], stand_ins: Mapping[str, Accuracies], full: Accuracies | None
) -> list[Finding]:
    """Check 19: a purifier that iterates or rounds is attacked through all its stand-ins too.

    `known` are the stand-ins it has, `stand_ins` the rungs that were run. Its own gradient may be
    too noisy, masked or nil: the exact one through a descent by Adam has been seen to leave 63 % of
    images where that of a single pass left 2 %.
    """
    if not known:
        return []
    said = [f"{rung} {shares.mean():.1%}" for rung, shares in stand_ins.items()]
    if full is not None:
        said.append(f"full gradient {full.mean():.1%}")
    left_out = [name for name in known if name not in stand_ins]
    return [
        Finding(
            name="stand_ins",
            level="block",
            passed=not left_out,
            detail=f"right under {', '.join(said) or 'none'}; stand-ins not tried: "
            f"{', '.join(left_out) or 'none'}",
        )
    ]


def strong_enough(
    rungs: Mapping[str, Sequence[Attack]], stand_ins: Sequence[str], differentiable: bool
) -> Finding:
    """Check 26: an attack that sees through the purifier has the steps and the reach to count.

    The full gradient does by itself. Where nobody followed it far, or there is none, every stand-in
    and BPDA must have been: one alone may be as blind as the gradient it stands for.
    """
    strong = {mode for mode, attacks in rungs.items() if any(one.strong() for one in attacks)}
    instead = [*stand_ins, "bpda"] if stand_ins or not differentiable else ["full"]
    missing = [mode for mode in instead if mode not in strong]
    passed = (differentiable and "full" in strong) or not missing
    return Finding(
        name="strong_attack",
        level="block",
        passed=passed,
        detail=f"rungs with a strong attack: {', '.join(sorted(strong)) or 'none'}"
        + ("" if passed else f"; without the full gradient it takes {', '.join(missing)} as well"),
    )


def draws_enough(stochastic: bool, select: int, score: int) -> Finding:
    """Check 22: a random defense is judged by many fresh draws, for selection and for scoring."""
    passed = not stochastic or min(select, score) >= LEAST_DRAWS
    what = f"{select} draws select, {score} others score" if stochastic else "one answer is enough"
    return Finding(name="scoring_draws", level="block", passed=passed, detail=what)


def selection(headline: Accuracies, singles: Mapping[str, Accuracies]) -> Finding:
    """Say whether a single attack, on every image, does better than the worst chosen per image.

    Only noise can make it so: what selects is not what scores, and among many equal attacks the
    luckiest is chosen. Deterministic defenses pass by construction.
    """
    least = min(singles, key=lambda name: float(singles[name].mean()), default=None)
    lowest = float(singles[least].mean()) if least else 1.0
    return Finding(
        name="selection",
        level="warn",
        passed=float(headline.mean()) <= lowest + 0.005,
        detail=f"headline {headline.mean():.1%}; the strongest single attack, {least or 'none'}, "
        f"leaves {lowest:.1%}",
    )


def undefended_falls(accuracy: float, threat: Linf | L2) -> Finding:
    """Check 25: an undefended, standard-trained classifier is fooled on nearly every image.

    Blocks from 8/255 in L-infinity on; at a radius that is small, or not comparable, it warns.
    """
    large = isinstance(threat, Linf) and threat.eps_255 >= 8
    return Finding(
        name="undefended_falls",
        level="block" if large else "warn",
        passed=accuracy <= 0.05,
        detail=f"{accuracy:.1%} of images stay right with no defense at all",
    )


def not_beaten(
    shares: Accuracies, rivals: Mapping[str, Accuracies]
) -> dict[str, tuple[float, float]]:
    """Return the rivals that `shares` does not beat: (difference of means, p that it is chance).

    All are shares correct per image under the worst examples (N,); exact paired tests, Holm.
    """
    names = list(rivals)
    values = holm([more_fooled(rivals[rival], shares) for rival in names])
    return {
        rival: (float(shares.mean() - rivals[rival].mean()), p)
        for rival, p in zip(names, values, strict=True)
        if p >= SIGNIFICANT
    }
