"""Searches: what a trial trains, how trials are ranked, and one search, killed and resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import project
import pytest
from pydantic import TypeAdapter
from ruamel.yaml import YAML

from pipelines.config.schema import Params
from pipelines.config.search_space import Domain, flatten, get, nest, put
from pipelines.config.sections import Study
from pipelines.config.yaml_files import edit_yaml
from pipelines.errors import ConfigError
from pipelines.reporting import leaderboard
from pipelines.reporting.leaderboard import Trial
from pipelines.tasks.trial import Task, _rungs

STUDENT = "students.student_adaptive"


def params(**changes: object) -> Params:
    return Params.model_validate(put(project.tiny(), changes))


def study_task(name: str, **space: dict) -> Task:
    everything = params()
    study = everything.tuning.studies[name]
    if space:
        domains = {
            place: TypeAdapter(Domain).validate_python(domain) for place, domain in space.items()
        }
        study = study.model_copy(update={"space": domains})
    document = everything.model_dump(mode="json", by_alias=True)
    sections = {key: document[key] for key in ("purifiers", "students", "atop", "defenses")}
    here = Path("nowhere")
    return Task(
        study, sections, everything, everything.attacks, everything.scoring, everything.resources,
        here, here, here, here,
    )  # fmt: skip


# Dials


def test_values_get_to_their_places_and_nowhere_else() -> None:
    before = {"a": {"b": {"c": 1, "d": 2}}, "e": 3}
    after = put(before, {"a.b.c": 7})
    assert after == {"a": {"b": {"c": 7, "d": 2}}, "e": 3}
    assert before["a"] == {"b": {"c": 1, "d": 2}}
    assert get(after, "a.b.c") == 7
    assert nest({"a.b.c": 7, "a.x": 1}) == {"a": {"b": {"c": 7}, "x": 1}}
    assert dict(flatten(nest({"a.b.c": 7, "a.x": 1}))) == {"a.b.c": 7, "a.x": 1}


@pytest.mark.parametrize("place", ["a.x", "a.b.c.d", "z", "a..c"])
def test_a_place_that_is_not_there_is_refused(place: str) -> None:
    with pytest.raises(ValueError, match="there is no"):
        put({"a": {"b": {"c": 1}}}, {place: 1})


@pytest.mark.parametrize(
    ("domain", "inside", "outside"),
    [
        ({"kind": "uniform", "low": 0, "high": 1}, [0, 0.5, 1], [-0.1, 1.1, "0.5", True]),
        ({"kind": "log_uniform", "low": 0.1, "high": 10}, [0.1, 10], [0.01]),
        ({"kind": "integer", "low": 2, "high": 4}, [2, 4], [1, 5]),
        ({"kind": "choice", "values": ["a", "b"]}, ["a"], ["c", 1]),
    ],
)
def test_a_dial_knows_its_range(domain: dict, inside: list, outside: list) -> None:
    built = TypeAdapter(Domain).validate_python(domain)
    assert all(built.contains(value) for value in inside)
    assert not any(built.contains(value) for value in outside)
    assert all(built.contains(end) for end in built.ends())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tuning.run": ["nobody"]}, "tuning.run names nobody"),
        ({"tuning.studies.student.defense": "studnt_adaptive"}, "did you mean student_adaptive"),
        ({"tuning.studies.student.ladder": {"bpda": ["pgd"]}}, "sees through"),
        ({"tuning.studies.student.ladder": {"full": ["cw"]}}, "stay inside the threat"),
        ({"tuning.studies.student.ladder": {"classifier": ["pgd"]}}, "sees through"),
        ({"tuning.studies.student.ladder": {"full": ["pgd"], "transfer": ["pgd"]}}, "transfer"),
        (
            {"tuning.studies.student.space": {"classifiers.standard.model.width": "DIAL"}},
            "plays no part in student_adaptive",
        ),
        ({"tuning.studies.student.space": {f"{STUDENT}.objective": "DIAL"}}, "no single value"),
        ({"tuning.studies.student.space": {f"{STUDENT}.objective.bta": "DIAL"}}, "there is no"),
    ],
)
def test_a_study_that_makes_no_sense_is_one_sentence(change: dict, says: str) -> None:
    domain = {"kind": "uniform", "low": 0, "high": 1}
    value = {
        place: {k: domain if v == "DIAL" else v for k, v in given.items()}
        if isinstance(given, dict)
        else given
        for place, given in change.items()
    }
    with pytest.raises(ValueError, match=says):
        params(**value)


# Trials


def test_a_trial_trains_what_its_dials_touch_and_what_comes_of_it() -> None:
    unit = {"kind": "uniform", "low": 0.1, "high": 0.9}
    own = study_task("student", **{f"{STUDENT}.objective.beta": unit})
    assert own.retrained(own.sections({})) == ["student_adaptive"]
    assert own.epochs(own.sections({f"{STUDENT}.training.epochs": 3})) == 3
    above = study_task("student", **{"purifiers.normal_teacher.training.learning_rate": unit})
    assert above.retrained(above.sections({})) == ["normal_teacher", "student_adaptive"]
    base = study_task("atop", **{"purifiers.masked.model.transform.missing": unit})
    assert base.retrained(base.sections({})) == ["masked", "atop"]
    steps = {"defenses.apudae.inference.steps": {"kind": "integer", "low": 1, "high": 4}}
    used = study_task("student", **steps)
    used = Task(**{**vars(used), "study": used.study.model_copy(update={"defense": "apudae"})})
    assert used.retrained(used.sections({})) == [] and used.epochs(used.sections({})) == 1


def test_an_end_of_a_dial_that_cannot_be_is_said_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match=r"missing = 1\.5 is none.*missing"):
        study_task("atop").sections({"purifiers.masked.model.transform.missing": 1.5})


def test_rungs_grow_by_the_factor_and_leave_the_end_out() -> None:
    study = params().tuning.studies["student"]
    study = study.model_copy(update={"grace": 2, "reduction": 3})
    assert _rungs(study, 18) == {2, 6}
    assert _rungs(study, 19) == {2, 6, 18}
    assert _rungs(study.model_copy(update={"goal": "pareto"}), 19) == frozenset()


# Ranking


def trial(name: str, robust: float, clean: float, time: float = 1.0, n: int = 200) -> Trial:
    right = [1.0] * round(robust * n) + [0.0] * (n - round(robust * n))
    figures = {
        "robust": robust, "robust_low": robust, "robust_high": robust, "clean": clean,
        "seconds_per_image": time,
    }  # fmt: skip
    return Trial(name, {"a": 1.0}, figures, 4, right)


def study(goal: str) -> Study:
    return params().tuning.studies["student"].model_copy(update={"goal": goal})


def test_the_best_comes_first_and_what_chance_could_explain_is_tied() -> None:
    stopped = Trial("stopped", {"a": 1.0}, {"robust": 0.99, "clean": 1.0}, 2, None)
    given = [trial("far", 0.4, 1.0), stopped, trial("near", 0.795, 0.9), trial("best", 0.8, 0.9)]
    ranked = leaderboard.rank(given, study("robust"))
    assert [t.name for t in ranked] == ["best", "near", "far", "stopped"]
    assert [t.tied for t in ranked] == [True, True, False, False]
    assert not any(t.front for t in ranked)


def test_equal_robust_accuracy_is_decided_by_clean() -> None:
    ranked = leaderboard.rank([trial("b", 0.5, 0.8), trial("a", 0.5, 0.9)], study("robust"))
    assert [t.name for t in ranked] == ["a", "b"]


def test_the_front_is_what_nothing_betters_in_everything() -> None:
    figures = {"robust": (0.8, 0.7, 1.0), "clean": (0.5, 0.9, 1.0), "quick": (0.5, 0.7, 0.1)}
    figures |= {"beaten": (0.5, 0.7, 1.0), "twin": (0.8, 0.7, 1.0)}
    given = [trial(name, *values) for name, values in figures.items()]
    ranked = leaderboard.rank(given, study("pareto"))
    assert {t.name for t in ranked if t.front} == {"robust", "clean", "quick", "twin"}


# Adopting


TEXT = """\
# Kept.
one: &shared {rate: 0.1, steps: 3}  # this, too
two:
  training: *shared
  none: null
