"""Attack a bare classifier and probe it.

Reads data/test, data/val (for the probes) and the classifier, writes adversarial/<baseline>: a set
of adversarial examples for every attack of its ladder, and checks.json.
"""

from pathlib import Path

from pipelines.config.sections import Ladder
from pipelines.config.views import CraftingView
from pipelines.runner.context import Context
from pipelines.tasks.ladders import generate
from pipelines.tasks.subject import Subject


class BaselineParams(CraftingView):
    """The ladder of one bare classifier, and all attacks it may name."""

    ladder: Ladder
    tracks = {**CraftingView.tracks, "ladder": "baselines.{name}.ladder"}


def run(
    params: BaselineParams, context: Context, *, name: str, val: Path, test: Path, classifier: Path,
    out: Path,
) -> dict[str, float]:  # fmt: skip
    """Craft the sets of the bare classifier called `name` and probe it."""
    subject = Subject(classifier.absolute())
    generate({out: (subject, params.ladder)}, params, val, test, context)
    return {}
