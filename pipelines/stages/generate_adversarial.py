"""Attack a defense by its ladder and probe it.

Reads data/test, data/val (for the probes), the classifier and the purifier, writes
adversarial/<defense>: `<mode>/<attack>/` holds one set of the ladder, `checks.json` the outcomes of
the probes. The mode `classifier` is not
crafted here: it replays the sets that were crafted against the bare classifier.
"""

from pathlib import Path

from pipelines.config.sections import Defended
from pipelines.config.views import CraftingView
from pipelines.runner.context import Context
from pipelines.tasks.ladders import generate
from pipelines.tasks.subject import Subject


class GenerateParams(CraftingView):
    """One defense with its ladder, and all attacks this may name."""

    defended: Defended
    tracks = {**CraftingView.tracks, "defended": "defenses.{name}"}


def run(
    params: GenerateParams, context: Context, *, name: str, val: Path, test: Path,
    classifier: Path, purifier: Path, out: Path,
) -> dict[str, float]:  # fmt: skip
    """Craft the sets of the defense called `name` and probe it."""
    defended = params.defended
    subject = Subject(classifier.absolute(), purifier.absolute(), inference=defended.inference)
    generate({out: (subject, defended.ladder)}, params, val, test, context)
    return {}
