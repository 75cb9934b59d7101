"""Attack a control by its ladder and probe it.

Reads its ladder, data/test, data/val (for the probes) and the classifier, writes
adversarial/<control>: its sets, and checks.json. The purifier stands in the ladder: it has no
weights.
"""

from pathlib import Path

from pipelines.config.views import SharedView
from pipelines.runner.context import Context
from pipelines.tasks.ladders import generate


def run(
    params: SharedView, context: Context, *, name: str, ladder: Path, val: Path, test: Path,
    classifier: Path, out: Path,
) -> dict[str, float]:  # fmt: skip
    """Craft the sets of the control called `name` and probe it."""
    generate(ladder, params, val, test, classifier, None, out, context)
    return {}
