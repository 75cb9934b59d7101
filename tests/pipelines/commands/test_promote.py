"""Registered versions carry their figures, and only sound ones become the champion."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import mlflow
import project
import pytest
from fake_evaluation import bare_scores, fail_checks
from ruamel.yaml import YAML
from toys import write_model

from components.models import identity as identities
from components.models.checkpoints import load as load_model
from components.models.checkpoints import read_card, save
from pipelines.__main__ import main
from pipelines.config.meanings import MEANINGS
from pipelines.config.schema import Params, load
from pipelines.config.sections import Defended
from pipelines.reporting import registration
from pipelines.storage import timings
from pipelines.tasks import metrics
from pipelines.tasks.metrics import (
    AttackScore,
    Checks,
    CleanScore,
    Difference,
    Estimate,
    Headline,
    Metrics,
    RecordedFinding,
    Scored,
    Selftest,
    Standing,
    Verdict,
)
from pipelines.tasks.subject import Subject
from pipelines.tasks.summary import threat_model
from pipelines.tracking import registry
from pipelines.tracking.registry import Version
from pipelines.tracking.tracker import Tracker

MODEL = "limpid-digits"


# How every defense of the tiny line stands; `promote` judges by this.
STANDINGS: dict[str, Standing] = {
    "student_grey": "broken",
    "student_adaptive": "below",
    "atop": "not told apart",
    "apudae": "no better than a control",
    "diffpure": "above",
}
ROBUST = {"student_grey": 0.0, "student_adaptive": 0.3, "atop": 0.5, "apudae": 0.6, "diffpure": 0.2}


@pytest.fixture(scope="module")
def synced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a made-up evaluation, and a store in which they were registered."""
    folder = tmp_path_factory.mktemp("registry") / "evaluated"
    folder.mkdir()
    project.write_params(folder, project.tiny())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        params = load()
        shape, names = (1, 8, 8), [str(label) for label in range(10)]
        standard = params.classifiers["standard"].model.model_dump(mode="json")
        write_model(folder / "models/standard", standard, shape, names)
        for defended in params.defenses.values():
            network = params.model_of(defended.model).model_dump(mode="json")
            write_model(folder / "models" / defended.model, network, shape, names)
        write(evaluated(params))
        locked = [
            {
                "path": "models/student_adaptive",
                "md5": registration.folder_md5(folder / "models/student_adaptive"),
            }
        ]
        YAML().dump({"stages": {"a": {"outs": locked}}}, folder / "dvc.lock")
        (folder / "reports/report.html").write_text("a report")
        for name in params.defenses:
            timings.record(registration.image_of(name), 0.001)
        assert promote(["--sync"]) == 0
    return folder


def evaluated(params: Params) -> Metrics:
    """Return metrics of all defenses of the parameters, made up but for the digests."""
    return Metrics(
        seed=0,
        selftest=Selftest(cases=1, caught=1),
        threat_model=threat_model(params.threat, 50, params.scoring),
        published={},
        defenses={name: one(params.defenses[name], name) for name in params.defenses},
    )


def one(defended: Defended, name: str) -> Scored:
    standing = STANDINGS[name]
    difference = Difference(baseline="robust", difference=-0.1, low=-0.2, high=-0.01, p=0.001)
    subject = Subject(
        Path("models/standard"), Path("models") / defended.model, inference=defended.inference
    )
    low = ROBUST[name]
    estimate = Estimate(accuracy=low + 0.05, low=low, high=low + 0.1, n=50)
    return bare_scores(
        low,
        headline=Headline(**dict(estimate), upper_bound=False),
        clean=CleanScore(accuracy=0.95, low=0.9, high=1.0, n=50, agreement=0.95),
        digest=subject.defense().digest,
        verdict=Verdict(standing=standing, rivals=["none"], adversarial_training=difference),
        checks=Checks(
            blocking_failed=[],
            warnings=["chance", "selection"],
            findings=[finding("chance", "warn"), finding("selection", "warn")],
        ),
        written_for=["direct"] if name == "apudae" else [],
    )


