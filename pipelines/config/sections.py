"""The sections of params.yaml that say what is trained, scored, checked and searched.

What one section can check by itself is checked here; what depends on several of them is checked by
`schema.Params`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from components import plugins
from components.attacks import AttackConfig, Threat
from components.config import Config
from components.models.classifiers import ClassifierConfig
from components.models.purifiers import (
    ControlConfig,
    InferenceConfig,
    PurifierConfig,
    stochastic,
)
from components.training.atop import Atop
from components.training.batches import MOVED
from components.training.contract import takes_pool
from components.training.koo import Distillation
from components.training.loop import Training
from components.training.objectives import ClassifierObjective, PurifierObjective
from pipelines.config.meanings import MEANINGS
from pipelines.config.resources import Count
from pipelines.config.search_space import Domain

Name = Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
# The names of the attacks on every rung.
Ladder = dict[str, list[Name]]


class Section(Config):
    """What every entry of the training sections has."""

    objective: Any
    training: Training

    @model_validator(mode="after")
    def _pool_unmoved(self) -> Self:
        augmentation = self.training.augmentation
        if takes_pool(self.objective) and augmentation != "none":
            raise ValueError(MOVED.format(augmentation))
        return self


class Classifier(Section):
    """One classifier to train."""

    model: ClassifierConfig
    objective: ClassifierObjective


class Purifier(Section):
    """One purifier to train."""

    model: PurifierConfig
    objective: PurifierObjective


class Student(Section):
    """One purifier to distil, from one or two of the purifiers.

    A teacher whose objective has an adversary is an adversarial one, any other is a normal one.
    """

    # Two at most: dvc.yaml depends on the first and the last of them.
    teachers: Annotated[list[Name], Field(min_length=1, max_length=2)]
    model: PurifierConfig
    objective: Distillation

    @model_validator(mode="after")
    def _different(self) -> Self:
        if len(set(self.teachers)) < len(self.teachers):
            raise ValueError(f"teachers names {self.teachers[0]} twice: name it once")
        return self


class Finetuned(Section):
    """One purifier to fine-tune by AToP, starting from the purifier named `base`."""

    base: Name
    objective: Atop


def _unspaced(path: str) -> str:
    if path.split() != [path]:
        raise ValueError("a path here is neither empty nor has white space: rename the file")
    return path


# It stands in a command line of dvc.yaml.
Unspaced = Annotated[str, AfterValidator(_unspaced)]


class External(Config):
    """A network of a user's own: a classifier, or a purifier in front of one.

    `factory`, as `module:function`, lies in the file or folder `code`, is called with `arguments`
    and returns the network. `weights` is a file with its state_dict, or the same path as `code`
    where the function needs none: dvc.yaml depends on both.
    """

    code: Unspaced
    factory: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
    arguments: dict[str, Any]
    weights: Unspaced


class Pool(Config):
    """The attack on the frozen classifier that makes the adversarial training images."""

    attack: AttackConfig


class Baseline(Config):
    """A bare classifier to score: undefended, or adversarially trained."""

    classifier: Name
    ladder: Ladder


def bare_baseline(baselines: Mapping[str, Baseline], classifier: str) -> str | None:
    """Return the baseline that scores a classifier alone; None where there is none."""
    return next((name for name, one in baselines.items() if one.classifier == classifier), None)


class Defended(Config):
    """A trained network to score as a purifier, and which attacks run on which rung of the ladder.

    It stands in front of `classifier`. A network that is a purifier by itself needs no `inference`.
    """

    classifier: Name
    model: Name
    inference: InferenceConfig | None = None
    ladder: Ladder


class Control(Config):
    """A purifier without training, scored to see what a learned one adds to a `classifier`."""

    classifier: Name
    purifier: ControlConfig
    ladder: Ladder


class Published(Config):
    """What a paper reports of a defense: accuracies in [0,1], `clean` and by mode/attack."""

    source: Annotated[str, Field(min_length=1)]
    accuracy: dict[str, Annotated[float, Field(ge=0, le=1)]]


class Scoring(Config):
    """How many draws select and score for a stochastic defense, and how many images are shown."""

    select_draws: Count
    score_draws: Count
    shown: Count

    @model_validator(mode="after")
    def _divides(self) -> Self:
        # Accuracies over either are compared in whole counts.
        if self.score_draws % self.select_draws:
            raise ValueError(
                f"score_draws {self.score_draws} must be a multiple of select_draws "
                f"{self.select_draws}"
            )
        return self


def _installed(named: dict[str, str]) -> dict[str, str]:
    ours = [name for name in named if name in MEANINGS]
    if ours:
        raise ValueError(
            f"{ours[0]} is the name of one of Limpid's own checks: the plugin's needs another name"
        )
    plugins.checks(named)
    return named


class Checks(Config):
    """How many test images each probe uses, and whether the probes that cost attacks are run.

    `plugins` are the checks from outside that are asked, too, with the plugin of each.
    """

    images: Annotated[int, Field(ge=32)]
    thorough: bool
    plugins: Annotated[dict[Name, str], AfterValidator(_installed)] = {}


class Resolved(Config):
    """One scored entry with all settings that its adversarial sets depend on, and no others.

    `ladder` holds the attacks of every rung by the names of their sets; on rungs that replay sets,
    `replayed` names the baselines whose sets these are. Attacks without a threat of their own stay
    in `threat`.
    """

    classifier: Name
    model: Name | None
    inference: InferenceConfig | None
    control: ControlConfig | None
    ladder: dict[str, dict[Name, AttackConfig]]
    replayed: dict[str, Name]
    threat: Threat
    checks: Checks


def usage(entry: Baseline | Defended | Control) -> dict[str, Any]:
    """Return the models of an entry and how they are used, by the fields of `Resolved`."""
    return {
        "classifier": entry.classifier,
        "model": entry.model if isinstance(entry, Defended) else None,
        "inference": entry.inference if isinstance(entry, Defended) else None,
        "control": entry.purifier if isinstance(entry, Control) else None,
    }


class Study(Config):
    """One search: which parameters it varies, and its goal.

    A trial of `defense` is scored on the first `images` validation images by the worst attack of
    its short `ladder`. `robust` maximises that accuracy and stops weak trials after `grace` epochs
    and then whenever the epochs have grown by the factor `reduction` (ASHA); `pareto` looks for the
    front of clean accuracy, robust accuracy and purification time, and trains every trial to its
    end.
    """

    defense: Name
    goal: Literal["robust", "pareto"]
    space: Annotated[dict[str, Domain], Field(min_length=1)]
    ladder: Ladder
    images: Annotated[int, Field(ge=16)]
    trials: Count
    grace: Count
    reduction: Annotated[int, Field(ge=2)]


class Tuning(Config):
    """All searches; those named in `run` are stages of `dvc repro`."""

    run: list[Name]
    studies: dict[Name, Study]


class Trained(Config):
    """The networks that are trained, what each is made from, and how each is used."""

    purifiers: dict[Name, Purifier]
    students: dict[Name, Student]
    atop: dict[Name, Finetuned]
    defenses: dict[Name, Defended]

    def model_of(self, name: str) -> PurifierConfig:
        """Return the network of a purifier, student or fine-tuned purifier."""
        if name in self.atop:
            return self.model_of(self.atop[name].base)
        sections: dict[str, Purifier | Student] = {**self.purifiers, **self.students}
        return sections[name].model

    def stochastic(self, defense: str) -> bool:
        """Say whether a defense draws noise."""
        one = self.defenses[defense]
        return stochastic(self.model_of(one.model), one.inference)

    def section_of(self, name: str) -> str:
        """Return the key of the section that holds a network."""
        return next(s for s in ("purifiers", "students", "atop") if name in getattr(self, s))

    def lineage(self, name: str) -> list[str]:
        """Return the networks that `name` is made from, and then `name`, in training order."""
        parents: list[str] = []
        if name in self.students:
            parents = self.students[name].teachers
        elif name in self.atop:
            parents = [self.atop[name].base]
        line = [one for parent in parents for one in self.lineage(parent)]
        return list(dict.fromkeys([*line, name]))
