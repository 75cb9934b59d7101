"""What stages may use: so many workers side by side, each with CPUs and GPUs of its own.

A job reads this before it has imported torch.
"""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from components.config import Config
from pipelines.errors import near

Count = Annotated[int, Field(ge=1)]


class Workers(Config):
    """So many `workers` side by side, each with CPUs and GPUs (or a share of one) of its own.

    0 works without a Ray, in the stage's own process, one piece after another (in a job of a
    cluster: one at a time).
    """

    workers: Annotated[int, Field(ge=0)]
    cpus: Count
    gpus: Annotated[float, Field(ge=0)]

    @property
    def device(self) -> str:
        """Where tensors live; Ray shows each worker the GPU that is its own."""
        return "cuda" if self.gpus else "cpu"

    @property
    def least(self) -> int:
        """The fewest workers it can do with."""
        return 1

    @property
    def most(self) -> int:
        """The most workers it takes."""
        return self.workers


class TrainingWorkers(Workers):
    """Workers of one training; `cpus` are the threads of each.

    [least, most] takes what is there, and goes on with what is left.
    """

    workers: Annotated[int, Field(ge=0)] | Annotated[list[Count], Field(min_length=2, max_length=2)]  # type: ignore[assignment]

    @property
    def least(self) -> int:
        """The fewest workers it can do with."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most(self) -> int:
        """The most workers it takes."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.least > self.most:
            raise ValueError(f"workers {self.workers} must be [least, most]")
        return self


class TrialWorkers(Workers):
    """Trials of a search, each a process of its own."""

    workers: Count


class Override(Config):
    """Other resources for one stage."""

    train: TrainingWorkers | None = None
    shards: Workers | None = None
    trials: TrialWorkers | None = None


class Resources(Config):
    """What the stages may use; tracked by no stage, since no result depends on it.

    `train` is for one training, `shards` for crafting and scoring, `trials` for those of a search.
    `stages` says it anew for a stage, as `evaluate`, or for one of its instances, as
    `train_purifier@student`.
    """

    train: TrainingWorkers
    shards: Workers
    trials: TrialWorkers
    stages: dict[str, Override]

    def of(self, stage: str) -> "Resources":
        """Return what one stage may use."""
        own = self.stages.get(stage) or self.stages.get(stage.partition("@")[0], Override())
        changes = {name: share for name, share in own if share is not None}
        return self.model_copy(update={**changes, "stages": {}})

    @model_validator(mode="after")
    def _stages(self) -> Self:
        known = [path.stem for path in (Path(__file__).parent.parent / "stages").glob("*.py")]
        for name in self.stages:
            stage = name.partition("@")[0]
            if stage not in known:
                raise ValueError(f"stages names {name}, which is no stage{near(stage, known)}")
        return self