def finding(name: str, level: Literal["block", "warn"]) -> RecordedFinding:
    about: dict[str, Any] = {"check": name, "about": "", "detail": "", "figures": {}, "asked": True}
    return RecordedFinding(name=name, level=level, passed=False, **about)


def write(values: Metrics) -> None:
    Path("reports").mkdir(exist_ok=True)
    metrics.write(Path("reports/metrics.json"), values)


@pytest.fixture
def store(synced: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of that store, without a champion."""
    monkeypatch.chdir(synced)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    registry.connect().delete_registered_model_alias(MODEL, registry.CHAMPION)
    yield synced
    mlflow.set_tracking_uri(None)


def promote(argv: list[str]) -> int:
    return main(["promote", *argv])


def registered_versions() -> dict[str, Version]:
    return {one.defense: one for one in registry.versions(registry.connect(), MODEL)}


def registered_versions_by_number() -> dict[int, Version]:
    return {one.number: one for one in registry.versions(registry.connect(), MODEL)}


def champion() -> str:
    known = registered_versions().values()
    return next((one.defense for one in known if registry.CHAMPION in one.aliases), "")


def home_of(defense: str) -> Path:
    """Return where the store keeps the files of a defense."""
    return Path(mlflow.artifacts.download_artifacts(registered_versions()[defense].source))


def artifact(defense: str) -> Path:
    """Return where the store keeps the purifier of a defense."""
    return home_of(defense) / "artifacts" / project.tiny()["defenses"][defense]["model"]


def test_sync_registers_every_defense_once_in_an_empty_store(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = registered_versions()
    assert set(first) == set(project.tiny()["defenses"])
    assert promote(["--sync"]) == 0
    assert {d: v.number for d, v in registered_versions().items()} == {
        d: v.number for d, v in first.items()
    }
    assert promote([]) == 0
    printed = capsys.readouterr().out
    found = json.loads((store / "reports/metrics.json").read_text())["defenses"]
    for name, version in first.items():
        head = found[name]["headline"]
        assert name in printed and f"{100 * head['accuracy']:.1f}" in printed
        assert version.figure("robust_accuracy_low") == pytest.approx(head["low"], rel=1e-4)
        assert version.failed == found[name]["checks"]["blocking_failed"]
        assert version.figure("ms_per_image") > 0
    tags = first["student_adaptive"].tags
    assert tags["dvc.lock.models/student_adaptive"].endswith(".dir")
    assert json.loads(tags["threat"])["norm"] == "linf" and "git.commit" in tags
    run = registry.connect().get_run(tags["limpid.run"])
    kept = {file.path for file in registry.connect().list_artifacts(run.info.run_id)}
    assert {"scores.json", "report.html", "params.yaml"} <= kept
    words = run.data.tags["mlflow.note.content"]
    assert "clean test images" in words and "no pixel changes by more" in words


def test_the_list_says_what_stands_beside_each_number(
    store: Path, capsys: pytest.CaptureFixture
) -> None:
    assert promote([]) == 0
    printed = capsys.readouterr().out
    assert "robust accuracy" in printed and "measurement" in printed
    (line,) = (line for line in printed.splitlines() if " apudae: " in line)
    assert "no better than a control: does not beat none" in line
    assert "-10.0 points beside robust (99 % interval -20.0 to -1.0)" in line
    assert "attacks written for this defense: direct; 2 warnings: chance, selection" in line
    tags = registered_versions()["student_grey"].tags
    assert tags["standing"] == "broken" and tags["measurement valid"] == "yes"
    assert tags["attacks written for this defense"] == "none"


@pytest.mark.parametrize("name", ["student_grey", "apudae"])
def test_what_beats_no_defense_or_a_control_not_is_promoted_by_an_explicit_wish_only(
    store: Path, name: str, capsys: pytest.CaptureFixture
) -> None:
    for argv in (["--reason", "x"], ["--anyway"]):
        assert promote([name, *argv]) == 2 and champion() == ""
        error = capsys.readouterr().err
        assert "does not beat none" in error and "--anyway and --reason" in error
        assert error.count("\n") == 1
    assert promote([name, "--anyway", "--reason", "to show it"]) == 0
    assert champion() == name


def test_what_is_below_adversarial_training_takes_a_reason(
    store: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The best of those that may be promoted by its bound, once the two above it are away.
    client, known = registry.connect(), registered_versions()
    for name in ("atop", "diffpure"):
        client.set_model_version_tag(MODEL, str(known[name].number), "standing", "broken")
    assert promote(["--by", "worst"]) == 2 and champion() == ""
    error = capsys.readouterr().err
    assert "below adversarial training" in error and "say by --reason" in error
    assert promote(["--by", "worst", "--reason", "it is quick"]) == 0
    assert champion() == "student_adaptive"
    for name in ("atop", "diffpure"):
        client.set_model_version_tag(MODEL, str(known[name].number), "standing", STANDINGS[name])


def test_a_version_without_a_verdict_is_not_promoted(
    store: Path, capsys: pytest.CaptureFixture
) -> None:
    client, number = registry.connect(), str(registered_versions()["atop"].number)
    client.delete_model_version_tag(MODEL, number, "standing")
    assert promote([]) == 0
    assert "atop: without a verdict: register it by --sync" in capsys.readouterr().out
    assert promote(["atop", "--reason", "x"]) == 2 and champion() == ""
    assert "register it by --sync" in capsys.readouterr().err
    client.set_model_version_tag(MODEL, number, "standing", "not told apart")


def test_where_no_version_has_a_verdict_none_is_the_best(
    store: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Version, "standing", "")
    assert promote(["--by", "worst"]) == 2 and champion() == ""
    assert "no registered version has a verdict: register them by --sync" in capsys.readouterr().err


def test_promoting_needs_a_reason_and_keeps_it(store: Path, capsys: pytest.CaptureFixture) -> None:
    assert promote(["atop"]) == 2 and champion() == ""
    assert "give a reason" in capsys.readouterr().err
    assert promote(["atop", "--reason", "for the test"]) == 0
    assert champion() == "atop"
    assert registered_versions()["atop"].tags["limpid.champion_because"] == "for the test"
    number = str(registered_versions()["diffpure"].number)
    assert promote([number, "--reason", "another"]) == 0
    assert champion() == "diffpure"
    assert "instead of" in capsys.readouterr().out


def test_by_worst_promotes_the_highest_lower_bound_that_is_worth_something(store: Path) -> None:
    # apudae has a higher bound and does not beat a control.
    assert promote(["--by", "worst"]) == 0
    assert champion() == "atop"
    assert registered_versions()["atop"].aliases == ("candidate", "champion")


def test_other_figures_make_another_version_and_leave_the_champion_as_it_is(store: Path) -> None:
    assert promote(["atop", "--reason", "for the test"]) == 0
    before = registered_versions_by_number()
    values = json.loads(Path("reports/metrics.json").read_text())
    values["defenses"]["atop"]["headline"]["accuracy"] = 0.5
    Path("reports/metrics.json").write_text(json.dumps(values))
    assert promote(["--sync"]) == 0
    after = registered_versions_by_number()
    (new,) = set(after) - set(before)
    assert after[new].defense == "atop" and after[new].figure("robust_accuracy") == 0.5
    for number, version in before.items():
        assert after[number].tags["limpid.figures"] == version.tags["limpid.figures"]
    write(evaluated(load()))
    registry.connect().delete_model_version(MODEL, str(new))


@pytest.fixture
def again(store: Path) -> Iterator[Callable[..., Version]]:
    """Register the evaluation of a defense anew, with other values, and return its version."""
    client, first = registry.connect(), registered_versions_by_number()
    for number, version in first.items():
        client.set_model_version_tag(MODEL, str(number), "limpid.evaluated", "1")
        if version.defense == "atop":
            client.set_registered_model_alias(MODEL, registry.CANDIDATE, str(number))

    def evaluate(name: str, stage: str = registry.SYNC, **changes: Any) -> Version:
        found = evaluated(load())
        of_all = {key: changes.pop(key) for key in list(changes) if key in Metrics.model_fields}
        scores = {**found.defenses, name: found.defenses[name].model_copy(update=changes)}
        found = found.model_copy(update={"defenses": scores, **of_all})
        registered = registration.registrations(load().defenses, found, Path("models"), "digits")
        assert not Tracker(stage, MODEL, {}, "").finish("FINISHED", registered)
        known = registered_versions_by_number().values()
        return max((v for v in known if v.defense == name), key=lambda v: (v.evaluated, v.number))

    yield evaluate
    for number in set(registered_versions_by_number()) - set(first):
        client.delete_model_version(MODEL, str(number))


def scores(accuracy: float) -> dict[str, Any]:
    estimate = {"accuracy": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.05, "n": 50}
    return {"headline": Headline(**estimate, upper_bound=False)}


def failing() -> dict[str, Any]:
    finding = RecordedFinding(
        name="planted",
        check="planted",
        about="",
        level="block",
        passed=False,
        detail="",
        figures={},
        asked=True,
    )
    checks = Checks(blocking_failed=["planted"], warnings=[], findings=[finding])
    head = Headline(accuracy=0.55, low=0.5, high=0.6, n=50, upper_bound=True)
    return {"checks": checks, "headline": head}


@pytest.mark.parametrize("changes", [scores(0.1), failing()], ids=["weaker", "failed"])
def test_a_newer_evaluation_of_a_defense_supersedes_the_older_one(
    again: Callable[..., Version], changes: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    old = registered_versions()["atop"]
    assert old.aliases == ("candidate",)
    new = again("atop", **changes)
    assert new.number != old.number
    assert promote(["--by", "worst", "--reason", "x"]) == 0 and champion() == "student_adaptive"
    assert registered_versions()["student_adaptive"].aliases == ("candidate", "champion")
    capsys.readouterr()
    for argv in (["--reason", "x"], ["--anyway"], ["--anyway", "--reason", " "]):
        assert promote([str(old.number), *argv]) == 2
        assert f"is superseded: version {new.number} is" in capsys.readouterr().err
    assert promote([]) == 0
    listed = capsys.readouterr().out
    assert f"{old.number} atop: superseded by version {new.number}; not told apart" in listed
    # Registered again, the older evaluation is no newer, and gets no alias back.
    again("atop")
    assert registered_versions_by_number()[old.number].superseded_by == new.number
    assert registered_versions()["student_adaptive"].aliases == ("candidate", "champion")
    assert promote([str(old.number), "--anyway", "--reason", "a slip of the new one"]) == 0


def test_a_defense_that_is_evaluated_again_as_before_is_the_newest(
    again: Callable[..., Version],
) -> None:
    old = registered_versions()["atop"]
    new = again("atop", **scores(0.1))
    assert again("atop", stage="evaluate").number == old.number
    known = registered_versions_by_number()
    assert known[old.number].superseded_by is None
    assert known[new.number].superseded_by == old.number
    assert known[old.number].aliases == ("candidate",)


def test_where_a_newer_evaluation_finds_no_candidate_there_is_none(
    again: Callable[..., Version],
) -> None:
    known = registered_versions()
    sound = {name for name, one in STANDINGS.items() if one not in registry.NO_CHAMPION} - {"atop"}
    client = registry.connect()
    client.set_registered_model_alias(MODEL, registry.CANDIDATE, str(known["atop"].number))
    found = evaluated(load())
    broken = Verdict(standing="broken", rivals=["none"], adversarial_training=None)
    scores_ = {
        name: one.model_copy(update={"verdict": broken}) if name in sound | {"atop"} else one
        for name, one in found.defenses.items()
    }
    again("atop", defenses=scores_)
    assert not any(
        registry.CANDIDATE in v.aliases for v in registered_versions_by_number().values()
    )


def test_by_compares_only_versions_of_the_threat_of_the_newest_evaluation(
    again: Callable[..., Version], capsys: pytest.CaptureFixture
) -> None:
    threat = evaluated(load()).threat_model.model_copy(update={"n": 40})
    again("atop", threat_model=threat, **scores(0.15))
    assert promote(["--by", "worst", "--reason", "x"]) == 0
    (chosen,) = (v for v in registered_versions_by_number().values() if "champion" in v.aliases)
    assert chosen.threat["n"] == 40
    assert promote([]) == 0
    assert " linf 51/255 " in capsys.readouterr().out


def test_changed_code_makes_another_version(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest of a defense covers its code; where it is scored anew it is registered anew."""
    before = registered_versions_by_number()
    monkeypatch.setattr(identities, "_digest_of", lambda names: "changed")
    assert promote(["--sync"]) == 3
    write(evaluated(load()))
    assert promote(["--sync"]) == 0
    monkeypatch.undo()
    os.chdir(store)
    new = set(registered_versions_by_number()) - set(before)
    assert len(new) == len(STANDINGS)
    write(evaluated(load()))
    for number in new:
        registry.connect().delete_model_version(MODEL, str(number))


def test_what_was_not_scored_is_not_registered(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(identities, "_digest_of", lambda names: "changed")
    assert promote(["--sync"]) == 3
    error = capsys.readouterr().err
    assert "is not what was scored" in error and error.count("\n") == 1


def test_edited_metrics_are_not_registered(store: Path, capsys: pytest.CaptureFixture) -> None:
    lock, before = Path("dvc.lock").read_bytes(), registered_versions_by_number()
    project.lock_of(Path(), "reports/metrics.json")
    assert promote(["--sync"]) == 0
    write(evaluated(load()).model_copy(update={"seed": 1}))
    assert promote(["--sync"]) == 3
    error = capsys.readouterr().err
    assert "reports/metrics.json is not what dvc.lock lists" in error and error.count("\n") == 1
    assert set(registered_versions_by_number()) == set(before)
    write(evaluated(load()))
    Path("dvc.lock").write_bytes(lock)


def test_the_md5_of_a_folder_is_that_of_dvc(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("b")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/c").write_text("c")
    # From a dvc.lock that DVC wrote of this folder.
    assert registration.folder_md5(tmp_path) == "92ae0af64ac8e4677f484e2efef69942.dir"


def test_class_names_that_were_changed_before_sync_are_not_registered(
    store: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = Path("models/student_adaptive")
    network, card = load_model(folder), read_card(folder)
    save(folder, network, card.model_copy(update={"class_names": card.class_names[::-1]}))
    assert promote(["--sync"]) == 3
    error = capsys.readouterr().err
    assert "models/student_adaptive is not what dvc.lock lists" in error
    assert error.count("\n") == 1
    save(folder, network, card)
    assert promote(["--sync"]) == 0


def test_other_parameters_than_were_evaluated_are_not_registered(
    store: Path, capsys: pytest.CaptureFixture
) -> None:
    lock, yaml = Path("dvc.lock").read_bytes(), YAML()
    evaluated_with = yaml.load(Path("params.yaml"))
    stage = {"params": {"params.yaml": {k: evaluated_with[k] for k in ("attacks", "threat")}}}
    yaml.dump({"stages": {"evaluate": stage}}, Path("dvc.lock"))
    assert promote(["--sync"]) == 0
    stage["params"]["params.yaml"]["attacks"]["pgd"]["steps"] = 1
    yaml.dump({"stages": {"evaluate": stage}}, Path("dvc.lock"))
    assert promote(["--sync"]) == 3
    error = capsys.readouterr().err
    assert "params.yaml has other values of attacks than were evaluated" in error
    assert error.count("\n") == 1
    Path("dvc.lock").write_bytes(lock)


def test_nothing_is_registered_by_a_damaged_lock(
    store: Path, capsys: pytest.CaptureFixture
) -> None:
    lock = Path("dvc.lock").read_bytes()
    Path("dvc.lock").write_bytes(lock + b"[")
    assert promote(["--sync"]) == 2
    error = capsys.readouterr().err
    assert "dvc.lock is cut short or altered" in error and error.count("\n") == 1
    Path("dvc.lock").write_bytes(lock)


def test_the_ladder_that_is_registered_is_what_was_counted(store: Path) -> None:
    score = AttackScore(
        accuracy=0.96,
        low=0,
        high=1,
        n=50,
        agreement=0.96,
        label="pgd",
        region="linf 51/255",
        bounded=True,
        inside=1,
        median_l2=0.5,
    )
    found = evaluated(load())
    atop = found.defenses["atop"].model_copy(update={"attacks": {"full/pgd": score}})
    found = found.model_copy(update={"defenses": {**found.defenses, "atop": atop}})
    registered = registration.registrations(load().defenses, found, Path("models"), "digits")
    (one_,) = (one for one in registered if one.name == "atop")
    assert one_.params["defense"]["ladder"] == {"full": ["pgd"]}


@pytest.mark.parametrize(
    "name", ["MLmodel", "served_model.py", "requirements.txt", "code/components/serving.py"]
)
def test_an_edited_file_of_a_version_is_refused(
    store: Path, name: str, capsys: pytest.CaptureFixture
) -> None:
    path = home_of("diffpure") / name
    whole = path.read_text()
    path.write_text(whole + "\n# another line\n")
    assert promote(["diffpure", "--reason", "no"]) == 3
    assert "code, settings or verdict are not those that were reg" in capsys.readouterr().err
    path.write_text(whole)
    assert promote(["diffpure", "--reason", "whole again"]) == 0


def test_other_class_names_are_refused(store: Path, capsys: pytest.CaptureFixture) -> None:
    folder = home_of("diffpure") / "artifacts/standard"
    network, card = load_model(folder), read_card(folder)
    save(folder, network, card.model_copy(update={"class_names": card.class_names[::-1]}))
    assert promote(["diffpure", "--reason", "no"]) == 3
    assert "are not those that were scored" in capsys.readouterr().err
    save(folder, network, card)
    assert promote(["diffpure", "--reason", "whole again"]) == 0


def test_a_version_that_does_not_say_that_it_is_valid_is_not_promoted(
    store: Path, capsys: pytest.CaptureFixture
) -> None:
    client, number = registry.connect(), str(registered_versions()["atop"].number)
    client.delete_model_version_tag(MODEL, number, "measurement valid")
    for argv in (["atop"], ["atop", "--anyway"]):
        assert promote([*argv, "--reason", "x"]) == 2 and champion() == ""
        assert "does not say that its measurement is valid" in capsys.readouterr().err
    assert promote(["--by", "worst", "--reason", "x"]) == 0 and champion() == "student_adaptive"
    client.set_model_version_tag(MODEL, number, "measurement valid", "yes")


def test_tags_that_were_edited_are_refused(
    again: Callable[..., Version], capsys: pytest.CaptureFixture
) -> None:
    new = again("atop", **failing())
    client, number = registry.connect(), str(new.number)
    client.delete_model_version_tag(MODEL, number, "blocking_failed")
    assert promote(["atop", "--reason", "x"]) == 2
    client.set_model_version_tag(MODEL, number, "measurement valid", "yes")
    assert promote(["atop", "--reason", "x"]) == 2
    figures = json.loads(new.tags["limpid.figures"]) | {"blocking_failed_count": 0}
    client.set_model_version_tag(MODEL, number, "limpid.figures", json.dumps(figures))
    assert promote(["atop", "--reason", "x"]) == 3 and champion() == ""
    assert "its tags do not say what its evaluation said" in capsys.readouterr().err


def test_a_version_with_a_failed_blocking_check_is_refused(
    store: Path, capsys: pytest.CaptureFixture
) -> None:
    number = str(registered_versions()["atop"].number)
    client = registry.connect()
    before = registered_versions()["atop"].tags["blocking_failed"]
    client.set_model_version_tag(MODEL, number, "blocking_failed", "planted")
    assert promote(["atop", "--reason", "no"]) == 2
    assert "failed planted" in capsys.readouterr().err and champion() == ""
    client.set_model_version_tag(MODEL, number, "blocking_failed", before)
    assert promote(["--by", "clean", "--min-clean", "1.01"]) == 2
    assert "reaches 101.0% clean" in capsys.readouterr().err


def test_a_failed_check_is_registered_with_the_defense(store: Path) -> None:
    values = json.loads((store / "reports/metrics.json").read_text())
    fail_checks(values["defenses"]["atop"], "planted")
    found = Metrics.model_validate_json(json.dumps(values))
    registered = registration.registrations(load().defenses, found, Path("models"), "digits")
    atop = next(one for one in registered if one.name == "atop")
    assert atop.tags["blocking_failed"] == "planted"
    assert atop.tags["limpid.candidate"] == "no"
    assert "upper bound and no result" in atop.description
    assert MEANINGS["planted"] in atop.description


def test_altered_or_missing_artifacts_are_refused(
    store: Path, capsys: pytest.CaptureFixture
) -> None:
    weights = artifact("atop") / "weights.safetensors"
    whole = weights.read_bytes()
    faults = {"altered": whole[:-1] + bytes([whole[-1] ^ 1]), "missing": None}
    for content in faults.values():
        weights.unlink()
        if content is not None:
            weights.write_bytes(content)
        assert promote(["atop", "--reason", "no"]) == 3
        assert "is refused: its artifacts are not whole" in capsys.readouterr().err
        weights.write_bytes(whole)
    assert champion() == ""
    assert promote(["atop", "--reason", "whole again"]) == 0


def test_another_network_in_the_artifacts_is_refused(
    store: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = artifact("student_adaptive")
    shutil.rmtree(folder)
    shutil.copytree(store / "models/denoiser", folder)
    assert promote(["student_adaptive", "--reason", "no"]) == 3
    assert "are not those that were scored" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["nobody", "--reason", "x"], "there is no nobody"),
        (["atop", "--by", "worst"], "not both"),
        (["--model", "limpid-mars"], "there is no version of limpid-mars"),
    ],
)
def test_a_version_that_cannot_be_promoted_is_refused_in_one_sentence(
    store: Path, argv: list[str], reason: str, capsys: pytest.CaptureFixture
) -> None:
    assert promote(argv) == 2
    printed = capsys.readouterr().err
    assert reason in printed and printed.count("\n") == 1


def test_missing_metrics_are_named_in_one_sentence(
    store: Path, capsys: pytest.CaptureFixture
) -> None:
    (store / "reports/metrics.json").rename(store / "reports/away.json")
    assert promote(["--sync"]) == 3
    (store / "reports/away.json").rename(store / "reports/metrics.json")
    assert capsys.readouterr().err.startswith("error: reports/metrics.json is missing")


def test_an_unreachable_store_is_named_in_one_sentence(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert promote([]) == 4
    assert "http://127.0.0.1:9 does not answer" in capsys.readouterr().err


def test_what_stands_before_another_classifier_is_no_candidate(store: Path, tmp_path: Path) -> None:
    """Its robust accuracy may be that of the classifier. It is registered with that classifier."""
    params = load()
    shutil.copytree(store / "models", tmp_path / "models")
    shutil.copytree(store / "models/standard", tmp_path / "models/hardened")
    scored = metrics.read(store / "reports/metrics.json")
    moved = params.defenses["atop"].model_copy(update={"classifier": "hardened"})
    for atop, candidate in ((params.defenses["atop"], "atop"), (moved, "student_adaptive")):
        found = registration.registrations(
            {**params.defenses, "atop": atop}, scored, tmp_path / "models", "digits"
        )
        named = {one.name: one.tags["limpid.candidate"] for one in found}
        assert [name for name, said in named.items() if said == "yes"] == [candidate]
        folders = {one.name: one.folders["classifier"].name for one in found}
        assert folders["atop"] == atop.classifier
    described = {one.name: one.description for one in found}
    assert "in front of hardened (training unknown)" in described["atop"]
