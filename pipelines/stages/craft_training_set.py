"""Reads data/train and the classifier, writes the pool: x' against the frozen classifier."""

from pathlib import Path

from pipelines.config.sections import Pool
from pipelines.config.views import ThreatView
from pipelines.runner.context import Context
from pipelines.tasks.crafting import Order, craft_all
from pipelines.tasks.subject import Subject


class PoolParams(ThreatView):
    """The attack of the pool, and the threat it stays in."""

    pool: Pool
    tracks = {**ThreatView.tracks, "pool": "pool"}


def run(
    params: PoolParams, context: Context, *, train: Path, classifier: Path, out: Path
) -> dict[str, float]:
    """Craft x' for every training image."""
    order = Order(
        Subject(classifier.absolute()), "full", params.pool.attack, train.absolute(),
        params.threat, params.seed, params.batch, out,
    )  # fmt: skip
    craft_all([order], context)
    return {}
