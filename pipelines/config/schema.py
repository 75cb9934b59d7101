"""params.yaml as frozen, strict sections: the one place that reads YAML.

A stage sees only its own view of the parameters, and `tracks` says which keys of params.yaml that
view is made of; a test holds dvc.yaml to it. Mistakes are found before anything starts and end in
one sentence with the nearest valid name.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from components.attacks import AttackConfig, Threat
from components.attacks.ladder import MODES, REPLAYED, SURROGATE
from components.config import Config
from components.models.classifiers import ClassifierConfig
from components.models.defense import STAND_INS
from components.models.purifiers import ControlConfig, InferenceConfig, PurifierConfig
from components.sources import DataConfig
from components.training.atop import Atop
from components.training.koo import Distillation
from components.training.loop import Training
from components.training.objectives import ClassifierObjective, PurifierObjective
from pipelines.config.resources import Count, Resources
from pipelines.config.search_space import Domain, get
from pipelines.config.yaml_files import read_yaml
from pipelines.errors import ConfigError, near

PARAMS = Path("params.yaml")
Name = Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
Ladder = dict[str, list[Name]]
# Networks that have a training of their own, and those that map no image to an image.
OBJECTIVES = {"magnet": "reformer_detectors", "ddpm": "noise_prediction", "gan": "wgan_gp"}
GENERATIVE = ("ddpm", "gan")


class Section(Config):
    """What every entry of the training sections has."""

    objective: Any
    training: Training


class Classifier(Section):
    """One classifier to train."""

    model: ClassifierConfig
    objective: ClassifierObjective


class Purifier(Section):
    """One purifier to train."""

    model: PurifierConfig
    objective: PurifierObjective


class Student(Section):
    """One purifier to distil; the teachers are names of purifiers."""

    adversarial_teacher: Name
    normal_teacher: Name
    model: PurifierConfig
    objective: Distillation


class Finetuned(Section):
    """One purifier to fine-tune by AToP, starting from the named purifier."""

    base: Name
    objective: Atop


class Pool(Config):
    """The adversarial training pool: x' against the frozen classifier."""

    attack: AttackConfig


class Baseline(Config):
    """A bare classifier to score: undefended, or adversarially trained."""

    classifier: Name
    ladder: Ladder


class Defended(Config):
    """A trained network to score as a purifier, and which attacks on which rung of the ladder.

    What is itself a purifier needs no `inference`.
    """

    model: Name
    inference: InferenceConfig | None = None
    ladder: Ladder


class Control(Config):
    """A purifier without training, scored to see what a learned one is worth."""

    purifier: ControlConfig
    ladder: Ladder


class Published(Config):
    """What a paper prints of a defense: shares right, of `clean` images and by mode/attack."""

    source: Annotated[str, Field(min_length=1)]
    accuracy: dict[str, Annotated[float, Field(ge=0, le=1)]]


class Scoring(Config):
    """How many draws of noise select and score for a stochastic defense, and how many to show."""

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


class Checks(Config):
    """How many test images each probe looks at, and whether those that cost attacks are run."""

    images: Annotated[int, Field(ge=16)]
    thorough: bool


