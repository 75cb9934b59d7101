"""Scoring one defense: read its sets, count right answers, judge them, and sum up.

Everything in a summary is counted from `Result`; the words come with the figures they are about.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from components.attacks import L2, SLACK, Attack, Linf
from components.attacks.ladder import MODES, REPLAYED
from components.attacks.sets import read_crafted
from components.checks.scores import (
    Illusion,
    draws_enough,
    full_is_strongest,
    illusions,
    order_of_strength,
    selection,
    stand_ins_tried,
    strong_enough,
    undefended_falls,
    white_is_strongest,
)
from components.checks.sets import agreement, effort, rounding, stored_set
from components.data import image_set, shards
from components.data.draws import Role
from components.data.image_set import ImageSet
from components.data.shards import read_manifest
from components.evaluation.counting import (
    CLEAN,
    Effort,
    Score,
    count_score,
    majority_of,
    per_class,
    worst,
    worst_of,
)
from components.evaluation.detection import Watched, detection, watch
from components.evaluation.detection import merge as merge_watched
from components.models.accuracy import Counts, count_correct
from components.models.checkpoints import load, read_card, state_digest
from components.models.defense import STAND_INS, Defense
from components.probes import Finding
from components.probes.contract import Accuracies
from components.probes.models import recorded_accuracy, unchanged
from components.probes.statistics import summarise
from pipelines.config.sections import Scoring
from pipelines.tasks.panels import Panel, look
from pipelines.tasks.subject import Subject

TRIES = 10
CERTIFICATE = ("gradient_present", "gradient_correct", "eot_agreement")


@dataclass(frozen=True)
class Entry:
    """One scored defense: who it is, its probes, and every set it faces, by mode/attack."""

    name: str
    role: str
    subject: Subject
    probes: Path
    sets: Mapping[str, Path]


@dataclass(frozen=True)
class Plan:
    """What all entries are scored on, and how."""

    threat: Linf | L2
    attacks: Mapping[str, Attack]
    scoring: Scoring
    seed: int
    batch: int
    val: Path
    test: Path
    unseen: Path
    surrogate: Path | None

    def attack(self, name: str) -> Attack:
        """Return the attack behind mode/attack."""
        return self.attacks[name.rpartition("/")[2]]

    def bounded(self, name: str) -> bool:
        """Whether the attack behind mode/attack stays inside the primary threat by itself."""
        return self.attack(name).bounded


@dataclass(frozen=True)
class Result:
    """What was counted of one entry.

    `scores` by mode/attack and `clean`; `inside` (N,) bool and `distance` (N,) L2 of every set;
    `unseen` are right answers (clean, under the worst examples) of a classifier that played no
    part in training, behind the same purifier; `rounded` those on the worst examples rounded to 8
    bits; `watched` is what the purifier makes of them as a detector, if it is one; `panels` are
    pictures of every set, `efforts` what those cost that see through and stop at success.
    """

    scores: Mapping[str, Score]
    inside: Mapping[str, npt.NDArray[np.bool_]]
    distance: Mapping[str, npt.NDArray[np.float64]]
    findings: list[Finding]
    unseen: tuple[Score, Score]
    rounded: Score
    watched: Watched | None
    panels: Mapping[str, Panel]
    efforts: Mapping[str, Effort]


def score_shard(entry: Entry, plan: Plan, part: int, device: str) -> Result:
    """Score one entry on one part of the test set, and check its sets whole; runs in a worker."""
    torch.set_num_threads(1)
    defense = entry.subject.defense(device)
    before = state_digest(defense)
    images = image_set.read(plan.test)
    rows = _rows(plan.test, part)
    stored, efforts, findings = _stored(entry, plan, images)
    some, pixels = images[rows], images.pixels()[rows]
    sets = {name: x[rows] for name, x in stored.items()}
    scores = {name: _score(defense, x, some, plan, name) for name, x in sets.items()}
    reach = {name: plan.threat.distance(x, pixels).numpy() for name, x in sets.items()}
    inside = {name: far <= plan.threat.eps + SLACK for name, far in reach.items()}
    l2 = L2(norm="l2", eps_l2=1.0)
    distance = {name: l2.distance(x, pixels).numpy() for name, x in sets.items()}
    chosen, _ = worst(_counted(scores, inside), list(scores))
    attacked = torch.stack([sets[name][row] for row, name in enumerate(chosen)])
    unseen = Defense(load(plan.unseen, device), defense.purifier).freeze()
    behind = (
        _once(unseen, pixels, some, plan, "clean"),
        _once(unseen, attacked, some, plan, "score"),
    )
    rounded = _once(defense, (attacked * 255).round() / 255, some, plan, "score")
    known = _share(image_set.read(plan.val), part, len(read_manifest(plan.test)["files"]))
    watched = watch(defense, sets, some.ids, known.pixels(), known.ids, plan.seed, plan.batch)
    findings += _recorded(entry, plan)
    findings.append(unchanged(before, state_digest(defense), defense.training))
    panels = _pictures(defense, some, sets, scores[CLEAN], plan) if part == 0 else {}
    spent = {
        name: Effort(one.passes[rows.numpy()], one.fooled[rows.numpy()])
        for name, one in efforts.items()
        if _spends(name, entry, plan) and not defense.stochastic
    }
    return Result(scores, inside, distance, findings, behind, rounded, watched, panels, spent)


def merge(parts: Sequence[Result]) -> Result:
    """Put the parts of one entry together; a check failed where it failed in any part."""

    def together(scores: Sequence[Score]) -> Score:
        select = np.concatenate([score.select for score in scores])
        return Score(scores[0].draws, select, np.concatenate([score.score for score in scores]))

    first = parts[0]
    return Result(
        scores={name: together([part.scores[name] for part in parts]) for name in first.scores},
        inside={n: np.concatenate([part.inside[n] for part in parts]) for n in first.inside},
        distance={n: np.concatenate([part.distance[n] for part in parts]) for n in first.distance},
        findings=[
            next((f for f in same if not f.passed), same[0])
            for same in zip(*(part.findings for part in parts), strict=True)
        ],
        unseen=(
            together([part.unseen[0] for part in parts]),
            together([part.unseen[1] for part in parts]),
        ),
        rounded=together([part.rounded for part in parts]),
        watched=merge_watched([part.watched for part in parts]),
        panels=first.panels,
        efforts={name: _together([part.efforts[name] for part in parts]) for name in first.efforts},
    )


def _pictures(
    defense: Defense, images: ImageSet, sets: Mapping[str, Tensor], clean: Score, plan: Plan
) -> dict[str, Panel]:
    """Picture the first images that the bare classifier gets right, and the defense mostly."""
    bare = Defense(defense.classifier, None)
    right = _once(bare, images.pixels(), images, plan, "clean").score > 0
    rows = torch.from_numpy((right & (2 * clean.score > clean.draws)).nonzero()[0])
    rows = rows[: plan.scoring.shown]
    crafted = {name: x[rows] for name, x in sets.items() if name != CLEAN}
    return look(defense, images[rows], crafted, plan.seed, plan.batch)


def _together(efforts: Sequence[Effort]) -> Effort:
    passes = np.concatenate([effort.passes for effort in efforts])
    return Effort(passes, np.concatenate([effort.fooled for effort in efforts]))


def _spends(name: str, entry: Entry, plan: Plan) -> bool:
    """Say whether the passes of a set tell when its images were fooled, and by seeing through.

    Against a random defense no attack stops: one draw is no success.
    """
    seeing = name.partition("/")[0] in _white(entry)
    return seeing and plan.bounded(name) and plan.attack(name).stops()


def _rows(folder: Path, part: int) -> Tensor:
    """Return the positions of a part within its whole set."""
    sizes = [int(file["rows"]) for file in read_manifest(folder)["files"]]
    return torch.arange(sum(sizes[:part]), sum(sizes[: part + 1]))


def _share(images: ImageSet, part: int, parts: int) -> ImageSet:
    """Return this part's share of images that every part has a hand in."""
    return images[torch.arange(part, len(images), parts)]


