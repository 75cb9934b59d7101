"""Reads data/train and the classifier, writes the pool: x' against the frozen classifier."""

from pathlib import Path

from pipelines.crafting import Order, Subject, craft_all
from pipelines.params import Pool, ThreatView
from pipelines.stage import Context, main

MAPS = True


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


if __name__ == "__main__":
    main(__spec__.name)
