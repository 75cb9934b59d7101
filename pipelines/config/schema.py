"""All of params.yaml, read strictly: every mistake is found before anything starts.

A mistake ends in one sentence with the nearest valid name. `Params` checks what depends on several
sections: that names exist, that networks fit their objectives, and that ladders and searches can
run. A stage sees only its own view of the parameters (`views`).
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from components import plugins
from components.attacks import L2, Attack, AttackConfig, Linf, Threat
from components.attacks.contract import MODES, NEEDED, REPLAYED, SURROGATE, WRITTEN_ATTACKS
from components.models.defense import STAND_INS
from components.models.purifiers import PurifierSection, stochastic
from components.sources import DataConfig
from pipelines.config.resources import Count, Resources
from pipelines.config.search_space import get
from pipelines.config.sections import (
    Baseline,
    Checks,
    Classifier,
    Control,
    Defended,
    External,
    Ladder,
    Name,
    Pool,
    Published,
    Purifier,
    Scoring,
    Student,
    Study,
    Trained,
    Tuning,
    bare_baseline,
)
from pipelines.config.yaml_files import read_yaml
from pipelines.errors import ConfigError, near
from pipelines.layout import PARAMS

# Kinds of networks that need an objective of their own.
OBJECTIVES = {"magnet": "reformer_detectors", "ddpm": "noise_prediction", "gan": "wgan_gp"}
# Keys that files of older versions lack.
ADDED = ("training_threat", "classifier", "early_stop", "loss", "teachers", "external")
DROPPED = ("adversarial_teacher", "normal_teacher")
MIGRATE = "; `limpid configure --migrate` brings an older file up to date"
PIN = ": `limpid configure --plugins` writes it"
# Kinds of networks that map no image to an image.
GENERATIVE = ("ddpm", "gan")


class Params(Trained):
    """All of params.yaml."""

    seed: Annotated[int, Field(ge=0)]
    threat: Threat
    training_threat: Threat
    data: DataConfig
    rows_per_part: Count
    batch: Count
    external: dict[Name, External]
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

    @property
    def scored(self) -> dict[str, Baseline | Defended | Control]:
        """Everything that is scored, by name."""
        return {**self.baselines, **self.defenses, **self.controls}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _check_names(self)
        _check_trainings(self)
        _check_scored(self)
        _check_published(self)
        _check_studies(self)
        return self


def load(path: Path = PARAMS) -> Params:
    """Return the parameters; raise ConfigError, in one sentence, for anything wrong with them."""
    try:
        return Params.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error)}") from None


def explain(error: ValidationError) -> str:
    """Return one sentence: where the parameters are wrong, why, and what would be right."""
    errors = error.errors()
    # A misspelt key is also reported as missing under its right name; the misspelling helps more.
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    fields, kinds = _vocabulary()
    # Pydantic puts the tags of unions into the path; params.yaml has no such keys.
    where = ".".join(str(part) for part in first["loc"] if part not in kinds)
    if first["type"] in ("extra_forbidden", "missing"):
        key = str(first["loc"][-1])
        # It may have the name of a tag.
        where = where if key not in kinds else f"{where}.{key}"
        old = key in (*ADDED, *DROPPED)
        if first["type"] == "missing":
            return f"{where} is missing{MIGRATE if old else ''}"
        return f"unknown key {where}{MIGRATE if old else near(key, fields)}"
    message, given = first["msg"].removeprefix("Value error, "), first["input"]
    if first["type"] == plugins.OTHER:
        return f"{where} {message}{PIN}"
    if first["type"] == "union_tag_invalid":
        message += near(str(first["ctx"]["tag"]), kinds) or plugins.hint(first)
    shown = f" (given {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{where + ': ' if where else ''}{message}{shown}"


@functools.cache
def _vocabulary() -> tuple[frozenset[str], frozenset[str]]:
    """Return every field name and every union tag of any section."""
    schema = TypeAdapter(Params).json_schema()
    fields, kinds = set(), set()
    for part in (schema, *schema["$defs"].values()):
        for name, value in part.get("properties", {}).items():
            fields.add(name)
            if name in ("kind", "norm"):
                kinds.add(str(value.get("const")))
    return frozenset(fields), frozenset(kinds)


def _check_names(params: Params) -> None:
    """Refuse a name that is used twice, and parameters without the models every line needs.

    Nor may an attack have the name of another kind: reports print names.
    """
    scored = [*params.baselines, *params.defenses, *params.controls]
    sections = (params.classifiers, params.purifiers, params.students, params.atop, params.external)
    networks = [name for section in sections for name in section]
    for kind, names in (("models", networks), ("scored defenses", scored)):
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"two {kind} share the name {', '.join(sorted(twice))}")
    for name, attack in params.attacks.items():
        if name != attack.kind and name in plugins.members(AttackConfig):
            raise ValueError(
                f"attacks.{name} is of kind {attack.kind}: name it otherwise, since {name} is the "
                "name of another kind"
            )
    for needed in ("standard", "unseen"):
        _require("classifiers", needed, {**params.classifiers, **params.external})
    _require("baselines", "none", params.baselines)
    bare = params.baselines["none"].classifier
    if bare != "standard":
        raise ValueError(
            f"baselines.none.classifier is {bare}, but purifiers are trained in front of standard: "
            "score standard there, and other classifiers under other names"
        )
    for name, attack in params.attacks.items():
        for end in attack.endings():
            if end and name + end in params.attacks:
                raise ValueError(
                    f"attacks.{name}{end} has the name under which {name} is stored where it stops "
                    "at the first success: name it otherwise"
                )


def _check_trainings(params: Params) -> None:
    """Refuse an objective that does not fit its network, and parents that are no purifiers."""
    sections: dict[str, Purifier | Student] = {**params.purifiers, **params.students}
    for name, section in sections.items():
        _require_objective(name, section.model.kind, section.objective.kind)
    parents = [
        (f"students.{name}", teacher)
        for name, student in params.students.items()
        for teacher in student.teachers
    ]
    parents += [(f"atop.{name}.base", section.base) for name, section in params.atop.items()]
    for where, parent in parents:
        _require(where, parent, params.purifiers)
        kind = params.purifiers[parent].model.kind
        if kind in GENERATIVE:
            raise ValueError(f"{where} names {parent}, a {kind}, which maps no image to an image")


def _require_objective(where: str, model: str, objective: str) -> None:
    needed = OBJECTIVES.get(model)
    if needed and objective != needed:
        raise ValueError(f"{where}: a {model} is trained by {needed}, not by {objective}")
    if not needed and objective in OBJECTIVES.values():
        fits = next(kind for kind, its in OBJECTIVES.items() if its == objective)
        raise ValueError(f"{where}: {objective} trains a {fits}, not a {model}")


def _check_scored(params: Params) -> None:
    """Refuse a baseline or defense without its network, and a ladder that cannot be climbed."""
    for name, scored in params.scored.items():
        _require(f"{name}.classifier", scored.classifier, {**params.classifiers, **params.external})
    for name, baseline in params.baselines.items():
        first = bare_baseline(params.baselines, baseline.classifier)
        if name != first:
            raise ValueError(
                f"baselines.{name} and baselines.{first} score the same classifier, "
                f"{baseline.classifier}: keep one"
            )
    purifiers = {**params.purifiers, **params.students, **params.atop, **params.external}
    for name, defended in params.defenses.items():
        _require(f"defenses.{name}.model", defended.model, purifiers)
        if defended.model in params.external:
            _require_purifier(name, defended, params)
        else:
            _require_usable(f"defenses.{name}", defended, params.model_of(defended.model))
    for name, scored in params.scored.items():
        for mode, attacks in scored.ladder.items():
            _require(f"ladder of {name}", mode, dict.fromkeys(MODES))
            if mode == "transfer":
                _require(f"ladder of {name}: transfer", SURROGATE, params.baselines)
            for attack in attacks:
                _require(f"ladder of {name}", attack, params.attacks)
        random: bool | None = isinstance(scored, Control) and stochastic(scored.purifier, None)
        if isinstance(scored, Defended) and scored.model not in params.external:
            random = params.stochastic(name)
        if params.external.keys() & {scored.classifier, getattr(scored, "model", None)}:
            # One random half makes a random defense, whatever the other is.
            random = random or None
        bare = None if params.external else False
        where = f"ladder of {name}"
        require_fit(where, scored.ladder, params.attacks, random, params.threat, bare)
        if not isinstance(scored, Baseline):
            _require_bare(name, scored, params)


def _require_bare(name: str, scored: Defended | Control, params: Params) -> None:
    """Refuse an entry without a row of its classifier alone, under the same kinds of attacks.

    What the classifier withstands by itself is no merit of the purifier. Attacks for random
    defenses and for detectors say nothing about a bare classifier.
    """
    bare = bare_baseline(params.baselines, scored.classifier)
    if bare is None:
        raise ValueError(
            f"{name} stands in front of {scored.classifier}, which is not scored alone: add a "
            f"baseline with classifier: {scored.classifier}"
        )
    kinds = {params.attacks[attack].kind for attack in _crafted(bare, params)}
    for attack in scored.ladder.get("full", []):
        one = params.attacks[attack]
        if one.kind not in (*kinds, *WRITTEN_ATTACKS) and one.fits(False):
            raise ValueError(
                f"the ladder of {name} has {attack}, and no {one.kind} attacks its classifier "
                f"alone: add {attack} to baselines.{bare}.ladder.full"
            )
    for mode, baseline in (("classifier", bare), ("transfer", SURROGATE)):
        there = _crafted(baseline, params) if mode in scored.ladder else []
        for attack in scored.ladder.get(mode, []):
            if attack not in there:
                raise ValueError(
                    f"the rung {mode} of {name} replays {attack}, which baselines.{baseline} does "
                    f"not craft: add {attack} to its ladder.full"
                )


def _crafted(baseline: str, params: Params) -> list[str]:
    """Return the attacks that a baseline crafts on the rung that others replay."""
    return params.baselines[baseline].ladder.get("full", [])


def _require_purifier(name: str, defended: Defended, params: Params) -> None:
    """Refuse an external network that is used as a purifier and otherwise, or by an inference."""
    if defended.inference is not None:
        raise ValueError(
            f"defenses.{name}: {defended.model} is external and a purifier by itself: leave its "
            "inference out"
        )
    classifiers = [one.classifier for one in params.scored.values()]
    if defended.model in classifiers:
        raise ValueError(
            f"defenses.{name}: {defended.model} is the purifier here and a classifier elsewhere: "
            "import it twice, under two names"
        )


def _require_usable(where: str, defended: Defended, model: PurifierSection) -> None:
    """Refuse an inference that does not fit the network, and stand-ins that it does not offer."""
    inference = defended.inference
    if inference is None:
        if model.kind in GENERATIVE:
            raise ValueError(
                f"{where}: a {model.kind} is no purifier by itself: give its inference"
            )
        return
    try:
        inference.require_fit(model)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    offered = inference.stand_ins()
    for mode in defended.ladder:
        if mode in NEEDED and NEEDED[mode] not in offered:
            needs = "" if mode in STAND_INS else f", which needs {NEEDED[mode]}"
            raise ValueError(
                f"the ladder of {where} names {mode}{needs}; {inference.kind} offers "
                f"{', '.join(offered)}"
            )


def _check_published(params: Params) -> None:
    """Refuse published accuracies of defenses, modes or attacks that are not scored here."""
    for name, published in params.published.items():
        _require("published", name, params.scored)
        ladder = params.scored[name].ladder
        sets = [f"{mode}/{attack}" for mode, attacks in ladder.items() for attack in attacks]
        for key in published.accuracy:
            _require(f"published.{name}.accuracy", key, dict.fromkeys(["clean", *sets]))


def _check_studies(params: Params) -> None:
    """Refuse a search for an unknown defense, or one whose space or ladder makes no sense."""
    studies = params.tuning.studies
    document = params.model_dump(mode="json", by_alias=True) if studies else {}
    for name in params.tuning.run:
        _require("tuning.run", name, studies)
    for name, study in studies.items():
        where = f"tuning.studies.{name}"
        _require(f"{where}.defense", study.defense, params.defenses)
        if params.defenses[study.defense].model in params.external:
            raise ValueError(
                f"{where}.defense: {study.defense} uses an external network, which is not trained "
                "here: nothing of it can be searched"
            )
        _check_study_ladder(where, study, params)
        model = params.defenses[study.defense].model
        tried = params.defenses[study.defense].model_copy(update={"ladder": study.ladder})
        _require_usable(where, tried, params.model_of(model))
        prefixes = [f"{params.section_of(one)}.{one}" for one in params.lineage(model)]
        prefixes.append(f"defenses.{study.defense}.inference")
        for key in study.space:
            if not key.startswith(tuple(f"{prefix}." for prefix in prefixes)):
                raise ValueError(
                    f"{where}.space: {key} plays no part in {study.defense}, made of "
                    f"{', '.join(prefixes)}"
                )
            if not isinstance(get(document, key), bool | int | float | str):
                raise ValueError(f"{where}.space: {key} is no single value")


def _check_study_ladder(where: str, study: Study, params: Params) -> None:
    """Refuse a ladder without an attack through the purifier, and attacks that leave the ball."""
    if not any(study.ladder.get(mode) for mode in ("full", *STAND_INS)):
        raise ValueError(
            f"{where}.ladder needs an attack that sees through the purifier, on the rung full"
        )
    for mode, attacks in study.ladder.items():
        _require(f"{where}.ladder", mode, dict.fromkeys(m for m in MODES if m not in REPLAYED))
        for attack in attacks:
            _require(f"{where}.ladder", attack, params.attacks)
            if not params.attacks[attack].inside(params.threat):
                raise ValueError(f"{where}.ladder: {attack} does not stay inside the threat")
    random = params.stochastic(study.defense)
    require_fit(f"{where}.ladder", study.ladder, params.attacks, random, params.threat)


def require_fit(
    where: str,
    ladder: Ladder,
    attacks: Mapping[str, Attack],
    stochastic: bool | None,
    threat: Linf | L2,
    bare: bool | None = False,
) -> None:
    """Raise ValueError where an attack of a ladder is not for the defense, or not for its threat.

    `stochastic` says whether the defense draws noise. Where sets are replayed they were crafted
    against a bare classifier, and `bare` says whether that draws any. None is for what is known
    only when an external network is imported: crafting refuses what does not fit it.
    """
    for mode, names in ladder.items():
        random = bare if mode in REPLAYED else stochastic
        for name in names:
            try:
                if random is not None:
                    attacks[name].require_fit(random and mode != "fixed_noise")
                attacks[name].require_norm(threat)
            except ValueError as error:
                raise ValueError(f"{where} names {name} on the rung {mode}: {error}") from None


def _require(where: str, name: str, names: Mapping[str, Any]) -> None:
    if name not in names:
        hint = near(name, names) or f"; there are {', '.join(names) or 'none'}"
        raise ValueError(f"{where} names {name}, which is not there{hint}")
