"""What is scored: entries, their stored sets and probes, as they are read from disk and checked.

Only sets that pass their checks are counted. `tasks.scoring` counts them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from components.attacks import L2, Attack, Crafted, Linf
from components.attacks.ladder import REPLAYED
from components.attacks.sets import read_crafted
from components.checks.sets import agreement, effort, stored_probes, stored_set
from components.data import shards
from components.data.image_set import ImageSet
from components.data.shards import read_manifest
from components.models.defense import STAND_INS, Mode
from components.probes import Finding, Stored, required
from pipelines.config.sections import Checks, Scoring
from pipelines.tasks import probing
from pipelines.tasks.metrics import EntryRole, attack_of, rung_of
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
    """What all entries are scored on, and how.

    The examples of the `baselines` are tried on every entry that has another classifier.
    """

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
    baselines: Sequence[Entry] = ()

    def attack(self, name: str) -> Attack:
        """Return the attack behind rung/attack."""
        return self.attacks[attack_of(name)]

    def bounded(self, name: str) -> bool:
        """Whether the attack behind rung/attack stays inside the primary threat by itself."""
        return self.attack(name).bounded


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


def read_sets(
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


def worst_of_baselines(
    entry: Entry, plan: Plan, images: ImageSet, rows: Tensor
) -> dict[str, Tensor]:
    """Return the worst examples of `other_baselines` for some rows: (N,C,H,W) by baseline.

    That is for each image the one of lowest margin in all sets of the baseline that were crafted
    inside the ball and pass their checks. A baseline without any is left out.
    """
    found = {}
    for baseline in other_baselines(entry, plan):
        white = baseline.white_box_rungs()
        bounded = {
            name: folder
            for name, folder in baseline.sets.items()
            if rung_of(name) in white and plan.bounded(name)
        }
        sound, _ = read_sets(replace(baseline, sets=bounded), plan, images)
        if sound:
            stored = Stored(list(sound.values()), secret="", answers=0)
            found[baseline.name] = stored.worst(images.ids[rows])
    return found


def other_baselines(entry: Entry, plan: Plan) -> list[Entry]:
    """Return the baselines whose examples are tried on an entry.

    One with the classifier of the entry is left out where its examples are tried anyway: they are
    those of the entry itself, or on the rung `classifier`.
    """
    tried = entry.subject.bare or any(rung_of(name) == "classifier" for name in entry.sets)
    own = entry.subject.classifier if tried else None
    return [one for one in plan.baselines if one.subject.classifier != own]


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
