"""Attack a bare classifier and probe it.

Reads its ladder, data/test, data/val (for the probes) and the classifier, writes
adversarial/<baseline>: a set of adversarial examples for every attack, and checks.json.
"""

from pathlib import Path

from pipelines.config.views import SharedView
from pipelines.runner.context import Context
from pipelines.tasks.ladders import generate


def run(
    params: SharedView, context: Context, *, name: str, ladder: Path, val: Path, test: Path,
    classifier: Path, out: Path,
) -> dict[str, float]:  # fmt: skip
    """Craft the sets of the bare classifier called `name` and probe it."""
    generate(ladder, params, val, test, classifier, None, out, context)
    return {}
