"""The ladders of some defenses: all their adversarial sets, and the probes that need gradients."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch

from components.attacks import Attack
from components.attacks.contract import REPLAYED
from components.attacks.sets import crafted_shards, joined
from components.data import image_set, shards
from components.models.defense import STAND_INS, Mode
from components.models.identity import state_digest
from components.probes import Finding, Stored, probe, spread
from components.probes.bench import GRADIENT
from components.probes.models import unchanged
from pipelines.config.sections import Ladder
from pipelines.config.views import CraftingView
from pipelines.runner.context import Context
from pipelines.tasks import probing
from pipelines.tasks.crafting import SetSpec, craft_all
from pipelines.tasks.subject import Subject


def generate(
    subjects: Mapping[Path, tuple[Subject, Ladder]], params: CraftingView, val: Path, test: Path,
    context: Context,
) -> None:  # fmt: skip
    """Craft the ladder of every subject into its folder, and write its probes there.

    Raises ValueError where a model does not fit the images, or a purifier lacks a stand-in that its
    ladder names.
    """
    specs = [
        SetSpec(
            subject, cast(Mode, folder.parent.name), params.attacks[folder.name], test.absolute(),
            params.threat, params.seed, params.batch, folder,
        )
        for out, (subject, ladder) in subjects.items()
        for folder in _own(out, ladder).values()
    ]  # fmt: skip
    images = image_set.read(test)
    for out, (subject, ladder) in subjects.items():
        subject.require_fit(images)
        known = subject.stand_ins()
        lacking = [mode for mode in ladder if mode in STAND_INS and mode not in known]
        if lacking:
            raise ValueError(
                f"the ladder of {out.name} names {lacking[0]}, but this purifier's stand-ins are "
                f"{', '.join(known) or 'none'}"
            )
    with context.session():
        craft_all(specs, context)
        tasks = [
            {
                "subject": subject, "ladder": ladder, "test": test.absolute(), "params": params,
                "val": val.absolute(), "stored": _stored(out, subject, ladder, params, images.ids),
            }
            for out, (subject, ladder) in subjects.items()
        ]  # fmt: skip
        found = context.map(probe_subject, tasks)
    for (out, (subject, ladder)), findings in zip(subjects.items(), found, strict=True):
        own = _own(out, ladder)
        facts = probing.facts(
            subject, _attacks(own, params), own, params.threat, params.checks, params.seed,
            params.batch, val.absolute(), test.absolute(),
        )  # fmt: skip
        probing.write(out / "checks.json", facts, findings)


def _own(out: Path, ladder: Ladder) -> dict[str, Path]:
    """Return the folders of the sets that are crafted here, by rung/attack."""
    return {
        f"{mode}/{attack}": out / mode / attack
        for mode, attacks in ladder.items()
        if mode not in REPLAYED
        for attack in attacks
    }


def _attacks(own: Mapping[str, Path], params: CraftingView) -> dict[str, Attack]:
    return {name: params.attacks[folder.name] for name, folder in own.items()}


def _stored(
    out: Path, subject: Subject, ladder: Ladder, params: CraftingView, ids: torch.Tensor
) -> Stored:
    """Return what the attacks on a subject left behind; of the images, those to be probed.

    The sets are read shard by shard: they may be larger than the memory.
    """
    own = _own(out, ladder)
    known = [subject.digest(), *(shards.fingerprint(folder) for folder in own.values())]
    secret = hashlib.sha256("/".join(known).encode()).hexdigest()
    probed = ids[spread(ids, secret, params.seed, params.checks.images)]
    sets, answers = [], 0.0
    for name, attack in _attacks(own, params).items():
        parts = []
        for crafted in crafted_shards(own[name]):
            answers += float(crafted.forward.sum() + (GRADIENT - 1) * crafted.backward.sum())
            parts.append(crafted.pick(torch.isin(crafted.ids, probed)))
        if attack.bounded:
            sets.append(joined(parts))
    return Stored(sets, secret, answers)


def probe_subject(
    subject: Subject, ladder: Ladder, val: Path, test: Path, params: CraftingView,
    stored: Stored, device: str,
) -> list[Finding]:  # fmt: skip
    """Probe one subject in the modes of its ladder; runs in a worker."""
    torch.set_num_threads(1)
    defense = subject.defense(device)
    before = state_digest(defense)
    full = ladder.get("full", [])
    modes = [cast(Mode, mode) for mode in ladder if mode not in REPLAYED]
    findings = probe(
        defense, modes, image_set.read(test), params.threat, params.seed, params.checks.images,
        max((getattr(params.attacks[attack], "eot", 1) for attack in full), default=1),
        params.batch, stored, image_set.read(val), params.checks.thorough,
    )  # fmt: skip
    return [*findings, unchanged(before, state_digest(defense), defense.training)]
