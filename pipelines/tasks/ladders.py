"""The ladders of some defenses: all their adversarial sets, and the probes that need gradients."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch

from components.attacks import Crafted
from components.attacks.ladder import REPLAYED
from components.attacks.sets import read_crafted
from components.data import image_set
from components.data.shards import write_json
from components.models.defense import STAND_INS, Mode
from components.models.identity import state_digest
from components.probes import Finding, probe, spread
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
            subject, cast(Mode, mode), params.attacks[attack], test.absolute(), params.threat,
            params.seed, params.batch, out / mode / attack,
        )
        for out, (subject, ladder) in subjects.items()
        for mode, attacks in ladder.items()
        if mode not in REPLAYED
        for attack in attacks
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
        attacks = {
            f"{mode}/{name}": params.attacks[name] for mode in ladder for name in ladder[mode]
        }
        facts = probing.facts(
            subject,
            attacks,
            params.threat,
            params.checks,
            params.seed,
            params.batch,
            val.absolute(),
            test.absolute(),
        )
        stored = probing.Probed(facts=facts, findings=findings)
        write_json(out / "checks.json", stored.model_dump(mode="json"))


def _stored(
    out: Path, subject: Subject, ladder: Ladder, params: CraftingView, ids: torch.Tensor
) -> list[Crafted]:
    """Return the probed images of every set of a bounded attack with the exact gradient."""
    bounded = [attack for attack in ladder.get("full", []) if params.attacks[attack].bounded]
    rows = spread(ids, subject.digest(), params.seed, params.checks.images)
    return [read_crafted(out / "full" / attack).pick(rows) for attack in bounded]


def probe_subject(
    subject: Subject, ladder: Ladder, val: Path, test: Path, params: CraftingView,
    stored: Sequence[Crafted], device: str,
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
