"""Attack a defense by its ladder and probe it.

Reads its ladder, data/test, data/val (for the probes), the classifier and the purifier, writes
adversarial/<defense>: `<mode>/<attack>/` holds one set, `checks.json` the outcomes of the probes.
The modes `classifier` and `transfer` are not crafted here: they replay the sets that were crafted
against bare classifiers.
"""

from pathlib import Path

from pipelines.config.views import SharedView
from pipelines.runner.context import Context
from pipelines.tasks.ladders import generate


def run(
    params: SharedView, context: Context, *, name: str, ladder: Path, val: Path, test: Path,
    classifier: Path, purifier: Path, out: Path,
) -> dict[str, float]:  # fmt: skip
    """Craft the sets of the defense called `name` and probe it."""
    generate(ladder, params, val, test, classifier, purifier, out, context)
    return {}
