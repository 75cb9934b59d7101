"""The first screen of the report: what each defense claims, and what is left of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipelines.reporting.wording import percent
from pipelines.tasks.entries import Entry
from pipelines.tasks.metrics import Estimate, Headline, Scored
from pipelines.tasks.summary import WEAKER

Fate = Literal["holds", "collapses", "fails", "not decided", "not valid"]


@dataclass(frozen=True)
class Claim:
    """The accuracy of a defense under attackers that are blind to it, and under all attacks.

    `seen` is the highest accuracy on a rung that does not see through the defense, None where there
    was none; it is no robustness. `left` is robust accuracy. `fate`: it `holds` if what is left
    beats no defense and every control; it `fails` otherwise, and `collapses` if a blind attacker
    sees significantly more; `not decided` says that a quick ladder left an upper bound above these
    rivals; `not valid` that a blocking check failed, or that no defense was not scored. `standing`
    is that of its verdict.
    """

    name: str
    seen: Estimate | None
    left: Headline
    fate: Fate
    standing: str


def claims(entries: Sequence[Entry], scored: Mapping[str, Scored]) -> list[Claim]:
    """Return the claim of every defense, what keeps most first, invalid measurements last."""
    found = [_claim(entry, scored[entry.name]) for entry in entries if entry.role == "defense"]
    return sorted(found, key=lambda claim: (claim.fate == "not valid", -claim.left.accuracy))


def compared_baseline(scored: Mapping[str, Scored]) -> str:
    """Return the adversarially trained baseline that defenses are compared with, or ""."""
    verdicts = [one.verdict for one in scored.values() if one.verdict]
    compared = [one.adversarial_training for one in verdicts]
    return next((one.baseline for one in compared if one), "")


def conclusion(found: Sequence[Claim], scored: Mapping[str, Scored]) -> str:
    """Say in one sentence what the evaluation found."""
    if not found:
        return "No defense was scored."
    parts = []
    fallen = [claim for claim in found if claim.fate == "collapses" and claim.seen]
    if fallen:
        worst = max(fallen, key=_gap)
        verb = "collapses" if len(fallen) == 1 else "collapse"
        parts.append(
            f"{len(fallen)} of {len(found)} defenses {verb}: {worst.name} claims {_seen(worst)} "
            "before an attacker who is blind to it, and keeps "
            f"{percent(worst.left.accuracy)} under the worst of all attacks"
        )
    holding = [claim for claim in found if claim.fate == "holds"]
    if holding:
        best = max(holding, key=lambda claim: claim.left.low)
        of = f" of {_seen(best)}" if best.seen else ""
        parts.append(f"{best.name} keeps most, {percent(best.left.accuracy)}{of}")
    else:
        controls = any(one.role == "control" for one in scored.values())
        rivals = "no defense and every control" if controls else "no defense"
        parts.append(f"none is validly measured to beat {rivals}")
    quick = sum(claim.fate == "not decided" for claim in found)
    if quick:
        parts.append(f"{quick} {'has' if quick == 1 else 'have'} an upper bound of a quick ladder")
    invalid = sum(claim.fate == "not valid" for claim in found)
    if invalid:
        are = "measurement is" if invalid == 1 else "measurements are"
        parts.append(f"{invalid} {are} not valid")
    baseline = compared_baseline(scored)
    if baseline:
        left = scored[baseline].headline
        kept = f"{'at most ' if left.upper_bound else ''}{percent(left.accuracy)}"
        parts.append(f"{baseline}, without a purifier, keeps {kept}")
    sentence = "; ".join(parts) + "."
    # Names of defenses stay as they are written.
    return sentence if fallen or holding else sentence[0].upper() + sentence[1:]


def _claim(entry: Entry, found: Scored) -> Claim:
    white = entry.white_box_rungs()
    blind = [
        found.rungs[mode]
        for mode in WEAKER
        if mode in found.rungs and mode not in white and mode not in found.void_rungs
    ]
    seen = max(blind, key=lambda score: score.accuracy, default=None)
    standing = found.verdict.standing if found.verdict else ""
    fate: Fate = "holds"
    unmeasured = standing == "not measured" and found.verdict and not found.verdict.rivals
    if found.checks.blocking_failed or (unmeasured and not found.quick):
        fate = "not valid"
    elif standing in ("broken", "no better than a control"):
        fate = "collapses" if found.illusory_rungs else "fails"
    elif found.quick:
        fate = "not decided"
    return Claim(entry.name, seen, found.headline, fate, standing)


def _gap(claim: Claim) -> float:
    return (claim.seen.accuracy if claim.seen else 0.0) - claim.left.accuracy


def _seen(claim: Claim) -> str:
    return percent(claim.seen.accuracy) if claim.seen else "nothing"