def _stored(
    entry: Entry, plan: Plan, images: ImageSet
) -> tuple[dict[str, Tensor], dict[str, Effort], list[Finding]]:
    """Read the clean images and every set that may be counted, what each of these cost, and say
    what was checked.
    """
    stored, efforts = {CLEAN: images.pixels()}, {}
    findings = [Finding(**finding) for finding in json.loads(entry.probes.read_text())]
    for name, folder in entry.sets.items():
        crafted = read_crafted(folder)
        threat = plan.threat if plan.bounded(name) else None
        judged = stored_set(name, crafted.images, crafted.ids, crafted.labels, images, threat)
        judged.append(_provenance(name, folder, entry, plan))
        findings += [*judged, effort(name, plan.attack(name), crafted)]
        if all(finding.passed for finding in judged):
            stored[name], efforts[name] = crafted.images, Effort.of(crafted)
    return stored, efforts, findings


def headline(result: Result) -> tuple[list[str], Score]:
    """Return which entry of A carries each image, and how often it is then right."""
    counted = _counted(result.scores, result.inside)
    return worst(counted, list(counted))


def summary(entry: Entry, result: Result, plan: Plan, images: ImageSet) -> dict[str, Any]:
    """Sum up one entry on the test images for metrics.json."""
    counted = _counted(result.scores, result.inside)
    chosen, carried = headline(result)
    rungs = {
        mode: worst(_rung(counted, mode), list(_rung(counted, mode)))[1]
        for mode in MODES
        if any(name.startswith(f"{mode}/") for name in counted)
    }
    white_box = _white_box(entry, counted)
    findings = [*result.findings, *_judged(entry, result, rungs, counted, carried, plan)]
    failed = [f.name for f in findings if not f.passed and f.level == "block"]
    clean = result.scores[CLEAN]
    return {
        "role": entry.role,
        "stochastic": bool(clean.draws > 1),
        "clean": summarise(clean.accuracy()),
        "headline": {**summarise(carried.accuracy()), "upper_bound": bool(failed)},
        "per_class": per_class(carried.accuracy(), images.labels.numpy(), images.class_names),
        "carried_by": {n: chosen.count(n) for n in dict.fromkeys(chosen)},
        "rungs": {mode: summarise(score.accuracy()) for mode, score in rungs.items()},
        "white_box": None if white_box is None else summarise(white_box),
        "attacks": {
            name: {
                **summarise(score.accuracy()),
                "bounded": plan.bounded(name),
                "median_l2": float(np.median(result.distance[name])),
                "inside": float(result.inside[name].mean()),
            }
            for name, score in result.scores.items()
            if name != CLEAN
        },
        "detection": detection(result.watched, result.inside, counted) if result.watched else None,
        "retries": {
            "worst_of_10": summarise(worst_of(carried, TRIES)),
            "majority_of_10": summarise(majority_of(carried, TRIES)),
            "clean_worst_of_10": summarise(worst_of(clean, TRIES)),
            "clean_majority_of_10": summarise(majority_of(clean, TRIES)),
        },
        "unseen_classifier": {
            "clean": summarise(result.unseen[0].accuracy()),
            "worst_examples": summarise(result.unseen[1].accuracy()),
        },
        "illusions": [
            f"{illusion.rung}: {illusion.seen:.1%}, {illusion.left:.1%} in white box"
            for illusion in _illusions(entry, rungs, white_box)
        ],
        "checks": {
            "blocking_failed": failed,
            "warnings": [f.name for f in findings if not f.passed and f.level == "warn"],
            "findings": [f.model_dump() for f in findings],
        },
        "certificate": {
            f.name: f.figures for f in findings if f.name.partition("/")[0] in CERTIFICATE
        },
    }


