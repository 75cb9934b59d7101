"""How many workers a stage may use, and the CPUs and GPUs of each."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from components.config import Config
from pipelines.errors import near

Count = Annotated[int, Field(ge=1)]
AUTO = "auto"


def _gpus(value: Any) -> Any:
    """Give the mistakes of either kind one sentence."""
    if value != AUTO and (isinstance(value, bool | str) or not value >= 0):
        raise ValueError("should be a number of GPUs that is not negative, or auto")
    return value


Gpus = Annotated[float | Literal["auto"], BeforeValidator(_gpus)]


class Workers(Config):
    """A number of workers that run at the same time, each with its own CPUs and GPUs.

    `gpus` may be a fraction, or `auto`: what is there. 0 workers means no Ray: the tasks run one
    after another in the process of the stage, and in a job one after another on a node of the
    cluster.
    """

    workers: Annotated[int, Field(ge=0)]
    cpus: Count
    gpus: Gpus

    @property
    def device(self) -> str:
        """The device of the tensors; Ray makes only its own GPU visible to each worker."""
        return "cuda" if self.gpus_each else "cpu"

    @property
    def gpus_each(self) -> float:
        """The GPUs of each worker, known once `on` has replaced `auto`."""
        assert self.gpus != AUTO, "auto was not replaced"
        return float(self.gpus)

    def on(self, gpus: int) -> Self:
        """Return these workers where there are so many GPUs: `auto` is replaced by a number."""
        return self.model_copy(update={"gpus": self._each(gpus)}) if self.gpus == AUTO else self

    def _each(self, gpus: int) -> float:
        """Return one GPU or, where workers have to share them, the part of one."""
        together = math.ceil(max(self.most, 1) / gpus) if gpus else math.inf
        # Ray counts in parts of 10,000; rounded down, so that all fit.
        return math.floor(10_000 / together) / 10_000

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

    def _each(self, gpus: int) -> float:
        """Return one GPU, where there is any: those of one training cannot share one (NCCL)."""
        return 1.0 if gpus else 0.0

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

    def on(self, gpus: Callable[[], int]) -> "Resources":
        """Return them with numbers for `auto`; `gpus` is asked how many GPUs there are, if need be.

        Those of `stages` are left alone: take the resources of a stage first (`of`).
        """
        own = {name: workers for name, workers in self if isinstance(workers, Workers)}
        if all(workers.gpus != AUTO for workers in own.values()):
            return self
        found = gpus()
        return self.model_copy(update={name: workers.on(found) for name, workers in own.items()})

    @model_validator(mode="after")
    def _stages(self) -> Self:
        known = [path.stem for path in (Path(__file__).parent.parent / "stages").glob("*.py")]
        for name in self.stages:
            stage = name.partition("@")[0]
            if stage not in known:
                raise ValueError(f"stages names {name}, which is no stage{near(stage, known)}")
        return self
