"""Craft the pool: an adversarial example of every training image.

Reads data/train and the classifier that is attacked, writes pool.
"""

from pathlib import Path

from pipelines.config.sections import Pool
from pipelines.config.views import TrainingView
from pipelines.runner.context import Context
from pipelines.tasks.crafting import SetSpec, craft_all
from pipelines.tasks.subject import Subject


class PoolParams(TrainingView):
    """The attack that makes the pool, and the threat model it obeys."""

    pool: Pool
    tracks = {**TrainingView.tracks, "pool": "pool"}


def run(
    params: PoolParams, context: Context, *, train: Path, classifier: Path, out: Path
) -> dict[str, float]:
    """Craft an adversarial example of every training image."""
    attack = params.pool.attack
    spec = SetSpec(
        Subject(classifier.absolute()), "full", attack, train.absolute(),
        attack.within(params.training_threat), params.seed, params.batch, out,
    )  # fmt: skip
    craft_all([spec], context)
    return {}