def _score(defense: Defense, x: Tensor, images: ImageSet, plan: Plan, name: str) -> Score:
    return count_score(
        defense, x, images.labels, images.ids, plan.seed, "clean" if name == CLEAN else "score",
        plan.scoring.select_draws, plan.scoring.score_draws, plan.batch,
    )  # fmt: skip


def _once(defense: Defense, x: Tensor, images: ImageSet, plan: Plan, role: Role) -> Score:
    """Count under one role alone: nothing is chosen by it."""
    draws = plan.scoring.score_draws if defense.stochastic else 1
    counted = count_correct(
        defense, x, images.labels, images.ids, plan.seed, role, draws, plan.batch
    )
    return Score(draws, counted, counted)


def _counted(
    scores: Mapping[str, Score], inside: Mapping[str, npt.NDArray[np.bool_]]
) -> dict[str, Score]:
    """Return scores as the headline sees them: outside the ball, an example counts as clean."""
    clean = scores[CLEAN]

    def masked(name: str, score: Score) -> Score:
        if name == CLEAN:
            return score
        here = inside[name]
        select: Counts = np.where(here, score.select, clean.select)
        return Score(score.draws, select, np.where(here, score.score, clean.score))

    return {name: masked(name, score) for name, score in scores.items()}


def _rung(counted: Mapping[str, Score], mode: str) -> dict[str, Score]:
    return {n: s for n, s in counted.items() if n == CLEAN or n.startswith(f"{mode}/")}