class Study(Config):
    """One search: which places of the parameters to turn, and what for.

    `defense` is judged on the first `images` validation images by the worst of its short `ladder`.
    `robust` looks for the highest accuracy under it and stops weak trials after `grace` epochs and
    then whenever the epochs have grown by the factor `reduction` (ASHA); `pareto` looks for the
    front of clean accuracy, robust accuracy and purification time, and trains all trials out.
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
    """What is trained, from what, and how it is used."""

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

    def section_of(self, name: str) -> str:
        """Return which section a network stands in."""
        return next(s for s in ("purifiers", "students", "atop") if name in getattr(self, s))

    def lineage(self, name: str) -> list[str]:
        """Return what `name` is made from, and then itself, in the order of training."""
        parents: list[str] = []
        if name in self.students:
            student = self.students[name]
            parents = [student.adversarial_teacher, student.normal_teacher]
        elif name in self.atop:
            parents = [self.atop[name].base]
        line = [one for parent in parents for one in self.lineage(parent)]
        return list(dict.fromkeys([*line, name]))


class Params(Trained):
    """All of params.yaml."""

    seed: Annotated[int, Field(ge=0)]
    threat: Threat
    data: DataConfig
    rows_per_part: Count
    batch: Count
    classifiers: dict[Name, Classifier]
    pool: Pool
    attacks: dict[Name, AttackConfig]
    baselines: dict[Name, Baseline]
    controls: dict[Name, Control]
    published: dict[Name, Published]
    tuning: Tuning
    scoring: Scoring
    checks: Checks
    resources: Resources

    @model_validator(mode="after")
    def _names(self) -> Self:
        trained = [*self.classifiers, *self.purifiers, *self.students, *self.atop]
        scored = [*self.baselines, *self.defenses, *self.controls]
        for kind, names in (("models", trained), ("scored defenses", scored)):
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(f"two {kind} share the name {', '.join(sorted(twice))}")
        for needed in ("standard", "unseen"):
            _known("classifiers", needed, self.classifiers)
        _known("baselines", "none", self.baselines)
        learnt: dict[str, Purifier | Student] = {**self.purifiers, **self.students}
        for name, one in learnt.items():
            _learnable(name, one.model.kind, one.objective.kind)
        for student, section in self.students.items():
            for teacher in (section.adversarial_teacher, section.normal_teacher):
                _known(f"students.{student}", teacher, self.purifiers)
                _pictures(f"students.{student}", teacher, self.purifiers)
        for name, finetuned in self.atop.items():
            _known(f"atop.{name}.base", finetuned.base, self.purifiers)
            _pictures(f"atop.{name}.base", finetuned.base, self.purifiers)
        for name, baseline in self.baselines.items():
            _known(f"baselines.{name}.classifier", baseline.classifier, self.classifiers)
        purifiers = {**self.purifiers, **self.students, **self.atop}
        for name, defended in self.defenses.items():
            _known(f"defenses.{name}.model", defended.model, purifiers)
            _usable(f"defenses.{name}", defended, self.model_of(defended.model))
        scored_with: dict[str, Baseline | Defended | Control] = {
            **self.baselines,
            **self.defenses,
            **self.controls,
        }
        for name, scored_one in scored_with.items():
            for mode, attacks in scored_one.ladder.items():
                _known(f"ladder of {name}", mode, dict.fromkeys(MODES))
                if mode == "transfer":
                    _known(f"ladder of {name}: transfer", SURROGATE, self.baselines)
                for attack in attacks:
                    _known(f"ladder of {name}", attack, self.attacks)
        for name, published in self.published.items():
            _known("published", name, scored_with)
            ladder = scored_with[name].ladder
            sets = [f"{mode}/{attack}" for mode, attacks in ladder.items() for attack in attacks]
            for figure in published.accuracy:
                _known(f"published.{name}.accuracy", figure, dict.fromkeys(["clean", *sets]))
        return self

    @model_validator(mode="after")
    def _searchable(self) -> Self:
        document = self.model_dump(mode="json", by_alias=True) if self.tuning.studies else {}
        for name in self.tuning.run:
            _known("tuning.run", name, self.tuning.studies)
        for name, study in self.tuning.studies.items():
            where = f"tuning.studies.{name}"
            _known(f"{where}.defense", study.defense, self.defenses)
            self._tries(where, study)
            model = self.defenses[study.defense].model
            tried = self.defenses[study.defense].model_copy(update={"ladder": study.ladder})
            _usable(where, tried, self.model_of(model))
            turned = [f"{self.section_of(one)}.{one}" for one in self.lineage(model)]
            turned.append(f"defenses.{study.defense}.inference")
            for place in study.space:
                if not place.startswith(tuple(f"{start}." for start in turned)):
                    raise ValueError(
                        f"{where}.space: {place} plays no part in {study.defense}, made of "
                        f"{', '.join(turned)}"
                    )
                if not isinstance(get(document, place), bool | int | float | str):
                    raise ValueError(f"{where}.space: {place} is no single value")
        return self

    def _tries(self, where: str, study: Study) -> None:
        """Refuse a ladder that does not see through the defense, or leaves the ball."""
        if not any(study.ladder.get(mode) for mode in ("full", *STAND_INS)):
            raise ValueError(f"{where}.ladder needs an attack that sees through, on the rung full")
        for mode, attacks in study.ladder.items():
            _known(f"{where}.ladder", mode, dict.fromkeys(m for m in MODES if m not in REPLAYED))
            for attack in attacks:
                _known(f"{where}.ladder", attack, self.attacks)
                if not self.attacks[attack].bounded:
                    raise ValueError(f"{where}.ladder: {attack} does not stay inside the threat")


def load(path: Path = PARAMS) -> Params:
    """Return the parameters; raise ConfigError in one sentence for anything wrong with them."""
    try:
        return Params.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error)}") from None


def explain(error: ValidationError) -> str:
    """Say in one sentence what is wrong, where, and what would be right."""
    errors = error.errors()
    # A misspelt key is missing under its right name too; the misspelling is what helps.
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    fields, kinds = _names()
    # Pydantic puts the tag of a union into the path; nobody looks for it there.
    where = ".".join(str(part) for part in first["loc"] if part not in kinds)
    if first["type"] == "extra_forbidden":
        return f"unknown key {where}{near(str(first['loc'][-1]), fields)}"
    if first["type"] == "missing":
        return f"{where} is missing"
    message, given = first["msg"].removeprefix("Value error, "), first["input"]
    if first["type"] == "union_tag_invalid":
        message += near(str(first["ctx"]["tag"]), kinds)
    shown = f" (given {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{where + ': ' if where else ''}{message}{shown}"


def _learnable(where: str, model: str, objective: str) -> None:
    needed = OBJECTIVES.get(model)
    if needed and objective != needed:
        raise ValueError(f"{where}: a {model} is trained by {needed}, not by {objective}")
    if not needed and objective in OBJECTIVES.values():
        fits = next(kind for kind, its in OBJECTIVES.items() if its == objective)
        raise ValueError(f"{where}: {objective} trains a {fits}, not a {model}")


def _pictures(where: str, name: str, purifiers: Mapping[str, Purifier]) -> None:
    kind = purifiers[name].model.kind
    if kind in GENERATIVE:
        raise ValueError(f"{where} names {name}, a {kind}, which makes no image of an image")


def _usable(where: str, defended: Defended, model: PurifierConfig) -> None:
    inference = defended.inference
    if inference is None:
        if model.kind in GENERATIVE:
            raise ValueError(f"{where}: a {model.kind} is no purifier by itself: say its inference")
        return
    try:
        inference.require(model)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    known = inference.offers()
    for mode in defended.ladder:
        if mode in STAND_INS and mode not in known:
            has = ", ".join(known)
            raise ValueError(f"the ladder of {where} names {mode}; {inference.kind} offers {has}")


def _known(where: str, name: str, names: Mapping[str, object]) -> None:
    if name not in names:
        hint = near(name, names) or f"; there are {', '.join(names) or 'none'}"
        raise ValueError(f"{where} names {name}, which is not there{hint}")


@functools.cache
def _names() -> tuple[frozenset[str], frozenset[str]]:
    """Return every field name and every tag that any section knows."""
    schema = TypeAdapter(Params).json_schema()
    fields, kinds = set(), set()
    for part in (schema, *schema["$defs"].values()):
        for name, value in part.get("properties", {}).items():
            fields.add(name)
            if name in ("kind", "norm"):
                kinds.add(str(value.get("const")))
    return frozenset(fields), frozenset(kinds)
