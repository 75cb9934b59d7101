"""A trial of a search trains the networks that its values change, and is compared at rungs."""

from pathlib import Path

import project
import pytest
from pydantic import TypeAdapter

from pipelines.config.schema import Params
from pipelines.config.search_space import Domain
from pipelines.errors import ConfigError
from pipelines.tasks.trial import StudySetup, rungs

STUDENT = "students.student_adaptive"


def params() -> Params:
    return Params.model_validate(project.tiny())


def study_setup(name: str, **space: dict) -> StudySetup:
    everything = params()
    study = everything.tuning.studies[name]
    if space:
        domains = {
            key: TypeAdapter(Domain).validate_python(domain) for key, domain in space.items()
        }
        study = study.model_copy(update={"space": domains})
    document = everything.model_dump(mode="json", by_alias=True)
    sections = {key: document[key] for key in ("purifiers", "students", "atop", "defenses")}
    here = Path("nowhere")
    return StudySetup(
        study, sections, everything, everything.threat, everything.attacks, everything.scoring,
        everything.resources, here, here, here, here,
    )  # fmt: skip


def test_a_trial_trains_the_networks_in_its_space_and_those_made_from_them() -> None:
    unit = {"kind": "uniform", "low": 0.1, "high": 0.9}
    own = study_setup("student", **{f"{STUDENT}.objective.beta": unit})
    assert own.retrained(own.sections({})) == ["student_adaptive"]
    assert own.epochs(own.sections({f"{STUDENT}.training.epochs": 3})) == 3
    above = study_setup("student", **{"purifiers.normal_teacher.training.learning_rate": unit})
    assert above.retrained(above.sections({})) == ["normal_teacher", "student_adaptive"]
    base = study_setup("atop", **{"purifiers.masked.model.transform.missing": unit})
    assert base.retrained(base.sections({})) == ["masked", "atop"]
    steps = {"defenses.apudae.inference.steps": {"kind": "integer", "low": 1, "high": 4}}
    used = study_setup("student", **steps)
    used = StudySetup(
        **{**vars(used), "study": used.study.model_copy(update={"defense": "apudae"})}
    )
    assert used.retrained(used.sections({})) == [] and used.epochs(used.sections({})) == 1


def test_a_value_that_is_not_valid_is_named() -> None:
    with pytest.raises(ConfigError, match=r"missing = 1\.5 is not valid.*missing"):
        study_setup("atop").sections({"purifiers.masked.model.transform.missing": 1.5})


def test_a_value_that_makes_the_defense_too_random_for_the_ladder_is_refused() -> None:
    noise = "defenses.apudae.inference.noise_255"
    setup = study_setup("student", **{noise: {"kind": "uniform", "low": 0, "high": 8}})
    study = setup.study.model_copy(update={"defense": "apudae"})
    setup = StudySetup(**{**vars(setup), "study": study})
    assert study.ladder == {"full": ["a3"]}
    setup.sections({noise: 0.0})
    with pytest.raises(ConfigError, match=r"noise_255 = 8\.0 is not valid: its ladder names a3 on"):
        setup.sections({noise: 8.0})


def test_rungs_grow_by_the_factor_and_exclude_the_last_epoch() -> None:
    study = params().tuning.studies["student"]
    study = study.model_copy(update={"grace": 2, "reduction": 3})
    assert rungs(study, 18) == {2, 6}
    assert rungs(study, 19) == {2, 6, 18}
    assert rungs(study.model_copy(update={"goal": "pareto"}), 19) == frozenset()