three: *shared
"""


def test_adopting_leaves_all_else_as_it_is_written() -> None:
    edited = edit_yaml(TEXT, {"two.training.rate": 0.5})
    read = YAML(typ="safe", pure=True).load(edited)
    assert read["two"]["training"] == {"rate": 0.5, "steps": 3}
    assert read["one"] == read["three"] == {"rate": 0.1, "steps": 3}
    assert read["two"]["none"] is None
    kept = set(TEXT.splitlines()) - {"  training: *shared"}
    assert kept <= set(edited.splitlines())


def test_an_anchor_changed_where_it_is_defined_changes_no_alias() -> None:
    read = YAML(typ="safe", pure=True).load(edit_yaml(TEXT, {"one.rate": 0.5}))
    assert (
        read["one"]["rate"] == 0.5
        and read["three"]["rate"] == read["two"]["training"]["rate"] == 0.1
    )


# One search as a user runs it


@pytest.fixture
def project_without_test(reproduced: Path, tmp_path: Path) -> Path:
    """A trained project whose test split is gone, with one short study."""
    folder = project.copy_to(tmp_path / "search")
    for name in ("data/train", "data/val", "models", "pool"):
        shutil.copytree(reproduced / name, folder / name)
    changed = project.tiny()
    changed["resources"]["trials"]["workers"] = 1
    training = changed["students"]["student_adaptive"]["training"]
    changed["students"]["student_adaptive"]["training"] = {**training, "epochs": 2}
    project.write_params(folder, changed)
    return folder


def results(folder: Path) -> dict[str, list[dict]]:
    found = {}
    for path in folder.glob(".limpid/work/tune-student-*/ray/study/*/result.json"):
        lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True)]
        found[path.parent.name] = lines
    return found


def ended(folder: Path) -> set[str]:
    return {name for name, lines in results(folder).items() if any("right" in r for r in lines)}


def test_a_killed_search_goes_on_and_its_find_is_adopted(project_without_test: Path) -> None:
    folder = project_without_test
    command = [sys.executable, "-m", "pipelines", "tune", "student"]
    first = project.start(folder, *command)
    until = time.monotonic() + 300
    while not ended(folder):
        assert first.poll() is None and time.monotonic() < until, first.communicate()[0]
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    done = ended(folder)
    # The rest side by side, each a Ray Train run of its own: two CPUs must be enough for that.
    changed = YAML(typ="safe", pure=True).load((folder / "params.yaml").read_text())
    changed["resources"]["trials"]["workers"] = 2
    changed["resources"]["train"]["workers"] = 1
    project.write_params(folder, changed)
    code, printed = project.run(folder, *command)
    assert code == 0, printed
    out = folder / "reports/tuning/student"
    trials = json.loads((out / "trials.json").read_text())
    assert len(trials) == 3
    names = {t["name"] for t in trials}
    assert all(any(name in path for name in names) for path in done), "a search of its own"
    assert "tied for best" in printed
    assert (out / "parallel.png").stat().st_size > 1000 < (out / "pareto.png").stat().st_size
    now = {f"{STUDENT}.objective.beta": 0.5, f"{STUDENT}.objective.gamma": 0.5}
    assert any(now.items() <= t["values"].items() for t in trials), "what stands was not tried"
    assert trials[0]["figures"]["robust"] == max(
        t["figures"]["robust"] for t in trials if t["right"]
    )
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("limpid-digits").experiment_id
    runs = client.search_runs([experiment])
    assert names <= {run.info.run_name for run in runs if "mlflow.parentRunId" in run.data.tags}
    code, printed = project.run(
        folder,
        sys.executable,
        "-m",
        "pipelines",
        "configure",
        "--from",
        str(out / "best.yaml"),
    )
    assert code == 0, printed
    adopted = YAML(typ="safe", pure=True).load((folder / "params.yaml").read_text())
    for place, value in trials[0]["values"].items():
        assert get(adopted, place) == value


def test_an_unknown_study_is_one_sentence(tmp_path: Path) -> None:
    folder = project.copy_to(tmp_path / "none")
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "tune", "nobody"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip() == "error: params.yaml has no entry nobody for tune"
