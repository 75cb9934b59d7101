"""Counting how often an entry is right on one shard of the test images; runs in workers.

A worker process makes many of these calls, for several shards and entries. What a defense remembers
of its questions, in itself or in its modules, must not help it: `score_sets` is called for all
entries before `score_shard`, which is the first to ask about clean images, and `recount` comes
last. Each reads its own rows alone, of sets that were checked before (`tasks.entries`).

`tasks.summary` turns these counts into scores and judges them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from components.attacks import L2, SLACK, Linf
from components.attacks.contract import GIVEN, UNASKED
from components.checks.sets import Answers, in_levels
from components.data import image_set
from components.data.draws import Role
from components.data.image_set import ImageSet
from components.data.shards import shard_rows
from components.evaluation.counting import (
    CLEAN,
    Counted,
    Effort,
    Score,
    count_sets,
    count_with_detector,
    worst,
)
from components.evaluation.detection import DetectorScores, detector_scores
from components.evaluation.detection import merge as merge_detector_scores
from components.models.accuracy import Classes, Counts, count_correct, predict, times
from components.models.checkpoints import load, read_card
from components.models.defense import Defense
from components.models.identity import state_digest
from components.probes import Finding
from components.probes.contract import Accuracies, not_asked
from components.probes.models import recorded_accuracy, unchanged
from pipelines.tasks.entries import Entry, Plan, Sound, read_sound, worst_of_baselines
from pipelines.tasks.metrics import rung_of
from pipelines.tasks.panels import Panel, render

# Which examples (N,) bool of every set lie inside a threat.
Inside = Mapping[str, npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class Attacked:
    """What was counted before any clean image: by rung/attack, of the sets that count.

    `transferred` are the scores of `worst_of_baselines`. `state` is whether the scoring changed the
    defense.
    """

    counted: Mapping[str, Counted]
    transferred: Mapping[str, Score]
    state: Finding


@dataclass(frozen=True)
class Result:
    """What was counted of one entry.

    `scores` by rung/attack and `clean`; `agreed` (N,) by the same names is how often, of all draws,
    the prediction is that of the bare classifier on the clean image, of a random one the first;
    `inside` (N,) bool and `distance` (N,) L2 of every set; `elsewhere` says by the labels of
    further threats what `inside` says of the primary one; `unseen` are right answers (clean, under
    the worst examples) of a classifier that played no part in training, behind the same purifier,
    or None; `rounded` those on the worst examples rounded to 8 bits, among equal ones the last;
    `detector` are the detector scores, None where the purifier is no detector or no image fixes its
    thresholds; `panels` are pictures of every set; `efforts` are the passes that white-box sets
    cost whose attack stops at success; `answers` are what attacks were answered about the sets that
    they made of this entry; `transferred` are scores under the worst examples of other baselines,
    by their names, and count for the check `transfer_attack` alone.
    """

    scores: Mapping[str, Score]
    agreed: Mapping[str, Accuracies]
    inside: Inside
    elsewhere: Mapping[str, Inside]
    distance: Mapping[str, npt.NDArray[np.float64]]
    findings: list[Finding]
    unseen: tuple[Score, Score] | None
    rounded: Score
    detector: DetectorScores | None
    panels: Mapping[str, Panel]
    efforts: Mapping[str, Effort]
    answers: Mapping[str, Answers]
    transferred: Mapping[str, Score]

    def within_threat(self, label: str | None = None) -> dict[str, Score]:
        """Return the scores by the rule of the headline: an example outside the ball is clean.

        The ball is that of the primary threat, or of the one with this label.
        """
        return within_threat(self.scores, self.elsewhere[label] if label else self.inside)


def score_sets(entry: Entry, plan: Plan, sound: Sound, shard: int, device: str) -> Attacked:
    """Score one shard of the sound sets of an entry; runs in a worker.

    The defense is newly loaded: the sets are the first that it is asked about. The worst examples
    of other baselines take turns with them.
    """
    defense = entry.subject.defense(device)
    before = state_digest(defense)
    rows = shard_rows(plan.test)[shard]
    images = image_set.read(plan.test, rows)
    own = {name: one.images for name, one in read_sound(entry, sound, images, rows).items()}
    others = worst_of_baselines(entry, plan, sound, images, rows)
    # Names of sets have a slash, and names of baselines have none.
    counted = count_sets(
        defense, {**own, **others}, torch.tensor(rows), images.labels, images.ids, plan.seed,
        plan.scoring.select_draws, plan.scoring.score_draws, plan.batch,
    )  # fmt: skip
    state = unchanged(before, state_digest(defense), defense.training)
    return Attacked(
        {name: counted[name] for name in own}, {name: counted[name].score for name in others}, state
    )  # fmt: skip


def score_shard(
    entry: Entry, plan: Plan, sound: Sound, shard: int, attacked: Attacked, device: str
) -> Result:
    """Score one entry on one shard of the test set, after its sets; runs in a worker.

    The defense is loaded anew, and is asked about clean images first.
    """
    defense = entry.subject.defense(device)
    before = state_digest(defense)
    parts = shard_rows(plan.test)
    some = image_set.read(plan.test, parts[shard])
    pixels = some.pixels()
    mine = read_sound(entry, sound, some, parts[shard])
    sets = {CLEAN: pixels, **{name: one.images for name, one in mine.items()}}
    counted = {CLEAN: _clean(defense, some, plan), **attacked.counted}
    scores = {name: one.score for name, one in counted.items()}
    inside, elsewhere = _inside(sets, pixels, plan.threat), _elsewhere(entry, sets, pixels, plan)
    l2 = L2(norm="l2", eps_l2=1.0)
    distance = {name: l2.distance(x, pixels).numpy() for name, x in sets.items()}
    chosen, _ = worst(within_threat(scores, inside), list(scores))
    worst_images = torch.stack([sets[name][row] for row, name in enumerate(chosen)])
    # Of an image that withstands, an example is rounded; its clean image is at whole levels.
    chosen, _ = worst(within_threat(scores, inside), list(scores)[::-1])
    last = torch.stack(
        [(sets[name] if inside[name][row] else pixels)[row] for row, name in enumerate(chosen)]
    )
    unseen = _unseen(defense, some, worst_images, plan, device)
    rounded = _once(defense, in_levels(last, pixels, plan.threat), some, plan, "score")
    known = {name: one.detected for name, one in counted.items() if one.detected is not None}
    detector = None
    if plan.val:
        val = image_set.read(plan.val, _share(plan.val, shard, len(parts)))
        detector = detector_scores(
            defense, sets, some.ids, val.pixels(), val.ids, plan.seed, plan.batch, known
        )
    state = unchanged(before, state_digest(defense), defense.training)
    bare = Defense(defense.classifier, None).freeze()
    said = predict(bare, pixels, some.ids, plan.seed, "clean", 1, plan.batch)[0]
    agreed = {name: times(one.predicted, said) / one.score.draws for name, one in counted.items()}
    panels = _panels(defense, some, sets, scores[CLEAN], said, plan) if shard == 0 else {}
    spent = {
        name: Effort.of(one)
        for name, one in mine.items()
        if _stops_in_white_box(name, entry, plan) and not defense.stochastic
    }
    answers = {
        name: Answers.of(one, defense.stochastic)
        for name, one in mine.items()
        if rung_of(name) not in (*UNASKED, GIVEN)
    }
    findings = [state if attacked.state.passed else attacked.state]
    return Result(
        scores, agreed, inside, elsewhere, distance, findings, unseen, rounded, detector, panels,
        spent, answers, attacked.transferred,
    )  # fmt: skip


def recount(classifier: Path, plan: Plan, device: str) -> Finding | None:
    """Check that a bare classifier is as accurate as it was when trained; runs in a worker.

    None for a classifier whose card has no accuracy from its training.
    """
    then: dict[str, int] | None = read_card(classifier).provenance.get("validation")
    if then is None:
        return None
    if plan.val is None:
        return not_asked("recorded_accuracy", "it takes validation images")
    val = image_set.read(plan.val)
    bare = Defense(load(classifier, device), None).freeze()
    now = count_correct(
        bare, val.pixels(), val.labels, val.ids, plan.seed, "clean", 1, plan.batch
    ).sum()
    return recorded_accuracy(int(now), then["correct"], then["n"])


def merge(results: Sequence[Result]) -> Result:
    """Join the results of all shards of one entry; a check failed if it failed on any shard."""
    first = results[0]
    return Result(
        scores={name: _joined([one.scores[name] for one in results]) for name in first.scores},
        agreed={n: np.concatenate([one.agreed[n] for one in results]) for n in first.agreed},
        inside=_whole([one.inside for one in results]),
        elsewhere={
            label: _whole([one.elsewhere[label] for one in results]) for label in first.elsewhere
        },
        distance={n: np.concatenate([one.distance[n] for one in results]) for n in first.distance},
        findings=[
            next((f for f in same if not f.passed), same[0])
            for same in zip(*(one.findings for one in results), strict=True)
        ],
        unseen=_pairs([one.unseen for one in results]),
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
        transferred={
            name: _joined([one.transferred[name] for one in results]) for name in first.transferred
        },
    )


def within_threat(scores: Mapping[str, Score], inside: Inside) -> dict[str, Score]:
    """Return scores by the rule of the headline: outside the ball, an example counts as clean."""
    clean = scores[CLEAN]

    def masked(name: str, score: Score) -> Score:
        if name == CLEAN:
            return score
        here = inside[name]
        select: Counts = np.where(here, score.select, clean.select)
        return Score(score.draws, select, np.where(here, score.score, clean.score))

    return {name: masked(name, score) for name, score in scores.items()}


def _inside(sets: Mapping[str, Tensor], pixels: Tensor, threat: Linf | L2) -> Inside:
    reach = {name: threat.distance(x, pixels).numpy() for name, x in sets.items()}
    return {name: far <= threat.eps + SLACK for name, far in reach.items()}


def _elsewhere(
    entry: Entry, sets: Mapping[str, Tensor], pixels: Tensor, plan: Plan
) -> dict[str, Inside]:
    """Return what lies inside the further threats that attacks of this entry have, by label.

    In a ball that is measured; of a bound on something else only its own attacks know.
    """
    found: dict[str, Inside] = {}
    for attack in entry.attacks.values():
        label = attack.region(plan.threat)
        if label in ("", plan.threat.label) or label in found:
            continue
        if attack.bounded:
            found[label] = _inside(sets, pixels, attack.within(plan.threat))
        else:
            own = {n for n, one in entry.attacks.items() if one.region(plan.threat) == label}
            found[label] = {n: np.full(len(pixels), n in (*own, CLEAN)) for n in sets}
    return found


def _whole(parts: Sequence[Inside]) -> Inside:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _joined(scores: Sequence[Score]) -> Score:
    select = np.concatenate([score.select for score in scores])
    return Score(scores[0].draws, select, np.concatenate([score.score for score in scores]))


def _pairs(parts: Sequence[tuple[Score, Score] | None]) -> tuple[Score, Score] | None:
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    clean, attacked = zip(*known, strict=True)
    return _joined(clean), _joined(attacked)


def _share(folder: Path, shard: int, shards: int) -> range:
    """Return the rows of a folder that a shard takes: each takes others, and all are taken.

    Some get none if there are more shards than rows.
    """
    count = shard_rows(folder)[-1].stop
    return range(shard * count // shards, (shard + 1) * count // shards)


def _stops_in_white_box(name: str, entry: Entry, plan: Plan) -> bool:
    """Whether the passes of a set show when a white-box attack fooled an image and stopped.

    Against a random defense no attack stops: one draw is no success.
    """
    white_box, attack = rung_of(name) in entry.white_box_rungs(), entry.attacks[name]
    return white_box and attack.inside(plan.threat) and attack.stops_early()


def _panels(
    defense: Defense, images: ImageSet, sets: Mapping[str, Tensor], clean: Score,
    said: Classes, plan: Plan,
) -> dict[str, Panel]:  # fmt: skip
    """Picture the first images that the bare classifier gets right, and the defense mostly."""
    right = said == images.labels.numpy()
    rows = torch.from_numpy((right & (2 * clean.score > clean.draws)).nonzero()[0])
    rows = rows[: plan.scoring.shown]
    crafted = {name: x[rows] for name, x in sets.items() if name != CLEAN}
    return render(defense, images[rows], crafted, plan.seed, plan.batch)


def _clean(defense: Defense, images: ImageSet, plan: Plan) -> Counted:
    return count_with_detector(
        defense, images.pixels(), images.labels, images.ids, plan.seed, "clean",
        plan.scoring.select_draws, plan.scoring.score_draws, plan.batch,
    )  # fmt: skip


def _unseen(
    defense: Defense, images: ImageSet, worst_images: Tensor, plan: Plan, device: str
) -> tuple[Score, Score] | None:
    """Count the unseen classifier behind the purifier, on the clean and on the worst images."""
    if plan.unseen is None:
        return None
    other = Defense(load(plan.unseen, device), defense.purifier).freeze()
    return (
        _once(other, images.pixels(), images, plan, "clean"),
        _once(other, worst_images, images, plan, "score"),
    )


def _once(defense: Defense, x: Tensor, images: ImageSet, plan: Plan, role: Role) -> Score:
    """Count under one role only, for images among which nothing is selected."""
    draws = plan.scoring.score_draws if defense.stochastic else 1
    counted = count_correct(
        defense, x, images.labels, images.ids, plan.seed, role, draws, plan.batch
    )
    return Score(draws, counted, counted)
