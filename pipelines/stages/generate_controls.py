"""Attack all controls by their ladders and probe them.

Reads data/test, data/val (for the probes) and the classifier, writes adversarial/controls: the
sets of every control, and its checks.json.
"""

from pathlib import Path

from pipelines.config.sections import Control, Ladder
from pipelines.config.views import CraftingView
from pipelines.runner.context import Context
from pipelines.tasks.ladders import generate
from pipelines.tasks.subject import Subject


class ControlsParams(CraftingView):
    """All controls with their ladders, and all attacks these may name."""

    controls: dict[str, Control]
    tracks = {**CraftingView.tracks, "controls": "controls"}


def run(
    params: ControlsParams, context: Context, *, val: Path, test: Path, classifier: Path, out: Path
) -> dict[str, float]:
    """Craft the sets of every control and probe it."""
    subjects: dict[Path, tuple[Subject, Ladder]] = {
        out / name: (Subject(classifier.absolute(), control=control.purifier), control.ladder)
        for name, control in params.controls.items()
    }
    out.mkdir()  # Also without any control.
    generate(subjects, params, val, test, context)
    return {}
