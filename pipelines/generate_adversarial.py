"""Reads data/test, a classifier and a purifier, writes adversarial/<defense>: sets and probes.

`<mode>/<attack>/` are the sets of the defense's ladder, crafted through it; the mode `classifier`
is not crafted here, since it replays what was crafted against the bare classifier. `checks.json`
holds the probes that need gradients.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from components import data
from components.checkpoints import state_digest
from components.checks import Finding, probe, unchanged
from components.defense import Mode
from components.shards import write_json
from pipelines.crafting import Order, Subject, craft_all
from pipelines.params import CraftingView, Ladder
from pipelines.stage import Context, main


class GenerateParams(CraftingView):
    """The ladder of one defense, and all attacks it may name."""

    ladder: Ladder
    tracks = {**CraftingView.tracks, "ladder": "defenses.{name}.ladder"}


def run(
    params: GenerateParams, context: Context, *, name: str, test: Path, classifier: Path,
    purifier: Path, out: Path,
) -> dict[str, float]:  # fmt: skip
    """Craft the sets of the defense called `name` and probe it."""
    subject = Subject(classifier.absolute(), purifier.absolute())
    generate({out: (subject, params.ladder)}, params, test, context)
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
        if mode != "classifier"
        for attack in attacks
    ]  # fmt: skip
    craft_all(orders, context)
    for out, (subject, ladder) in subjects.items():
        modes = [mode for mode in ladder if mode != "classifier"]
        findings = probes(subject, modes, test, params)
        write_json(out / "checks.json", [finding.model_dump() for finding in findings])


def probes(subject: Subject, modes: list[str], test: Path, params: CraftingView) -> list[Finding]:
    """Probe one subject."""
    defense = subject.defense()
    before = state_digest(defense)
    images = data.read(test)
    findings = probe(defense, cast(list[Mode], modes), images, params.threat, params.seed)
    return [*findings, unchanged(before, state_digest(defense), defense.training)]


if __name__ == "__main__":
    raise SystemExit(main(__spec__.name))
