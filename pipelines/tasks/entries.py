"""What is scored: entries, their stored sets and probes, as they are read from disk and checked.

Every set is checked once and whole, but no more than one shard of it is in memory. Only sets that
pass are counted: `tasks.scoring` reads the rows that it counts of these.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from components.attacks import L2, Attack, Crafted, Linf
from components.attacks.contract import GIVEN, REPLAYED, UNASKED
from components.attacks.sets import crafted_shards, joined, read_crafted
from components.checks.sets import Part, agreement, effort, stored_probes, stored_set
from components.data import image_set, shards
from components.data.image_set import ImageSet
from components.data.shards import DataError, read_manifest, shard_rows
from components.models.defense import STAND_INS, Mode
from components.probes import Finding, Stored, required
from pipelines.config.sections import Checks, Scoring
from pipelines.tasks import probing
from pipelines.tasks.metrics import EntryRole, rung_of
from pipelines.tasks.subject import Subject


@dataclass(frozen=True)
class Entry:
    """One scored baseline, defense or control: its models and probes.

    `sets` are the folders of its sets by rung/attack, `attacks` the attacks behind them.
    """

    name: str
    role: EntryRole
    subject: Subject
    probes: Path
    sets: Mapping[str, Path]
    attacks: Mapping[str, Attack]

    def white_box_rungs(self) -> tuple[str, ...]:
        """Return the rungs on which an attack sees through the purifier.

        Where the purifier has no gradient, these are its stand-ins and the identity.
        """
        exact = "full" if self.subject.differentiable() else "bpda"
        return (exact, *STAND_INS)


@dataclass(frozen=True)
class Plan:
    """What all entries are scored on, and how.

    The examples of the `baselines` are tried on every entry that has another classifier. Checks
    that need `val`, images that nobody scores, or `unseen`, a classifier that played no part in
    training, are not asked without them. A `quick` ladder gives upper bounds: nothing asks it for
    strong attacks.
    """

    threat: Linf | L2
    scoring: Scoring
    checks: Checks
    seed: int
    batch: int
    val: Path | None
    test: Path
    unseen: Path | None
    surrogate: Path | None
    baselines: Sequence[Entry] = ()
    quick: bool = False


def probes_of(entry: Entry, plan: Plan) -> list[Finding]:
    """Return the findings of the probes of an entry; block where they are not its own or not all.

    The modes are those in which it was attacked.
    """
    stored = probing.read(entry.probes)
    now = probing.facts(
        entry.subject, entry.attacks, entry.sets, plan.threat, plan.checks, plan.seed, plan.batch,
        plan.val, plan.test,
    )  # fmt: skip
    rungs = dict.fromkeys(rung_of(name) for name in entry.sets)
    modes = [cast(Mode, rung) for rung in rungs if rung not in (*UNASKED, GIVEN)]
    names = required(
        modes, entry.subject.stochastic(), entry.subject.differentiable(), plan.checks.thorough
    )
    facts = {key: (_plain(stored.facts.get(key)), _plain(value)) for key, value in now.items()}
    found = [finding.name for finding in stored.findings]
    return [
        *stored.findings,
        *stored_probes([*names, *plan.checks.plugins, "state_unchanged"], found, facts),
    ]


@dataclass(frozen=True)
class CheckedSet:
    """What was found about one stored set, whether it may be counted, and the digest it had."""

    findings: list[Finding]
    sound: bool
    digest: str


# The digests of the sets that may be counted, by entry and set.
Sound = Mapping[str, Mapping[str, str]]


def check_set(entry: Entry, name: str, plan: Plan, device: str) -> CheckedSet:
    """Read and check one set of an entry, shard by shard; runs in a worker.

    No model is asked anything. Raises DataError if a byte of the set or the images has changed.
    """
    folder, attack, test = entry.sets[name], entry.attacks[name], read_manifest(plan.test)
    digest, costs = shards.fingerprint(folder), list[Crafted]()

    def parts() -> Iterator[Part]:
        for rows, one in zip(shard_rows(folder), crafted_shards(folder), strict=True):
            yield one.images, one.ids, one.labels, image_set.read(plan.test, rows)
            costs.append(replace(one, images=torch.empty(len(one.ids), 0)))

    threat = attack.within(plan.threat) if attack.bounded else None
    checks = stored_set(name, parts(), int(test["rows"]), threat)
    if rung_of(name) == GIVEN:
        # Nobody promised what it was crafted against, or what it cost.
        return CheckedSet(checks, all(finding.passed for finding in checks), digest)
    checks.append(_provenance(name, folder, entry, plan))
    random = _attacked(name, entry, plan).stochastic() and rung_of(name) != "fixed_noise"
    classes = len(test["class_names"])
    spent = effort(name, attack, joined(costs), classes, random)
    return CheckedSet([*checks, spent], all(finding.passed for finding in checks), digest)


def read_sound(entry: Entry, sound: Sound, images: ImageSet, rows: range) -> dict[str, Crafted]:
    """Return the examples of some test images, which are those in `rows`, in all `sound` sets.

    Raises DataError for a set that is not the one that was checked.
    """
    found = {}
    for name, digest in sound[entry.name].items():
        found[name] = read_crafted(entry.sets[name], rows)
        same = shards.fingerprint(entry.sets[name]) == digest
        if not same or not torch.equal(found[name].ids, images.ids):
            raise DataError(f"{entry.sets[name]} has changed since it was checked")
    return found


def worst_of_baselines(
    entry: Entry, plan: Plan, sound: Sound, images: ImageSet, rows: range
) -> dict[str, Tensor]:
    """Return the worst examples of `other_baselines` for some test images: (N,C,H,W) by baseline.

    That is for each image the one of lowest margin in all sets of the baseline that were crafted
    inside the ball and are sound. A baseline without any is left out. The images are those in
    `rows`.
    """
    found = {}
    for baseline in other_baselines(entry, plan):
        white = baseline.white_box_rungs()
        bounded = {
            name: digest
            for name, digest in sound[baseline.name].items()
            if rung_of(name) in white and baseline.attacks[name].inside(plan.threat)
        }
        if bounded:
            read = read_sound(baseline, {baseline.name: bounded}, images, rows)
            stored = Stored(list(read.values()), secret="", answers=0)
            found[baseline.name] = stored.worst(images.ids)
    return found


def other_baselines(entry: Entry, plan: Plan) -> list[Entry]:
    """Return the baselines whose examples are tried on an entry.

    One with the classifier of the entry is left out where its examples are tried anyway: they are
    those of the entry itself, or on the rung `classifier`.
    """
    tried = entry.subject.bare or any(rung_of(name) == "classifier" for name in entry.sets)
    own = entry.subject.classifier if tried else None
    return [one for one in plan.baselines if one.subject.classifier != own]


def _attacked(name: str, entry: Entry, plan: Plan) -> Subject:
    """Return what a set was crafted on: the entry, or the classifier whose set it replays."""
    mode = rung_of(name)
    if mode not in REPLAYED:
        return entry.subject
    bare = plan.surrogate if mode == "transfer" else entry.subject.classifier
    assert bare is not None, "params.yaml asks for transfer without a surrogate"
    return Subject(bare)


def _provenance(name: str, folder: Path, entry: Entry, plan: Plan) -> Finding:
    facts = read_manifest(folder)
    now = _attacked(name, entry, plan).facts()
    mode, attack = rung_of(name), entry.attacks[name]
    threat = attack.within(plan.threat).model_dump(mode="json") if attack.bounded else None
    expected = {
        **now,
        "data": shards.fingerprint(plan.test),
        "mode": "full" if mode in REPLAYED else mode,
        "attack": attack.model_dump(mode="json"),
        "threat": threat,
        "seed": plan.seed,
    }
    # Sets from before there were inferences were crafted without one.
    facts = {"inference": "none", **facts}
    pairs = {key: (facts.get(key), now) for key, now in expected.items()}
    return agreement(name, {key: (_plain(a), _plain(b)) for key, (a, b) in pairs.items()})


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
