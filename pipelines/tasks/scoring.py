"""Counting how often an entry is right on one shard of the test images; runs in workers.

A worker process makes many of these calls, for several shards and entries. What a defense remembers
of its questions, in itself or in its modules, must not help it: `score_sets` is called for all
entries before `score_shard`, which is the first to ask about clean images.

`tasks.summary` turns these counts into scores and judges them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from components.attacks import L2, SLACK, Attack, Crafted, Linf
from components.attacks.ladder import REPLAYED
from components.attacks.sets import read_crafted
from components.checks.sets import Answers, agreement, effort, in_levels, stored_probes, stored_set
from components.data import image_set, shards
from components.data.draws import Role
from components.data.image_set import ImageSet
from components.data.shards import read_manifest
from components.evaluation.counting import CLEAN, Effort, Score, count_score, count_sets, worst
from components.evaluation.detection import DetectorScores, detector_scores
from components.evaluation.detection import merge as merge_detector_scores
from components.models.accuracy import Counts, count_correct
from components.models.checkpoints import load, read_card
from components.models.defense import STAND_INS, Defense, Mode
from components.models.identity import state_digest
from components.probes import Finding, required
from components.probes.models import recorded_accuracy, unchanged
from pipelines.config.sections import Checks, Scoring
from pipelines.tasks import probing
from pipelines.tasks.metrics import EntryRole, attack_of, rung_of
from pipelines.tasks.panels import Panel, render
from pipelines.tasks.subject import Subject


@dataclass(frozen=True)
class Entry:
    """One scored baseline, defense or control: its models, its probes, its sets by rung/attack."""

    name: str
    role: EntryRole
    subject: Subject
    probes: Path
    sets: Mapping[str, Path]

    def white_box_rungs(self) -> tuple[str, ...]:
        """Return the rungs on which an attack sees through the purifier.

        Where the purifier has no gradient, these are its stand-ins and the identity.
        """
        exact = "full" if self.subject.differentiable() else "bpda"
        return (exact, *STAND_INS)


@dataclass(frozen=True)
class Plan:
    """What all entries are scored on, and how."""

    threat: Linf | L2
    attacks: Mapping[str, Attack]
    scoring: Scoring
    checks: Checks
    seed: int
    batch: int
    val: Path
    test: Path
    unseen: Path
    surrogate: Path | None

    def attack(self, name: str) -> Attack:
        """Return the attack behind rung/attack."""
        return self.attacks[attack_of(name)]

    def bounded(self, name: str) -> bool:
        """Whether the attack behind rung/attack stays inside the primary threat by itself."""
        return self.attack(name).bounded


@dataclass(frozen=True)
class Attacked:
    """What was counted before any clean image: `scores` by rung/attack of the sets that count.

    `findings` are about all sets, `state` is whether the scoring changed the defense.
    """

    scores: Mapping[str, Score]
    findings: list[Finding]
    state: Finding


@dataclass(frozen=True)
class Result:
    """What was counted of one entry.

    `scores` by rung/attack and `clean`; `inside` (N,) bool and `distance` (N,) L2 of every set;
    `unseen` are right answers (clean, under the worst examples) of a classifier that played no
    part in training, behind the same purifier; `rounded` those on the worst examples rounded to 8
    bits, among equal ones the last; `detector` are the detector scores, None where the purifier is
    no detector; `panels` are pictures of every set; `efforts` are the passes that white-box sets
    cost whose attack stops at success; `answers` are what attacks were answered about the sets that
    they made of this entry.
    """

    scores: Mapping[str, Score]
    inside: Mapping[str, npt.NDArray[np.bool_]]
    distance: Mapping[str, npt.NDArray[np.float64]]
    findings: list[Finding]
    unseen: tuple[Score, Score]
    rounded: Score
    detector: DetectorScores | None
    panels: Mapping[str, Panel]
    efforts: Mapping[str, Effort]
    answers: Mapping[str, Answers]

    def within_threat(self) -> dict[str, Score]:
        """Return the scores by the rule of the headline: an example outside the ball is clean."""
        return within_threat(self.scores, self.inside)


def probes_of(entry: Entry, plan: Plan) -> list[Finding]:
    """Return the findings of the probes of an entry; block where they are not its own or not all.

    The modes are those in which it was attacked.
    """
    stored = probing.read(entry.probes)
    attacks = {name: plan.attack(name) for name in entry.sets}
    now = probing.facts(
        entry.subject, attacks, entry.sets, plan.threat, plan.checks, plan.seed, plan.batch,
        plan.val, plan.test,
    )  # fmt: skip
    rungs = dict.fromkeys(rung_of(name) for name in entry.sets)
    modes = [cast(Mode, rung) for rung in rungs if rung not in REPLAYED]
    names = required(
        modes, entry.subject.stochastic(), entry.subject.differentiable(), plan.checks.thorough
    )
    facts = {key: (_plain(stored.facts.get(key)), _plain(value)) for key, value in now.items()}
    found = [finding.name for finding in stored.findings]
    return [*stored.findings, *stored_probes([*names, "state_unchanged"], found, facts)]


def score_sets(entry: Entry, plan: Plan, shard: int, device: str) -> Attacked:
    """Score one shard of the sets of an entry, and check the sets whole; runs in a worker.

    The defense is newly loaded: the sets are the first that it is asked about.
    """
    torch.set_num_threads(1)
    defense = entry.subject.defense(device)
    before = state_digest(defense)
    images = image_set.read(plan.test)
    rows = _rows(plan.test, shard)
    crafted, findings = _read_sets(entry, plan, images)
    scores = count_sets(
        defense, {name: one.images[rows] for name, one in crafted.items()}, rows,
        images.labels[rows], images.ids[rows], plan.seed, plan.scoring.select_draws,
        plan.scoring.score_draws, plan.batch,
    )  # fmt: skip
    state = unchanged(before, state_digest(defense), defense.training)
    return Attacked(scores, findings, state)


def score_shard(entry: Entry, plan: Plan, shard: int, counted: Attacked, device: str) -> Result:
    """Score one entry on one shard of the test set, after its sets; runs in a worker.

    The defense is loaded anew, and is asked about clean images first.
    """
    torch.set_num_threads(1)
    defense = entry.subject.defense(device)
    before = state_digest(defense)
    rows = _rows(plan.test, shard)
    some = image_set.read(plan.test)[rows]
    pixels = some.pixels()
    mine = {name: read_crafted(entry.sets[name]).pick(rows) for name in counted.scores}
    sets = {CLEAN: pixels, **{name: one.images for name, one in mine.items()}}
    scores = {CLEAN: _clean(defense, some, plan), **counted.scores}
    reach = {name: plan.threat.distance(x, pixels).numpy() for name, x in sets.items()}
    inside = {name: far <= plan.threat.eps + SLACK for name, far in reach.items()}
    l2 = L2(norm="l2", eps_l2=1.0)
    distance = {name: l2.distance(x, pixels).numpy() for name, x in sets.items()}
    chosen, _ = worst(within_threat(scores, inside), list(scores))
    attacked = torch.stack([sets[name][row] for row, name in enumerate(chosen)])
    # Of an image that withstands, an example is rounded; its clean image is at whole levels.
    chosen, _ = worst(within_threat(scores, inside), list(scores)[::-1])
    last = torch.stack(
        [(sets[name] if inside[name][row] else pixels)[row] for row, name in enumerate(chosen)]
    )
    other = Defense(load(plan.unseen, device), defense.purifier).freeze()
    unseen = (
        _once(other, pixels, some, plan, "clean"),
        _once(other, attacked, some, plan, "score"),
    )
    rounded = _once(defense, in_levels(last, pixels, plan.threat), some, plan, "score")
    val = _subset(image_set.read(plan.val), shard, len(read_manifest(plan.test)["files"]))
    detector = detector_scores(
        defense, sets, some.ids, val.pixels(), val.ids, plan.seed, plan.batch
    )
    state = unchanged(before, state_digest(defense), defense.training)
    findings = [
        *counted.findings,
        _recorded_accuracy(entry, plan),
        state if counted.state.passed else counted.state,
    ]
    panels = _panels(defense, some, sets, scores[CLEAN], plan) if shard == 0 else {}
    spent = {
        name: Effort.of(one)
        for name, one in mine.items()
        if _stops_in_white_box(name, entry, plan) and not defense.stochastic
    }
    answers = {
        name: Answers.of(one, defense.stochastic)
        for name, one in mine.items()
        if rung_of(name) not in REPLAYED
    }
    return Result(
        scores, inside, distance, findings, unseen, rounded, detector, panels, spent, answers
    )


def merge(results: Sequence[Result]) -> Result:
    """Join the results of all shards of one entry; a check failed if it failed on any shard."""
    first = results[0]
    return Result(
        scores={name: _joined([one.scores[name] for one in results]) for name in first.scores},
        inside={n: np.concatenate([one.inside[n] for one in results]) for n in first.inside},
        distance={n: np.concatenate([one.distance[n] for one in results]) for n in first.distance},
        findings=[
            next((f for f in same if not f.passed), same[0])
            for same in zip(*(one.findings for one in results), strict=True)
        ],
        unseen=(
            _joined([one.unseen[0] for one in results]),
            _joined([one.unseen[1] for one in results]),
        ),
        rounded=_joined([one.rounded for one in results]),
        detector=merge_detector_scores([one.detector for one in results]),
        panels=first.panels,
        efforts={
            name: Effort(
                np.concatenate([one.efforts[name].passes for one in results]),
                np.concatenate([one.efforts[name].fooled for one in results]),
            )
            for name in first.efforts
        },
        answers={n: Answers.joined([one.answers[n] for one in results]) for n in first.answers},
    )


def within_threat(
    scores: Mapping[str, Score], inside: Mapping[str, npt.NDArray[np.bool_]]
) -> dict[str, Score]:
    """Return scores by the rule of the headline: outside the ball, an example counts as clean."""
    clean = scores[CLEAN]

    def masked(name: str, score: Score) -> Score:
        if name == CLEAN:
            return score
        here = inside[name]
        select: Counts = np.where(here, score.select, clean.select)
        return Score(score.draws, select, np.where(here, score.score, clean.score))

    return {name: masked(name, score) for name, score in scores.items()}


def _joined(scores: Sequence[Score]) -> Score:
    select = np.concatenate([score.select for score in scores])
    return Score(scores[0].draws, select, np.concatenate([score.score for score in scores]))


def _rows(folder: Path, shard: int) -> Tensor:
    """Return the positions of a shard within its whole set."""
    sizes = [int(file["rows"]) for file in read_manifest(folder)["files"]]
    return torch.arange(sum(sizes[:shard]), sum(sizes[: shard + 1]))


def _subset(images: ImageSet, shard: int, shards: int) -> ImageSet:
    """Return every `shards`-th image, from position `shard` on: each shard takes other images.

    Some get none if there are more shards than images.
    """
    return images[torch.arange(len(images))[shard::shards]]


def _read_sets(
    entry: Entry, plan: Plan, images: ImageSet
) -> tuple[dict[str, Crafted], list[Finding]]:
    """Read and check all sets of an entry; return those that may be counted, and all findings."""
    sound = {}
    findings: list[Finding] = []
    for name, folder in entry.sets.items():
        crafted = read_crafted(folder)
        threat = plan.threat if plan.bounded(name) else None
        checks = stored_set(name, crafted.images, crafted.ids, crafted.labels, images, threat)
        checks.append(_provenance(name, folder, entry, plan))
        random = entry.subject.stochastic() and rung_of(name) not in (*REPLAYED, "fixed_noise")
        classes = len(images.class_names)
        findings += [*checks, effort(name, plan.attack(name), crafted, classes, random)]
        if all(finding.passed for finding in checks):
            sound[name] = crafted
    return sound, findings


def _stops_in_white_box(name: str, entry: Entry, plan: Plan) -> bool:
    """Whether the passes of a set show when a white-box attack fooled an image and stopped.

    Against a random defense no attack stops: one draw is no success.
    """
    white_box = rung_of(name) in entry.white_box_rungs()
    return white_box and plan.bounded(name) and plan.attack(name).stops_early()


def _panels(
    defense: Defense, images: ImageSet, sets: Mapping[str, Tensor], clean: Score, plan: Plan
) -> dict[str, Panel]:
    """Picture the first images that the bare classifier gets right, and the defense mostly."""
    bare = Defense(defense.classifier, None)
    right = _once(bare, images.pixels(), images, plan, "clean").score > 0
    rows = torch.from_numpy((right & (2 * clean.score > clean.draws)).nonzero()[0])
    rows = rows[: plan.scoring.shown]
    crafted = {name: x[rows] for name, x in sets.items() if name != CLEAN}
    return render(defense, images[rows], crafted, plan.seed, plan.batch)


def _clean(defense: Defense, images: ImageSet, plan: Plan) -> Score:
    return count_score(
        defense, images.pixels(), images.labels, images.ids, plan.seed, "clean",
        plan.scoring.select_draws, plan.scoring.score_draws, plan.batch,
    )  # fmt: skip


def _once(defense: Defense, x: Tensor, images: ImageSet, plan: Plan, role: Role) -> Score:
    """Count under one role only, for images among which nothing is selected."""
    draws = plan.scoring.score_draws if defense.stochastic else 1
    counted = count_correct(
        defense, x, images.labels, images.ids, plan.seed, role, draws, plan.batch
    )
    return Score(draws, counted, counted)


def _recorded_accuracy(entry: Entry, plan: Plan) -> Finding:
    then: dict[str, int] = read_card(entry.subject.classifier).provenance["validation"]
    val = image_set.read(plan.val)
    bare = Defense(load(entry.subject.classifier), None).freeze()
    now = count_correct(
        bare, val.pixels(), val.labels, val.ids, plan.seed, "clean", 1, plan.batch
    ).sum()
    return recorded_accuracy(int(now), then["correct"], then["n"])


def _provenance(name: str, folder: Path, entry: Entry, plan: Plan) -> Finding:
    facts = read_manifest(folder)
    now = entry.subject.facts()
    mode = rung_of(name)
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
    # Sets from before there were inferences were crafted without one.
    facts = {"inference": "none", **facts}
    pairs = {key: (facts.get(key), now) for key, now in expected.items()}
    return agreement(name, {key: (_plain(a), _plain(b)) for key, (a, b) in pairs.items()})


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
