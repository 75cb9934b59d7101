"""Train a classifier.

Reads data/{train,val}, writes models/<classifier>.
"""

from pathlib import Path

from pipelines.config.sections import Classifier
from pipelines.config.views import TrainingView
from pipelines.runner.context import Context
from pipelines.tasks import training


class ClassifierParams(TrainingView):
    """One entry of `classifiers`, and the threat that adversarial training uses."""

    classifier: Classifier
    tracks = {**TrainingView.tracks, "classifier": "classifiers.{name}"}


def run(
    params: ClassifierParams, context: Context, *, name: str, train: Path, val: Path, out: Path
) -> dict[str, float]:
    """Train the classifier called `name`."""
    section = params.classifier
    return training.train(
        name,
        "classifier",
        section.model,
        section,
        params,
        context,
        out,
        train=train,
        val=val,
    )
