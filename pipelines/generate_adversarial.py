"""Reads data/test, a classifier and a purifier, writes adversarial/<defense>: sets and probes.

`<mode>/<attack>/` are the sets of the defense's ladder, crafted through it; the mode `classifier`
is not crafted here, since it replays what was crafted against the bare classifier. `checks.json`
holds the probes that need gradients.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from components import data
from components.adversarial import read_crafted
from components.checkpoints import state_digest
from components.checks import Finding, probe
from components.checks.models import unchanged
from components.data import ImageSet
from components.defense import STAND_INS, Mode
from components.shards import write_json
from pipelines.crafting import Order, Subject, craft_all
from pipelines.params import REPLAYED, CraftingView, Defended, Ladder
from pipelines.stage import Context, main


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
    craft_all(orders, context)
    for out, (subject, ladder) in subjects.items():
        device = "cuda" if context.resources.gpu else "cpu"
        findings = _probes(out, subject, ladder, images, params, device)
        write_json(out / "checks.json", [finding.model_dump() for finding in findings])


def _probes(
    out: Path, subject: Subject, ladder: Ladder, images: ImageSet, params: CraftingView,
    device: str,
) -> list[Finding]:  # fmt: skip
    """Probe one subject in the modes of its ladder; `out` holds its sets."""
    defense = subject.defense(device)
    before = state_digest(defense)
    full = ladder.get("full", [])
    stored = None
    if params.checks.thorough:
        bounded = [attack for attack in full if params.attacks[attack].bounded]
        stored = [read_crafted(out / "full" / attack).images for attack in bounded]
    findings = probe(
        defense, [cast(Mode, mode) for mode in ladder if mode not in REPLAYED], images,
        params.threat, params.seed, params.checks.images,
        max((getattr(params.attacks[attack], "eot", 1) for attack in full), default=1), stored,
    )  # fmt: skip
    return [*findings, unchanged(before, state_digest(defense), defense.training)]


if __name__ == "__main__":
    main(__spec__.name)
