"""How many workers a stage may use, and the CPUs and GPUs of each."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from components.config import Config
from pipelines.errors import near

Count = Annotated[int, Field(ge=1)]


class Workers(Config):
    """A number of workers that run at the same time, each with its own CPUs and GPUs.

    `gpus` may be a fraction. 0 workers means no Ray: the tasks run one after another in the
    process of the stage, and in a job one after another on a node of the cluster.
    """

    workers: Annotated[int, Field(ge=0)]
    cpus: Count
    gpus: Annotated[float, Field(ge=0)]

    @property
    def device(self) -> str:
        """The device of the tensors; Ray makes only its own GPU visible to each worker."""
        return "cuda" if self.gpus else "cpu"

    @property
    def least(self) -> int:
        """The smallest number of workers that is enough."""
        return 1

    @property
    def most(self) -> int:
        """The largest number of workers that is used."""
        return self.workers


class TrainingWorkers(Workers):
    """The workers of one training; `cpus` is the number of threads of each.

    [least, most] starts with as many as there is room for, and continues with those that are left.
    """

    workers: Annotated[int, Field(ge=0)] | Annotated[list[Count], Field(min_length=2, max_length=2)]  # type: ignore[assignment]

    @property
    def least(self) -> int:
        """The smallest number of workers that is enough."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most(self) -> int:
        """The largest number of workers that is used."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.least > self.most:
            raise ValueError(f"workers {self.workers} must be [least, most]")
        return self


class TrialWorkers(Workers):
    """The trials of a search, each in its own process."""

    workers: Count


class Override(Config):
    """Resources of one stage that differ from those of the others."""

    train: TrainingWorkers | None = None
    shards: Workers | None = None
    trials: TrialWorkers | None = None


class Resources(Config):
    """What the stages may use. No stage depends on it, since no result does.

    `train` is for one training, `shards` for crafting and scoring, `trials` for a search. `stages`
    overrides them for one stage, such as `evaluate`, or for one instance of a stage, such as
    `train_purifier@student`.
    """

    train: TrainingWorkers
    shards: Workers
    trials: TrialWorkers
    stages: dict[str, Override]

    def of(self, stage: str) -> "Resources":
        """Return the resources of one stage."""
        own = self.stages.get(stage) or self.stages.get(stage.partition("@")[0], Override())
        changes = {name: workers for name, workers in own if workers is not None}
        return self.model_copy(update={**changes, "stages": {}})

    @model_validator(mode="after")
    def _stages(self) -> Self:
        known = [path.stem for path in (Path(__file__).parent.parent / "stages").glob("*.py")]
        for name in self.stages:
            stage = name.partition("@")[0]
            if stage not in known:
                raise ValueError(f"stages names {name}, which is no stage{near(stage, known)}")
        return self
