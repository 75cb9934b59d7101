"""Summing up and judging what was counted of an entry, for reports/metrics.json.

Every figure comes from a `Result`; sentences stand beside the figures they are about.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from components.attacks import L2, Attack, Linf
from components.attacks.contract import MODES, RUNGS, UNASKED
from components.checks.scores import (
    draws_enough,
    excused,
    full_is_strongest,
    illusions,
    order_of_strength,
    selection,
    stand_ins_tried,
    strong_enough,
    transfer_attack,
    undefended_falls,
    void_rungs,
    white_is_strongest,
    without_gradients,
)
from components.checks.sets import rounding, same_answer
from components.checks.verdicts import Verdict, unbeaten, verdict, written_for
from components.data.image_set import ImageSet
from components.evaluation.counting import (
    CLEAN,
    Score,
    majority_of,
    per_class,
    worst,
    worst_of,
    worst_of_all,
)
from components.evaluation.detection import detection
from components.models.checkpoints import read_card
from components.models.defense import STAND_INS
from components.probes import Finding
from components.probes.contract import Accuracies
from components.probes.statistics import summarise, wilson
from pipelines.config.sections import Scoring
from pipelines.tasks import metrics
from pipelines.tasks.entries import Entry, Plan, other_baselines
from pipelines.tasks.metrics import Estimate, Scored, attack_of, rung_of
from pipelines.tasks.scoring import Result

TRIES = 10
STANDARD_TRAINED = "classification"
CERTIFICATE = ("gradient_present", "gradient_honest", "eot_agreement")
# Rungs whose attacks do not see through the purifier; `bpda` does where it has no gradient.
WEAKER = (*UNASKED, "bpda")


def headline(result: Result) -> tuple[list[str], Score]:
    """Return which set carries each image (N,), and how often the entry is then right."""
    counted = result.within_threat()
    return worst_of_all(counted, list(counted))


def summary(entry: Entry, result: Result, plan: Plan, images: ImageSet) -> Scored:
    """Sum up one entry on the test images; `compared` adds what takes the other entries."""
    counted = result.within_threat()
    chosen, carried = headline(result)
    rungs = _rungs(counted, _about(entry, result, plan, plan.threat.label))
    white_box = _white_box(entry, counted)
    weaker = [mode for mode in WEAKER if mode in rungs and mode not in entry.white_box_rungs()]
    seen = {mode: rungs[mode].accuracy() for mode in weaker}
    shown = illusions(seen, white_box) if white_box is not None else []
    within = _attacks_within(entry, counted, plan, plan.threat.label)
    void = void_rungs(result.findings, within)
    judged = _judged(entry, result, rungs, counted, carried, plan, len(images.class_names), void)
    findings = [_recorded(finding) for finding in (*result.findings, *judged)]
    failed = [f.name for f in findings if not f.passed and f.level == "block"]
    clean = result.scores[CLEAN]
    detector = detection(result.detector, result.inside, counted) if result.detector else None
    classes = per_class(carried.accuracy(), images.labels.numpy(), images.class_names)
    return Scored(
        role=entry.role,
        digest=entry.subject.digest(),
        stochastic=entry.subject.stochastic(),
        clean=metrics.CleanScore(
            **dict(_estimate(clean.accuracy())), agreement=float(result.agreed[CLEAN].mean())
        ),
        quick=plan.quick,
        headline=metrics.Headline(
            **dict(_estimate(carried.accuracy())), upper_bound=bool(failed) or plan.quick
        ),
        per_class={name: Estimate.model_validate(one) for name, one in classes.items()},
        carried_by={n: chosen.count(n) for n in dict.fromkeys(chosen)},
        rungs={mode: _estimate(score.accuracy()) for mode, score in rungs.items()},
        void_rungs=[mode for mode in MODES if mode in void],
        white_box=None if white_box is None else _estimate(white_box),
        attacks=_attacks(entry, result, plan, len(images.class_names)),
        elsewhere=_elsewhere(
            entry, result, plan, len(images.class_names), void, bool(failed) or plan.quick
        ),
        detection=metrics.Detection.model_validate(detector) if detector else None,
        retries=metrics.Retries(
            worst_of_10=_estimate(worst_of(carried, TRIES)),
            majority_of_10=_estimate(majority_of(carried, TRIES)),
            clean_worst_of_10=_estimate(worst_of(clean, TRIES)),
            clean_majority_of_10=_estimate(majority_of(clean, TRIES)),
        ),
        unseen_classifier=_unseen_classifier(result),
        illusions=[f"{one.rung}: {one.seen:.1%}, {one.left:.1%} in white box" for one in shown],
        illusory_rungs=[
            metrics.IllusoryRung(rung=one.rung, seen=one.seen, left=one.left) for one in shown
        ],
        radius_curve=_radius_curve(result.findings),
        checks=metrics.Checks(
            blocking_failed=failed,
            warnings=[f.name for f in findings if not f.passed and f.level == "warn"],
            findings=findings,
        ),
        certificate={f.name: f.figures for f in findings if f.check in CERTIFICATE},
        written_for=written_for(
            {n: one.kind for n, one in entry.attacks.items() if n in result.scores}
        ),
    )


def compared(
    entries: Sequence[Entry], results: Sequence[Result], scored: Mapping[str, Scored]
) -> dict[str, Scored]:
    """Return the scores, each defense with its verdict and the entries that it does not beat."""
    right = {e.name: headline(r)[1].accuracy() for e, r in zip(entries, results, strict=True)}
    trained = {
        e.name: (right[e.name], scored[e.name].headline.upper_bound)
        for e in entries
        if e.role == "baseline" and _objective(e) not in (None, STANDARD_TRAINED)
    }
    found = dict(scored)
    for entry in entries:
        if entry.role == "defense":
            # What stands in front of another classifier is no rival, but adversarial training is.
            behind = [e for e in entries if e.subject.classifier == entry.subject.classifier]
            rivals = {e.name: right[e.name] for e in behind if e.role != "defense"}
            rivals |= {name: right[name] for name in trained}
            lost = unbeaten(right[entry.name], rivals)
            judged = verdict(
                right[entry.name],
                found[entry.name].headline.upper_bound,
                lost,
                {e.name: right[e.name] for e in behind if e.role == "baseline"},
                [e.name for e in behind if e.role == "control"],
                trained,
            )
            changes = {
                "not_better_than": {
                    rival: metrics.Rival(difference=difference, p=p)
                    for rival, (difference, p) in lost.items()
                },
                "verdict": _verdict(judged),
            }
            found[entry.name] = found[entry.name].model_copy(update=changes)
    return found


def _unseen_classifier(result: Result) -> metrics.UnseenClassifier | None:
    if result.unseen is None:
        return None
    clean, attacked = (_estimate(score.accuracy()) for score in result.unseen)
    return metrics.UnseenClassifier(clean=clean, worst_examples=attacked)


def _verdict(judged: Verdict) -> metrics.Verdict:
    one = judged.difference
    return metrics.Verdict(
        standing=judged.standing,
        rivals=list(judged.rivals),
        adversarial_training=metrics.Difference(
            baseline=one.baseline, difference=one.mean, low=one.low, high=one.high, p=one.p
        )
        if one
        else None,
    )


def threat_model(
    threat: Linf | L2, n: int, scoring: Scoring
) -> metrics.LinfThreat | metrics.L2Threat:
    """Return what all scores are about: the ball, the number of images, the draws."""
    draws = {"select_draws": scoring.select_draws, "score_draws": scoring.score_draws}
    if isinstance(threat, Linf):
        return metrics.LinfThreat(norm=threat.norm, eps_255=threat.eps_255, n=n, **draws)
    return metrics.L2Threat(norm=threat.norm, eps_l2=threat.eps_l2, n=n, **draws)


def _estimate(accuracies: npt.NDArray[np.float64]) -> Estimate:
    return Estimate.model_validate(summarise(accuracies))


def _rungs(counted: Mapping[str, Score], about: Collection[str]) -> dict[str, Score]:
    """Return the scores under the worst attack of every rung, in ladder order.

    All sets of a rung take part, but one of them has to be `about` the threat that is counted.
    """
    rungs, run = {}, {rung_of(name) for name in about}
    for mode in RUNGS:
        if mode in run:
            sets = {n: s for n, s in counted.items() if n == CLEAN or rung_of(n) == mode}
            rungs[str(mode)] = worst(sets, list(sets))[1]
    return rungs


def _about(entry: Entry, result: Result, plan: Plan, label: str) -> list[str]:
    """Return the sets that are about a threat: those inside it, and those that minimise a distance.

    What minimises a distance is about the primary threat, for want of a better one.
    """
    labels = (label, "") if label == plan.threat.label else (label,)
    return [
        n for n in result.scores if n != CLEAN and entry.attacks[n].region(plan.threat) in labels
    ]


def _elsewhere(
    entry: Entry, result: Result, plan: Plan, classes: int, void: Collection[str], failed: bool
) -> dict[str, metrics.Elsewhere]:
    """Return what is left under each further threat that attacks of the entry have, by its label.

    It is an upper bound unless the entry passed its checks and strong attacks had this threat.
    """
    found = {}
    for label in result.elsewhere:
        counted, about = result.within_threat(label), _about(entry, result, plan, label)
        carried = worst_of_all(counted, list(counted))[1]
        strong = strong_enough(
            _attacks_within(entry, about, plan, label), entry.subject.stand_ins(),
            entry.subject.differentiable(), classes, void,
        )  # fmt: skip
        found[label] = metrics.Elsewhere(
            headline=metrics.Headline(
                **dict(_estimate(carried.accuracy())), upper_bound=failed or not strong.passed
            ),
            rungs={mode: _estimate(s.accuracy()) for mode, s in _rungs(counted, about).items()},
        )
    return found


def _white_box(entry: Entry, counted: Mapping[str, Score]) -> Accuracies | None:
    """Return the accuracies (N,) under the worst of all sets that see through the purifier.

    As in the headline, the noise that selects the worst set of an image does not score it.
    """
    white = entry.white_box_rungs()
    sets = {n: s for n, s in counted.items() if n == CLEAN or rung_of(n) in white}
    return worst(sets, list(sets))[1].accuracy() if len(sets) > 1 else None


def _attacks(
    entry: Entry, result: Result, plan: Plan, classes: int
) -> dict[str, metrics.AttackScore]:
    return {
        name: metrics.AttackScore(
            **dict(_estimate(score.accuracy())),
            agreement=float(result.agreed[name].mean()),
            label=entry.attacks[name].label(attack_of(name), classes),
            region=entry.attacks[name].region(plan.threat),
            bounded=entry.attacks[name].inside(plan.threat),
            median_l2=float(np.median(result.distance[name])),
            inside=float(result.inside[name].mean()),
        )
        for name, score in result.scores.items()
        if name != CLEAN
    }


def _radius_curve(findings: Sequence[Finding]) -> list[metrics.RadiusPoint]:
    """Return the scores of the probe at growing radii; none where there was no probe."""
    for finding in findings:
        if finding.name == "radius_pays":
            accuracies = dict(finding.figures)
            n = int(accuracies.pop("n"))
            points = []
            for radius, accuracy in sorted((float(key), one) for key, one in accuracies.items()):
                low, high = wilson(accuracy, n)
                points.append(
                    metrics.RadiusPoint(radius=radius, accuracy=accuracy, low=low, high=high, n=n)
                )
            return points
    return []


def _recorded(finding: Finding) -> metrics.RecordedFinding:
    check, _, about = finding.name.partition("/")
    return metrics.RecordedFinding(**dict(finding), check=check, about=about)


def _not_tried(baselines: Sequence[Entry], tried: Collection[str]) -> list[Finding]:
    """Warn of baselines whose examples `transfer_attack` could not try."""
    return [
        Finding(
            name=f"transfer_attack/{one.name}",
            level="warn",
            passed=False,
            detail=f"not tried: the baseline {one.name} has no sound set of a bounded attack",
        )
        for one in baselines
        if one.name not in tried
    ]


def _judged(
    entry: Entry,
    result: Result,
    rungs: Mapping[str, Score],
    counted: Mapping[str, Score],
    carried: Score,
    plan: Plan,
    classes: int,
    void: Collection[str],
) -> list[Finding]:
    """Check the counts of an entry against each other."""
    by_rung = _attacks_within(entry, counted, plan, plan.threat.label)
    full = {
        name: (entry.attacks[name].kind, score.accuracy())
        for name, score in counted.items()
        if rung_of(name) == "full" and entry.attacks[name].inside(plan.threat)
    }
    stochastic = entry.subject.stochastic()
    findings = [*order_of_strength(full, stochastic), *white_is_strongest(full)]
    for name, answers in result.answers.items():
        score = result.scores[name]
        findings.append(same_answer(name, answers, score.score, score.draws, entry.subject.rough()))
    _, stored = worst(counted, list(counted)[::-1])
    findings.append(rounding(stored.accuracy(), result.rounded.accuracy()))
    added = {}
    for name, score in result.transferred.items():
        candidates = {**counted, f"of {name}": score}
        added[name] = worst_of_all(candidates, list(candidates))[1].accuracy()
    tried = transfer_attack(carried.accuracy(), added)
    findings += [*tried, *_not_tried(other_baselines(entry, plan), added)]
    singles = {name: score.accuracy() for name, score in counted.items()}
    findings.append(selection(carried.accuracy(), singles))
    draws = plan.scoring
    findings.append(draws_enough(stochastic, draws.select_draws, draws.score_draws))
    accuracies: dict[str, Accuracies] = {mode: score.accuracy() for mode, score in rungs.items()}
    stand_ins = {str(mode): one for mode, one in accuracies.items() if mode in STAND_INS}
    known = entry.subject.stand_ins()
    findings += stand_ins_tried(known, stand_ins, accuracies.get("full"))
    claimed = _claim(entry, _white_box(entry, counted), accuracies, by_rung, classes, void)
    seen = {mode: attacks for mode, attacks in by_rung.items() if mode not in UNASKED}
    differentiable = entry.subject.differentiable()
    claimed.append(without_gradients(seen, result.findings, stochastic, differentiable))
    findings += map(excused, claimed) if plan.quick else claimed
    if entry.subject.bare and _objective(entry) == STANDARD_TRAINED:
        findings.append(undefended_falls(float(carried.accuracy().mean()), plan.threat))
    return findings


def _claim(
    entry: Entry, white_box: Accuracies | None, accuracies: Mapping[str, Accuracies],
    by_rung: Mapping[str, Sequence[Attack]], classes: int, void: Collection[str],
) -> list[Finding]:  # fmt: skip
    """Check that the score rests on attacks that see through the purifier, on rungs not void.

    `accuracies` are those of the rungs, `by_rung` their bounded attacks.
    """
    findings = []
    if white_box is not None:
        white = (*entry.white_box_rungs(), "fixed_noise")
        others = {mode: one for mode, one in accuracies.items() if mode not in white}
        findings += full_is_strongest(white_box, others)
    if any(mode in accuracies and mode not in void for mode in entry.white_box_rungs()):
        known, differentiable = entry.subject.stand_ins(), entry.subject.differentiable()
        findings.append(strong_enough(by_rung, known, differentiable, classes, void))
    else:
        detail = "no attack followed a right gradient of this defense, or of a stand-in for it"
        findings.append(Finding(name="full_rung", level="block", passed=False, detail=detail))
    return findings


def _attacks_within(
    entry: Entry, counted: Collection[str], plan: Plan, label: str
) -> dict[str, list[Attack]]:
    """Return the attacks of every rung that stay inside the threat with this label."""
    attacks: dict[str, list[Attack]] = {}
    for name, attack in entry.attacks.items():
        if name in counted and attack.region(plan.threat) == label:
            attacks.setdefault(rung_of(name), []).append(attack)
    return attacks


def _objective(entry: Entry) -> str | None:
    """Return the kind of objective that the classifier was trained by, None where it is unknown."""
    objective: dict[str, str] = read_card(entry.subject.classifier).provenance.get("objective", {})
    return objective.get("kind")
