"""What scores and checks mean, in sentences."""

from collections.abc import Mapping
from typing import Any, get_args

from pipelines.tasks.metrics import EntryRole, Estimate, Scored, Standing, ThreatModel, rung_of

ROBUST = "robust accuracy (worst of all attacks)"
ROLES: tuple[EntryRole, ...] = get_args(EntryRole)
BLIND = {
    "transfer": "has only another classifier",
    "classifier": "ignores the purifier",
    "network": "takes one pass of the purifier's network for the whole purifier",
    "bpda": "takes the purifier for the identity in the backward pass (BPDA)",
}


def percent(fraction: float) -> str:
    """Return a fraction as per cent with one digit: 0.942 is `94.2 %`."""
    return f"{100 * fraction:.1f} %"


def interval(score: Estimate) -> str:
    """Return the interval of a score in per cent."""
    return f"{100 * score.low:.1f}\N{EN DASH}{100 * score.high:.1f}"


def settings(value: Mapping[str, Any]) -> str:
    """Return nested settings on one line, the kind first: `pgd, steps 40, random_start yes`."""

    def text(one: Any) -> str:
        if isinstance(one, Mapping):
            return f"({settings(one)})"
        if one is None:
            return "none"
        return ("no", "yes")[one] if isinstance(one, bool) else str(one)

    kind = [str(value["kind"])] if "kind" in value else []
    return ", ".join([*kind, *(f"{key} {text(value[key])}" for key in value if key != "kind")])


def describe_threat(threat: ThreatModel) -> str:
    """Say what the attacker may change; the radius in [0,1] and in 255ths."""
    radius = describe_radius(threat)
    if threat.norm == "linf":
        return f"L-infinity, radius {radius}: no pixel changes by more"
    return f"L2, radius {radius}: no image moves further, in Euclidean distance over all its pixels"


def describe_radius(threat: ThreatModel) -> str:
    """Return the radius in 255ths and in [0,1]."""
    if threat.norm == "linf":
        return f"{threat.eps_255:g}/255 = {threat.eps_255 / 255:.4g}"
    return f"{255 * threat.eps_l2:g}/255 = {threat.eps_l2:g}"


def illusion(name: str, found: Scored) -> str:
    """Say what is left of the rungs that show robustness where there is none; "" if none does."""
    shown = found.illusory_rungs
    if not shown:
        return ""
    seen = ", ".join(f"{percent(one.seen)} when the attacker {BLIND[one.rung]}" for one in shown)
    count = ("", "two", "three", "four")[len(shown) - 1]
    which = f"{count} numbers are" if count else "number is"
    return (
        f"{name} shows {seen}, and {percent(shown[0].left)} when the attacker differentiates "
        f"through it: the first {which} no robustness."
    )


def not_beaten(found: Scored) -> str:
    """Say which controls and bare classifiers a defense does not beat; "" if it beats them all."""
    rivals = [
        f"{name} ({100 * rival.difference:+.1f} points, p = {rival.p:.2g})"
        for name, rival in (found.not_better_than or {}).items()
    ]
    return f"does not beat {', '.join(rivals)}" if rivals else ""


def verdict(found: Scored) -> str:
    """Say how a defense stands beside no defense, controls and adversarial training; "" else."""
    if found.verdict is None:
        return ""
    standing, rivals = found.verdict.standing, ", ".join(found.verdict.rivals)
    compared = found.verdict.adversarial_training
    beside = ""
    if compared is not None:
        beside = (
            f"{100 * compared.difference:+.1f} points beside {compared.baseline} (99 % interval "
            f"{100 * compared.low:+.1f} to {100 * compared.high:+.1f})"
        )
    sentences: dict[Standing, str] = {
        "above": f"above adversarial training: {beside}",
        "below": f"below adversarial training: {beside}",
        "not told apart": f"not told apart from adversarial training: {beside}",
        "no better than a control": f"no better than a control: does not beat {rivals}",
        "broken": f"broken: does not beat {rivals}, the classifier without a defense",
        "no comparison": f"no comparison: the adversarial training of {rivals} does not beat the "
        "classifier without a defense"
        if rivals
        else "no comparison: no baseline is trained adversarially",
        "not measured": f"not measured: a {'quick ladder' if found.quick else 'failed check'} "
        "makes an accuracy an upper bound"
        if rivals or found.headline.upper_bound
        else "not measured: the classifier behind it was not scored without a defense",
    }
    lost = standing in ("no better than a control", "broken") and beside
    return sentences[standing] + (f"; {beside}" if lost else "")


def written_for(found: Scored) -> str:
    """Return the attacks that were written for an entry, or `none`."""
    return ", ".join(found.written_for) or "none"


def no_better(name: str, found: Scored) -> str:
    """Say on how many sets a detector is no better than the control; "" if it mostly is better.

    Sets of a void rung do not count: there the attack had no gradient to follow.
    """
    if found.detection is None:
        return ""
    sets = [
        one
        for attack, one in found.detection.attacks.items()
        if rung_of(attack) not in found.void_rungs
    ]
    as_well = sum(one.control_auc >= one.auc for one in sets)
    if 2 * as_well <= len(sets):
        return ""
    return f"{name} on {as_well} of {len(sets)} sets"
