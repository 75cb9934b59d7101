"""Fine-tune a purifier by AToP.

Reads data/{train,val}, the classifier, the pool and the purifier, writes models/<name>.
"""

from pathlib import Path

from components.models.checkpoints import read_section
from pipelines.config.sections import Finetuned
from pipelines.config.views import TrainingView
from pipelines.runner.context import Context
from pipelines.tasks import training


class AtopParams(TrainingView):
    """One entry of `atop`, and the threat it is trained against."""

    atop: Finetuned
    tracks = {**TrainingView.tracks, "atop": "atop.{name}"}


def run(
    params: AtopParams,
    context: Context,
    *,
    name: str,
    train: Path,
    val: Path,
    classifier: Path,
    pool: Path,
    base: Path,
    out: Path,
) -> dict[str, float]:
    """Fine-tune the purifier `base` through the frozen classifier."""
    section = params.atop
    model = read_section(base)
    return training.train(
        name,
        "purifier",
        model,
        section,
        params,
        context,
        out,
        train=train,
        val=val,
        classifier=classifier,
        pool=pool,
        base=base,
    )