def _judged(
    entry: Entry,
    result: Result,
    rungs: Mapping[str, Score],
    counted: Mapping[str, Score],
    carried: Score,
    plan: Plan,
) -> list[Finding]:
    full = {
        name: (plan.attack(name).kind, score.accuracy())
        for name, score in counted.items()
        if name.startswith("full/") and plan.bounded(name)
    }
    white, seeing = _white(entry), _white_box(entry, counted)
    stochastic = carried.draws > 1
    findings = [*order_of_strength(full, stochastic), *white_is_strongest(full)]
    stored, rounded = (round(float(s.accuracy().sum())) for s in (carried, result.rounded))
    findings.append(rounding(stored, rounded, len(carried.score)))
    singles = {name: score.accuracy() for name, score in counted.items()}
    findings.append(selection(carried.accuracy(), singles))
    draws = plan.scoring
    findings.append(draws_enough(stochastic, draws.select_draws, draws.score_draws))
    shares: dict[str, Accuracies] = {mode: score.accuracy() for mode, score in rungs.items()}
    ours = {str(mode): share for mode, share in shares.items() if mode in STAND_INS}
    known = entry.subject.stand_ins()
    findings += stand_ins_tried(known, ours, shares.get("full"))
    if seeing is not None:
        others = {m: s for m, s in shares.items() if m not in (*white, "fixed_noise")}
        findings += full_is_strongest(seeing, others)
        through: dict[str, list[Attack]] = {}
        for name in counted:
            if name != CLEAN and plan.bounded(name):
                through.setdefault(name.partition("/")[0], []).append(plan.attack(name))
        findings.append(strong_enough(through, known, entry.subject.differentiable()))
    else:
        detail = "no attack followed the gradient of this defense, or a stand-in for it"
        findings.append(Finding(name="full_rung", level="block", passed=False, detail=detail))
    if entry.subject.bare and _standard_trained(entry.subject.classifier):
        findings.append(undefended_falls(float(carried.accuracy().mean()), plan.threat))
    return findings


def _white(entry: Entry) -> tuple[str, ...]:
    """Return the rungs on which an attack sees through the purifier.

    One without a gradient is seen through by its stand-ins, and by the identity.
    """
    seeing = ("full", *STAND_INS)
    return seeing if entry.subject.differentiable() else (*STAND_INS, "bpda")


def _standard_trained(classifier: Path) -> bool:
    objective: dict[str, str] = read_card(classifier).provenance["objective"]
    return objective["kind"] == "classification"


def _white_box(entry: Entry, counted: Mapping[str, Score]) -> Accuracies | None:
    """Return the shares right under the worst of all sets that see through the purifier (N,).

    As in the headline, what selects the worst of an image does not score it.
    """
    white = _white(entry)
    seeing = {n: s for n, s in counted.items() if n == CLEAN or n.partition("/")[0] in white}
    return worst(seeing, list(seeing))[1].accuracy() if len(seeing) > 1 else None


def _illusions(entry: Entry, rungs: Mapping[str, Score], left: Accuracies | None) -> list[Illusion]:
    if left is None:
        return []
    blind = [m for m in ("transfer", "classifier", "bpda") if m not in _white(entry)]
    return illusions({m: rungs[m].accuracy() for m in blind if m in rungs}, left)


def _recorded(entry: Entry, plan: Plan) -> list[Finding]:
    then: dict[str, int] = read_card(entry.subject.classifier).provenance["validation"]
    val = image_set.read(plan.val)
    bare = Defense(load(entry.subject.classifier), None).freeze()
    now = count_correct(
        bare, val.pixels(), val.labels, val.ids, plan.seed, "clean", 1, plan.batch
    ).sum()
    return [recorded_accuracy(int(now), then["correct"], then["n"])]


def _provenance(name: str, folder: Path, entry: Entry, plan: Plan) -> Finding:
    facts = read_manifest(folder)
    now = entry.subject.facts()
    mode = name.partition("/")[0]
    if mode in REPLAYED:
        bare = plan.surrogate if mode == "transfer" else entry.subject.classifier
        assert bare is not None, "params.yaml asks for transfer without a surrogate"
        now = Subject(bare).facts()
    threat = plan.threat.model_dump(mode="json") if plan.bounded(name) else None
    expected = {
        **now,
        "data": shards.fingerprint(plan.test),
        "mode": "full" if mode in REPLAYED else mode,
        "attack": plan.attack(name).model_dump(mode="json"),
        "threat": threat,
        "seed": plan.seed,
    }
    # A set of before there were inferences was crafted without one.
    facts = {"inference": "none", **facts}
    pairs = {key: (facts.get(key), now) for key, now in expected.items()}
    return agreement(name, {key: (_plain(a), _plain(b)) for key, (a, b) in pairs.items()})


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
