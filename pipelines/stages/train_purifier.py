"""Train a purifier in front of the frozen classifier.

Reads data/{train,val}, the classifier and the pool, writes models/<purifier>.
"""

from pathlib import Path

from pipelines.config.sections import Purifier
from pipelines.config.views import TrainingView
from pipelines.runner.context import Context
from pipelines.tasks import training


class PurifierParams(TrainingView):
    """One entry of `purifiers`, and the threat it is trained against."""

    purifier: Purifier
    tracks = {**TrainingView.tracks, "purifier": "purifiers.{name}"}


def run(
    params: PurifierParams,
    context: Context,
    *,
    name: str,
    train: Path,
    val: Path,
    classifier: Path,
    pool: Path,
    out: Path,
) -> dict[str, float]:
    """Train the purifier called `name` in front of the frozen classifier."""
    section = params.purifier
    return training.train(
        name,
        "purifier",
        section.model,
        section,
        params,
        context,
        out,
        train=train,
        val=val,
        classifier=classifier,
        pool=pool,
    )
