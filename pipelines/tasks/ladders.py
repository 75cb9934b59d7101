"""The ladder of one entry: all its adversarial sets, and the probes that need gradients."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch

from components import plugins
from components.attacks import Attack
from components.attacks.contract import NEEDED, REPLAYED, UNASKED, Rung
from components.attacks.sets import crafted_shards, joined
from components.data import image_set, shards
from components.data.shards import DataError
from components.models.defense import Mode
from components.models.identity import state_digest
from components.probes import Finding, Stored, probe, spread
from components.probes.bench import GRADIENT
from components.probes.models import unchanged
from pipelines.config.sections import Resolved
from pipelines.config.views import SharedView
from pipelines.runner.context import Context
from pipelines.tasks import probing
from pipelines.tasks.crafting import SetSpec, craft_all
from pipelines.tasks.subject import Subject


def read(path: Path) -> Resolved:
    """Return a ladder that `resolve_ladders` wrote; DataError where it is missing or damaged."""
    try:
        return Resolved.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        raise DataError(
            f"{path} is missing or damaged: `limpid resolve_ladders` writes it"
        ) from None


def generate(
    ladder: Path, params: SharedView, val: Path | None, test: Path, classifier: Path,
    purifier: Path | None, out: Path, context: Context,
) -> None:  # fmt: skip
    """Craft the sets of a ladder into `out`, and write the probes of its entry there.

    `val` are images that nobody scores; without them some probes are not asked.

    Raises DataError where the ladder was resolved for other models, and ValueError where a model
    does not fit the images or the purifier lacks a stand-in that the ladder names.
    """
    entry = read(ladder)
    given = (classifier.name, purifier.name if purifier else None)
    if given != (entry.classifier, entry.model):
        raise DataError(
            f"{ladder} is about {entry.model or 'no purifier'} in front of {entry.classifier}, not "
            f"about {given[1] or 'none'} in front of {given[0]}"
        )
    subject, val = subject_of(entry, classifier.absolute().parent), val and val.absolute()
    images = image_set.read(test)
    subject.require_fit(images)
    known = subject.stand_ins()
    lacking = [mode for mode in entry.ladder if mode in NEEDED and NEEDED[mode] not in known]
    if lacking:
        raise ValueError(
            f"the ladder of {ladder.stem} names {lacking[0]}, but this purifier's stand-ins are "
            f"{', '.join(known) or 'none'}"
        )
    attacks = own_attacks(entry)
    sets = {name: out / name for name in attacks}
    specs = [
        SetSpec(
            subject, cast(Rung, name.partition("/")[0]), attack, test.absolute(),
            attack.within(entry.threat), params.seed, params.batch, sets[name],
        )
        for name, attack in attacks.items()
    ]  # fmt: skip
    with context.session():
        craft_all(specs, context)
        task = {
            "subject": subject, "entry": entry, "test": test.absolute(), "val": val,
            "seed": params.seed, "batch": params.batch,
            "stored": _stored(subject, entry, attacks, sets, images.ids, params.seed),
        }  # fmt: skip
        (findings,) = context.map(probe_subject, [task])
    facts = probing.facts(
        subject, attacks, sets, entry.threat, entry.checks, params.seed, params.batch,
        val, test.absolute(),
    )  # fmt: skip
    probing.write(out / "checks.json", facts, findings)


def subject_of(entry: Resolved, models: Path) -> Subject:
    """Return the defense of an entry, its networks from the folder `models`."""
    purifier = models / entry.model if entry.model else None
    return Subject(models / entry.classifier, purifier, entry.control, entry.inference)


def own_attacks(entry: Resolved) -> dict[str, Attack]:
    """Return the attacks whose sets are crafted on the entry itself, by rung/attack."""
    return {
        f"{mode}/{name}": attack
        for mode, attacks in entry.ladder.items()
        if mode not in REPLAYED
        for name, attack in attacks.items()
    }


def _stored(
    subject: Subject, entry: Resolved, attacks: Mapping[str, Attack], sets: Mapping[str, Path],
    ids: torch.Tensor, seed: int,
) -> Stored:  # fmt: skip
    """Return what the attacks on a subject left behind; of the images, those to be probed.

    The sets are read shard by shard: they may be larger than the memory.
    """
    known = [subject.digest(), *(shards.fingerprint(folder) for folder in sets.values())]
    secret = hashlib.sha256("/".join(known).encode()).hexdigest()
    probed = ids[spread(ids, secret, seed, entry.checks.images)]
    found, answers = [], 0.0
    for name, attack in attacks.items():
        parts = []
        for crafted in crafted_shards(sets[name]):
            answers += float(crafted.forward.sum() + (GRADIENT - 1) * crafted.backward.sum())
            parts.append(crafted.pick(torch.isin(crafted.ids, probed)))
        if attack.inside(entry.threat):
            found.append(joined(parts))
    return Stored(found, secret, answers)


def probe_subject(
    subject: Subject, entry: Resolved, val: Path | None, test: Path, seed: int, batch: int,
    stored: Stored, device: str,
) -> list[Finding]:  # fmt: skip
    """Probe one subject in the modes of its ladder; runs in a worker."""
    defense = subject.defense(device)
    before = state_digest(defense)
    full = entry.ladder.get("full", {}).values()
    modes = [cast(Mode, mode) for mode in entry.ladder if mode not in UNASKED]
    findings = probe(
        defense, modes, image_set.read(test), entry.threat, seed, entry.checks.images,
        max((getattr(attack, "eot", 1) for attack in full), default=1),
        batch, stored, image_set.read(val) if val else None, entry.checks.thorough,
        plugins.checks(entry.checks.plugins),
    )  # fmt: skip
    return [*findings, unchanged(before, state_digest(defense), defense.training)]
