"""Craft the pool: an adversarial example of every training image.

Reads data/train and the classifier that is attacked, writes pool.
"""

from pathlib import Path

from pipelines.config.sections import Pool
from pipelines.config.views import ThreatView
from pipelines.runner.context import Context
from pipelines.tasks.crafting import SetSpec, craft_all
from pipelines.tasks.subject import Subject


class PoolParams(ThreatView):
    """The attack that makes the pool, and the threat model it obeys."""

    pool: Pool
    tracks = {**ThreatView.tracks, "pool": "pool"}


def run(
    params: PoolParams, context: Context, *, train: Path, classifier: Path, out: Path
) -> dict[str, float]:
    """Craft an adversarial example of every training image."""
    spec = SetSpec(
        Subject(classifier.absolute()), "full", params.pool.attack, train.absolute(),
        params.threat, params.seed, params.batch, out,
    )  # fmt: skip
    craft_all([spec], context)
    return {}
