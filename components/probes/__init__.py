"""Probes: checks that need the defense itself, its gradients or attacks on it.

`probe` runs them where adversarial sets are crafted. Checks of stored sets and of scores are in
components/checks. The table in docs/evaluation.md says of every check when it fails, what that
means and what to do next; the numbers of checks are those of the table.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from components.attacks import L2, Linf
from components.attacks.apgd import ApgdCe
from components.data.image_set import ImageSet
from components.models.defense import STAND_INS, Defense, Mode
from components.models.precision import full_precision
from components.probes import answers, attacks, gradients, masking, models, paths
from components.probes.bench import Bench, Stored, spread
from components.probes.contract import Finding

__all__ = ["Finding", "Stored", "probe", "required", "spread"]

# Images that attacks and repeated questions are tried on, and those whose gradient is compared with
# differences.
TRIED, COMPARED = 64, 32
# The checks of whether a gradient leads anywhere, in every mode that carries a claim.
LEADING = ("gradient_honest", "gradient_pays", "gradient_adds_up")


@full_precision()
def probe(
    defense: Defense, modes: Sequence[Mode], data: ImageSet, threat: Linf | L2, seed: int,
    images: int, eot: int, batch: int, stored: Stored | None, val: ImageSet | None, thorough: bool,
    others: Mapping[str, Callable[[Bench], Finding]] = {},
) -> list[Finding]:  # fmt: skip
    """Probe a defense on `images` images drawn from `data`, in the gradient modes of its ladder.

    The images are those that `spread` draws. `eot` is the number of draws that its attacks average
    over, `batch` their batch size. `stored` is what they left behind, if there were any. `val` are
    images that nobody scores. `thorough` adds probes that cost attacks of their own. `others` are
    checks from elsewhere, by the names of their findings. In full float32 (`full_precision`).

    Raises ValueError where one of those has the name of a check of ours, or returns no finding.
    """
    device = next(defense.classifier.parameters()).device
    stored = stored or Stored([], defense.digest, 0)
    rows = spread(data.ids, stored.secret, seed, images)
    x, labels, ids = (
        part.to(device) for part in (data[rows].pixels(), data.labels[rows], data.ids[rows])
    )
    worst = stored.worst(data.ids[rows]).to(device) if stored.sets else None
    classes: torch.Tensor = data.labels.unique()  # type: ignore[no-untyped-call]
    bench = Bench(
        defense, x, labels, ids, threat, seed, worst, batch, _mode(defense, modes), stored.secret,
        stored.answers, classes.to(device),
    )  # fmt: skip
    # The draw that spread the rows is random, so any part of them is as good as any other.
    some = bench.affordable(TRIED)
    points = some.points()
    findings = [
        models.convention(data.pixels()),
        *answers.check_logits(defense, x, bench.draws),
        answers.one_answer(some, points),
        answers.looks_around(defense),
    ]
    for mode in modes:
        findings.append(gradients.gradient_present(defense, mode, x, labels, bench.draws))
        findings.append(gradients.loss_alive(defense, mode, x, labels, bench.draws))
    # Where an attack is dear, its way is known for fewer images than can be compared.
    few = bench.first(COMPARED)
    if not defense.differentiable:
        findings.append(gradients.gradient_declared(few))
    elif "full" in modes:
        on_the_way = {name: point[:COMPARED] for name, point in points.items()}
        findings.append(gradients.gradient_honest(few, {**on_the_way, **few.still_points()}))
        findings.append(gradients.gradient_pays(bench, points))
        findings.append(paths.gradient_adds_up(bench))
    findings += _instead(bench, points, modes)
    if "full" in modes and defense.stochastic:
        findings.append(gradients.eot_agreement(defense, x, labels, bench.draws, eot))
    findings.append(masking.stored_attacks(some))
    findings.append(masking.blind_attack(some))
    findings.append(masking.remembered(some, data, val))
    findings += attacks.unbounded(some, modes)
    if thorough and "full" in modes:
        findings += _thorough(
            bench, [one.to(device) for one in stored.examples(data.ids[rows])], eot
        )
    taken = {finding.name.partition("/")[0] for finding in findings}
    return findings + [_asked(name, check, bench, taken) for name, check in others.items()]


def _asked(
    name: str, check: Callable[[Bench], Finding], bench: Bench, taken: Collection[str]
) -> Finding:
    """Return the finding of a check from elsewhere, under its name."""
    if name in taken:
        raise ValueError(f"the check {name} of a plugin has the name of one of ours: rename it")
    found = check(bench)
    if not isinstance(found, Finding):
        raise ValueError(f"the check {name} of a plugin returned {found!r}, which is no Finding")
    return found.model_copy(update={"name": name})


def required(
    modes: Sequence[Mode], stochastic: bool, differentiable: bool, thorough: bool
) -> list[str]:
    """Return the names of all findings that `probe` gives: a score without one is not believed."""
    names = ["input_convention", "logits", "randomness_declared", "one_answer", "looks_around"]
    names += [f"{check}/{mode}" for mode in modes for check in ("gradient_present", "loss_alive")]
    names += [] if differentiable else ["gradient_declared"]
    names += [f"{check}/{mode}" for mode in _stand_ins(modes, differentiable) for check in LEADING]
    names += ["stored_attacks", "blind_attack", "remembered"]
    if modes:
        names += ["unbounded_by_gradient", "unbounded"]
    if "full" in modes:
        names += [f"{check}/full" for check in LEADING] if differentiable else []
        names += ["eot_agreement"] if stochastic else []
        if thorough:
            names += ["radius_pays", "converged", "planted", "repeatable"]
            names += ["chance", "eot_enough"] if stochastic else []
    return names


def _stand_ins(modes: Sequence[Mode], differentiable: bool) -> list[Mode]:
    """Return the modes whose attacks go around the purifier to the gradient of the classifier."""
    return [mode for mode in modes if mode in STAND_INS or (mode == "bpda" and not differentiable)]


def _instead(
    bench: Bench, points: Mapping[str, torch.Tensor], modes: Sequence[Mode]
) -> list[Finding]:
    """Ask of the classifier alone, at purified images, what a stand-in needs of it, in every mode.

    A purifier without a gradient and without a stand-in leaves the identity alone (`bpda`), whose
    steps must then pay through both.
    """
    purifier, around = bench.defense.purifier, _stand_ins(modes, bench.defense.differentiable)
    if purifier is None or not around:
        return []
    few = bench.behind.first(COMPARED)
    seen = few.points()
    if purifier.stand_ins:
        pays = gradients.gradient_pays(bench.behind, seen)
    else:
        pays = gradients.gradient_pays(bench, points, "bpda")
    found = [gradients.gradient_honest(few, seen), pays, paths.gradient_adds_up(bench)]
    return [
        finding.model_copy(update={"name": f"{check}/{mode}"})
        for mode in around
        for check, finding in zip(LEADING, found, strict=True)
    ]


def _mode(defense: Defense, modes: Sequence[Mode]) -> Mode:
    """Return the mode in which attacks see most: the exact gradient, a stand-in, or `bpda`.

    The ladder decides where it names one: the exact gradient may be dear. No ladder spares a
    defense the probes that attack.
    """
    if defense.differentiable and "full" in modes:
        return "full"
    for mode in modes:
        if mode in STAND_INS:
            return mode
    if "bpda" in modes or not defense.differentiable:
        return "bpda"
    return "full"


def _thorough(bench: Bench, stored: Sequence[torch.Tensor], eot: int) -> list[Finding]:
    attack = ApgdCe(kind="apgd_ce", steps=100, restarts=1, eot=1)
    findings = [
        attacks.radii(bench),
        attacks.converged(bench, stored),
        attacks.planted(bench, attack),
        attacks.repeatable(bench),
    ]
    if bench.defense.stochastic:
        findings += [attacks.fixed_noise(bench), attacks.eot_enough(bench, eot)]
    return findings
