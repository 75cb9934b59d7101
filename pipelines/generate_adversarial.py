"""Reads data/test, a classifier and a purifier, writes adversarial/<defense>: sets and probes.

`<mode>/<attack>/` are the sets of the defense's ladder, crafted through it; the mode `classifier`
is not crafted here, since it replays what was crafted against the bare classifier. `checks.json`
holds the probes that need gradients.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from components import data
from components.adversarial import read_crafted
from components.checkpoints import state_digest
from components.checks import Finding, probe
from components.checks.models import unchanged
from components.defense import STAND_INS, Mode
from components.shards import write_json
from pipelines.crafting import Order, Subject, craft_all
from pipelines.params import REPLAYED, CraftingView, Defended, Ladder
from pipelines.stage import Context, main

MAPS = True


class GenerateParams(CraftingView):
    """One defense with its ladder, and all attacks this may name."""

    defended: Defended
    tracks = {**CraftingView.tracks, "defended": "defenses.{name}"}


def run(
    params: GenerateParams, context: Context, *, name: str, test: Path, classifier: Path,
    purifier: Path, out: Path,
) -> dict[str, float]:  # fmt: skip
    """Craft the sets of the defense called `name` and probe it."""
    defended = params.defended
    subject = Subject(classifier.absolute(), purifier.absolute(), inference=defended.inference)
    generate({out: (subject, defended.ladder)}, params, test, context)
    return {}


def generate(
    subjects: Mapping[Path, tuple[Subject, Ladder]], params: CraftingView, test: Path,
    context: Context,
) -> None:  # fmt: skip
    """Craft the ladders of some subjects, each into its folder, and write their probes."""
    orders = [
        Order(
            subject, cast(Mode, mode), params.attacks[attack], test.absolute(), params.threat,
            params.seed, params.batch, out / mode / attack,
        )
        for out, (subject, ladder) in subjects.items()
        for mode, attacks in ladder.items()
        if mode not in REPLAYED
        for attack in attacks
    ]  # fmt: skip
    images = data.read(test)
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
        craft_all(orders, context)
        tasks = [
            {
                "subject": subject, "ladder": ladder, "test": test.absolute(), "params": params,
                "stored": _stored(out, ladder, params) if params.checks.thorough else None,
            }
            for out, (subject, ladder) in subjects.items()
        ]  # fmt: skip
        found = context.map(probe_subject, tasks)
    for out, findings in zip(subjects, found, strict=True):
        write_json(out / "checks.json", [finding.model_dump() for finding in findings])


def _stored(out: Path, ladder: Ladder, params: CraftingView) -> list[Tensor]:
    """Return what was crafted with the exact gradient within the threat, by attack."""
    bounded = [attack for attack in ladder.get("full", []) if params.attacks[attack].bounded]
    return [read_crafted(out / "full" / attack).images for attack in bounded]


def probe_subject(
    subject: Subject, ladder: Ladder, test: Path, params: CraftingView,
    stored: Sequence[Tensor] | None, device: str,
) -> list[Finding]:  # fmt: skip
    """Probe one subject in the modes of its ladder; runs in a worker."""
    torch.set_num_threads(1)
    defense = subject.defense(device)
    before = state_digest(defense)
    full = ladder.get("full", [])
    findings = probe(
        defense, [cast(Mode, mode) for mode in ladder if mode not in REPLAYED], data.read(test),
        params.threat, params.seed, params.checks.images,
        max((getattr(params.attacks[attack], "eot", 1) for attack in full), default=1), stored,
    )  # fmt: skip
    return [*findings, unchanged(before, state_digest(defense), defense.training)]


if __name__ == "__main__":
    main(__spec__.name)
