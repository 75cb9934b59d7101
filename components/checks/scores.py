"""Checks of scores: attacks and rungs in the order of their strength, claims that n can support.

Accuracies are per image (N,). Comparisons are exact paired tests, with p-values adjusted by Holm.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from components.attacks import L2, Attack, Linf
from components.attacks.autoattack import AutoAttack
from components.attacks.contract import GIVEN, LossFamily
from components.attacks.flip import Flip
from components.attacks.square import Square
from components.probes import LEADING
from components.probes.contract import SIGNIFICANT, Accuracies, Finding, not_asked
from components.probes.masking import unseen_gain
from components.probes.statistics import holm, more_fooled

# The order of strength of attack kinds: no attack may be beaten by one of a lower tier. Under noise
# the adaptive steps of APGD are no better than fixed ones (Lee and Kim 2023), so against stochastic
# defenses all iterative attacks are of one tier.
TIERS = {
    "noise": 0, "fgsm": 1, "r_fgsm": 1, "bim": 2, "pgd": 2, "apgd_ce": 3, "apgd_dlr": 3,
    "apgd_margin": 3, "apgd_t": 3, "autoattack": 4,
}  # fmt: skip
# Attacks without gradients. Attacks that follow gradients should leave them nothing to find.
BLACK_BOX = ("square", "flip")
# Checks of the gradient on one rung, named check/rung: where one fails, attacks on that rung had
# nothing to follow that leads anywhere.
GRADIENTLESS = ("gradient_present", *LEADING)
LEAST_DRAWS = 10
# Checks that ask a ladder for strong attacks.
NEEDS_STRENGTH = ("strong_attack", "full_rung", "without_gradients", f"full_is_strongest/{GIVEN}")
# An attack without gradients that tries fewer images has hardly searched.
LEAST_QUERIES = 100


def order_of_strength(
    full: Mapping[str, tuple[str, Accuracies]], stochastic: bool
) -> list[Finding]:
    """Check 12: on the full rung no attack is beaten by one of a lower tier.

    `full` maps names of attacks to (kind, accuracies). Each attack is compared with the worst, per
    image, of all stronger ones.
    """

    def tier(kind: str, unknown: int) -> int:
        known = TIERS.get(kind, unknown)
        return min(known, 2) if stochastic and kind in TIERS else known

    names, values = [], []
    for name, (kind, accuracies) in full.items():
        stronger = [right for k, right in full.values() if tier(k, -1) > tier(kind, 99)]
        if stronger:
            names.append(name)
            values.append(more_fooled(accuracies, np.minimum.reduce(stronger)))
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
    """Checks 17 and 18: no weaker rung beats `full`, the worst of all white-box rungs per image.

    White-box rungs are the full gradient and the stand-ins, if the purifier has any. Images that a
    caller gives are tested by themselves: more of them must not weaken the test of the others.
    """
    values = {rung: more_fooled(accuracies, full) for rung, accuracies in others.items()}
    family = [rung for rung in others if rung != GIVEN]
    values.update(zip(family, holm([values[rung] for rung in family]), strict=True))
    return [
        Finding(
            name=f"full_is_strongest/{rung}",
            level="block",
            passed=p >= SIGNIFICANT,
            detail=f"p = {p:.3g} that mode {rung} fools what white-box attacks do not",
        )
        for rung, p in values.items()
    ]


@dataclass(frozen=True)
class Illusion:
    """A rung whose accuracy `seen` is far above the accuracy `left` under white-box attacks."""

    rung: str
    seen: float
    left: float


def illusions(rungs: Mapping[str, Accuracies], white: Accuracies) -> list[Illusion]:
    """Return the rungs whose accuracy is at least 10 points, and significantly, above `white`."""
    left = float(white.mean())
    return [
        Illusion(rung, float(accuracies.mean()), left)
        for rung, accuracies in rungs.items()
        if accuracies.mean() - left >= 0.1 and more_fooled(white, accuracies) < SIGNIFICANT
    ]


def white_is_strongest(full: Mapping[str, tuple[str, Accuracies]]) -> list[Finding]:
    """Check 16: on the full rung, attacks without gradients fool hardly any further images.

    `full` is as in `order_of_strength`. On an honest small network Square fools a few images that
    gradients miss, so only a significant loss of over a point on at least 1,000 images blocks.
    """
    by_gradient = [right for kind, right in full.values() if kind not in BLACK_BOX]
    findings = []
    for name, (kind, accuracies) in full.items():
        if kind not in BLACK_BOX or not by_gradient:
            continue
        white = np.minimum.reduce(by_gradient)
        both = np.minimum(white, accuracies)
        lost = float((white - both).mean())
        p = more_fooled(both, white)
        failed = lost > 0.002 and (p < SIGNIFICANT or lost > 0.02)
        severe = failed and lost > 0.01 and len(white) >= 1000
        findings.append(
            Finding(
                name=f"white_is_strongest/{name}",
                level="block" if severe else "warn",
                passed=not failed,
                detail=f"without gradients it fools a further {lost:.1%} of images (p = {p:.3g})",
            )
        )
    return findings


def transfer_attack(own: Accuracies, added: Mapping[str, Accuracies]) -> list[Finding]:
    """Check 42: examples made for another classifier fool next to nothing more than own attacks.

    `own` are the accuracies (N,) of the headline, `added` those of the same rule where the worst
    examples against one baseline are candidates, too. White-box attacks know more. Where they leave
    over 5 points, and three images, that these examples fool, and significantly, they followed a
    gradient that does not belong to what decides.
    """
    adjusted = holm([more_fooled(accuracies, own) for accuracies in added.values()])
    findings = []
    for (baseline, accuracies), p in zip(added.items(), adjusted, strict=True):
        gain, n = float((own - accuracies).mean()), len(own)
        findings.append(
            Finding(
                name=f"transfer_attack/{baseline}",
                level="block",
                passed=gain <= unseen_gain(n) or p >= SIGNIFICANT,
                detail=f"examples against the baseline {baseline} fool a further {gain:.1%} of {n} "
                f"images (p = {p:.3g})",
            )
        )
    return findings


def stand_ins_tried(
    known: Sequence[str], stand_ins: Mapping[str, Accuracies], full: Accuracies | None
) -> list[Finding]:
    """Check 19: a purifier that iterates or rounds is attacked through all its stand-ins too.

    `known` are the stand-ins that it has, `stand_ins` the rungs that ran. Its own gradient may be
    too noisy, masked or zero: in one case the exact gradient through a descent by Adam left 63 % of
    the images right, and that of a single pass 2 %.
    """
    if not known:
        return []
    results = [f"{rung} {accuracies.mean():.1%}" for rung, accuracies in stand_ins.items()]
    if full is not None:
        results.append(f"full gradient {full.mean():.1%}")
    left_out = [name for name in known if name not in stand_ins]
    return [
        Finding(
            name="stand_ins",
            level="block",
            passed=not left_out,
            detail=f"right under {', '.join(results) or 'none'}; stand-ins not tried: "
            f"{', '.join(left_out) or 'none'}",
        )
    ]


def void_rungs(
    findings: Sequence[Finding], rungs: Mapping[str, Sequence[Attack]]
) -> frozenset[str]:
    """Return the rungs that are void: attacks on them had no gradient to follow.

    `findings` are those of the probes, `rungs` the bounded attacks of each. Where the loss of
    attacks on the cross-entropy alone is flat (`loss_alive`), a rung is void unless a strong attack
    on a margin stands on it. A void rung carries no claim, yet its sets still count in the worst of
    all: more attacks never make the number larger.
    """
    failed = {
        (check, rung)
        for check, _, rung in (
            finding.name.partition("/")
            for finding in findings
            if not finding.passed and not finding.figures.get("undecided")
        )
    }
    void = {rung for check, rung in failed if check in GRADIENTLESS}
    flat = {rung for check, rung in failed if check == "loss_alive"}
    return frozenset(
        void | {rung for rung in flat if "margin" not in _strong_losses(rungs.get(rung, ()))}
    )


def strong_enough(
    rungs: Mapping[str, Sequence[Attack]], stand_ins: Sequence[str], differentiable: bool,
    classes: int, void: Collection[str] = (),
) -> Finding:  # fmt: skip
    """Check 26: strong attacks (`Attack.strong`) on both families of losses see through.

    One on the cross-entropy and one on a margin or a target. On linear models with at least three
    classes the former follow the sum of all classes past the nearest one: where half of the images
    can be fooled, they left 53 to 56 % right, and attacks on the difference-of-logits ratio 50 to
    51 %. With two `classes` both losses are the same but for their sign, so one is enough.

    Both on the full gradient are enough. If they are not there, every stand-in and BPDA needs both:
    a single stand-in may be as useless as the gradient that it stands for. `void` rungs do not
    count (`void_rungs`).
    """
    families: tuple[LossFamily, ...] = ("cross-entropy", "margin")
    needed = families if classes > 2 else families[:1]
    strong = {mode: _strong_losses(attacks) for mode, attacks in rungs.items() if mode not in void}

    def lacking(mode: str) -> str:
        return " and ".join(loss for loss in needed if loss not in strong.get(mode, ()))

    instead = [*stand_ins, "bpda"] if stand_ins or not differentiable else ["full"]
    missing = [f"{lacking(mode)} on {mode}" for mode in instead if lacking(mode)]
    passed = (differentiable and not lacking("full")) or not missing
    found = [f"{mode} ({', '.join(sorted(losses))})" for mode, losses in strong.items() if losses]
    detail = f"strong attacks: {'; '.join(sorted(found)) or 'none'}"
    if void:
        detail += f"; void: {', '.join(sorted(void))}"
    if not passed:
        usable = differentiable and "full" not in instead
        direct = f"{lacking('full')} on full, or else " if usable else ""
        detail += f"; missing: {direct}{', '.join(missing)}"
    return Finding(name="strong_attack", level="block", passed=passed, detail=detail)


def without_gradients(
    rungs: Mapping[str, Sequence[Attack]], findings: Sequence[Finding], stochastic: bool,
    differentiable: bool,
) -> Finding:  # fmt: skip
    """Check 37: where gradients decide nothing, all images face an attack that needs none.

    That is a deterministic defense that is declared not differentiable, and any defense whose
    gradient could not be judged (`gradient_honest` undecided), which faces a targeted attack too.
    `rungs` are the bounded attacks on the defense itself, by rung. An attack without gradients
    counts if it may try at least `LEAST_QUERIES` images, a targeted one if it is strong.
    """
    undecided = any(
        finding.name.startswith("gradient_honest/") and bool(finding.figures.get("undecided"))
        for finding in findings
    )
    blind = not (differentiable or stochastic)
    attacks = [attack for some in rungs.values() for attack in some]
    missing = []
    if (undecided or blind) and not any(map(_searches, attacks)):
        missing.append(f"square (at least {LEAST_QUERIES} queries)")
    if undecided and not any(map(_targets, attacks)):
        missing.append("apgd_t (strong)")
    if undecided:
        reason = "its gradient could not be judged"
    else:
        reason = "it declares no gradient" if blind else "gradients decide"
    return Finding(
        name="without_gradients",
        level="block",
        passed=not missing,
        detail=f"{reason}; missing: {', '.join(missing) or 'none'}",
    )


def excused(finding: Finding) -> Finding:
    """Return a finding, as not asked where it failed for attacks that a quick ladder leaves out."""
    if finding.passed or finding.name not in NEEDS_STRENGTH:
        return finding
    return not_asked(finding.name, f"a quick ladder gives an upper bound ({finding.detail})")


def _searches(attack: Attack) -> bool:
    """Whether an attack, or a part of it, tries enough images without following a gradient."""
    if isinstance(attack, Flip):
        return attack.steps * attack.candidates >= LEAST_QUERIES
    if isinstance(attack, Square):
        return attack.queries >= LEAST_QUERIES
    return isinstance(attack, AutoAttack) and attack.version == "standard"


def _targets(attack: Attack) -> bool:
    """Whether an attack, or a part of it, follows the gradient to every other class in turn."""
    if isinstance(attack, AutoAttack):
        return attack.version == "standard"
    return attack.kind in ("apgd_t", "fab_t") and attack.strong()


def _strong_losses(attacks: Sequence[Attack]) -> set[LossFamily]:
    """Return the families of losses that the strong ones of some attacks climb."""
    return {loss for one in attacks if one.strong() for loss in one.losses}


def draws_enough(stochastic: bool, select: int, score: int) -> Finding:
    """Check 22: a stochastic defense is judged by enough draws, for selection and for scoring."""
    passed = not stochastic or min(select, score) >= LEAST_DRAWS
    detail = (
        f"{select} draws select, {score} others score" if stochastic else "one answer is enough"
    )
    return Finding(name="scoring_draws", level="block", passed=passed, detail=detail)


def selection(headline: Accuracies, singles: Mapping[str, Accuracies]) -> Finding:
    """Check that no single attack leaves less than the headline, the worst attack per image.

    A deterministic defense always passes. Under noise it may fail: the noise that selects the worst
    attack is not the noise that scores it, and among many equal attacks it selects the luckiest.
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

    It blocks from 8/255 in L-infinity on; at smaller radii, and in other norms, it only warns.
    """
    large = isinstance(threat, Linf) and threat.eps_255 >= 8
    return Finding(
        name="undefended_falls",
        level="block" if large else "warn",
        passed=accuracy <= 0.05,
        detail=f"{accuracy:.1%} of images stay right with no defense at all",
    )
