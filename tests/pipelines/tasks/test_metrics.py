"""The form of reports/metrics.json: its keys, its way to a file and back, and damaged files."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
from fake_evaluation import EVIL, PROBES, FakeEvaluation, bare_scores

from components.attacks import L2
from components.checks import verdicts
from components.data.shards import DataError
from components.probes.statistics import wilson
from pipelines.config.sections import Scoring
from pipelines.reporting.wording import describe_threat
from pipelines.tasks import metrics
from pipelines.tasks.metrics import SCHEMA_VERSION, Metrics, Rival, attack_of, rung_of
from pipelines.tasks.summary import threat_model

# The keys of every version, by the type they belong to.
KEYS: dict[int, dict[str, str]] = {
    5: {
        "Metrics": "schema_version seed selftest threat_model published defenses",
        "Selftest": "cases caught",
        "LinfThreat": "norm eps_255 n select_draws score_draws",
        "L2Threat": "norm eps_l2 n select_draws score_draws",
        "PublishedFigures": "source accuracy",
        "Scored": "role digest stochastic quick clean headline per_class carried_by rungs "
        "void_rungs white_box attacks elsewhere detection retries unseen_classifier illusions "
        "illusory_rungs radius_curve checks certificate written_for not_better_than verdict",
        "Estimate": "accuracy low high n",
        "Headline": "accuracy low high n upper_bound",
        "CleanScore": "accuracy low high n agreement",
        "AttackScore": "accuracy low high n agreement label region bounded inside median_l2",
        "Elsewhere": "headline rungs",
        "RadiusPoint": "accuracy low high n radius",
        "IllusoryRung": "rung seen left",
        "Rival": "difference p",
        "Difference": "baseline difference low high p",
        "Verdict": "standing rivals adversarial_training",
        "Retries": "worst_of_10 majority_of_10 clean_worst_of_10 clean_majority_of_10",
        "UnseenClassifier": "clean worst_examples",
        "SetDetection": "auc control_auc tpr_1 tpr_5 roc",
        "Detection": "validation clean_rejected attacks detect_or_correct curve",
        "RecordedFinding": "name check about level passed detail figures asked",
        "Checks": "blocking_failed warnings findings",
    },
}


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> FakeEvaluation:
    return FakeEvaluation(tmp_path_factory.mktemp("evaluation"))


def test_another_form_is_another_version() -> None:
    schema = Metrics.model_json_schema()
    types: Mapping[str, Any] = {**schema["$defs"], "Metrics": schema}
    keys = {name: set(one["properties"]) for name, one in types.items()}
    pinned = {name: set(text.split()) for name, text in KEYS[SCHEMA_VERSION].items()}
    assert keys == pinned, "raise SCHEMA_VERSION and list the keys of the new version here"
    # Every key is always there, but for two that only defenses have.
    optional = {
        (name, key) for name, one in types.items() for key in keys[name] - set(one["required"])
    }
    assert optional == {
        ("Metrics", "schema_version"), ("Scored", "not_better_than"), ("Scored", "verdict"),
    }  # fmt: skip


def test_the_standings_are_those_that_are_computed() -> None:
    assert get_args(metrics.Standing) == get_args(verdicts.Standing)


def test_metrics_come_back_from_a_file_as_they_were(
    evaluation: FakeEvaluation, tmp_path: Path
) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    metrics.write(first, evaluation.metrics)
    read = metrics.read(first)
    assert read == evaluation.metrics
    metrics.write(second, read)
    assert first.read_bytes() == second.read_bytes()


def test_the_metrics_of_a_line_are_read_and_written_to_the_byte(
    reproduced: Path, tmp_path: Path
) -> None:
    path, again = reproduced / "reports/metrics.json", tmp_path / "again.json"
    metrics.write(again, metrics.read(path))
    assert again.read_bytes() == path.read_bytes()


def test_only_defenses_have_rivals_and_a_verdict() -> None:
    bare = bare_scores(0.5, role="baseline").model_dump(mode="json")
    assert not {"not_better_than", "verdict"} & set(bare)
    unbeaten = {"identity": Rival(difference=0.0, p=1.0)}
    found = bare_scores(0.5, not_better_than=unbeaten).model_dump(mode="json")
    assert found["not_better_than"] == {"identity": {"difference": 0.0, "p": 1.0}}


def test_the_facts_of_a_sentence_stand_beside_it(evaluation: FakeEvaluation) -> None:
    scored = evaluation.metrics.defenses
    for name, found in scored.items():
        assert found.illusions == [
            f"{one.rung}: {one.seen:.1%}, {one.left:.1%} in white box"
            for one in found.illusory_rungs
        ]
        for one in found.illusory_rungs:
            assert found.white_box is not None
            assert one.seen == found.rungs[one.rung].accuracy
            assert one.left == found.white_box.accuracy
        assert found.void_rungs == (["full"] if name in ("rounded", EVIL) else [])
        for finding in found.checks.findings:
            assert finding.name == finding.check + f"/{finding.about}" * bool(finding.about)
        failed = [one.name for one in found.checks.failed() if one.level == "block"]
        assert failed == found.checks.blocking_failed
    assert [one.rung for one in scored["student_grey"].illusory_rungs] == ["classifier", "bpda"]


def test_the_curve_over_the_radius_has_intervals(evaluation: FakeEvaluation) -> None:
    for name, found in evaluation.metrics.defenses.items():
        assert [(one.radius, one.accuracy) for one in found.radius_curve] == [
            (float(radius), accuracy) for radius, accuracy in PROBES.get(name, {}).items()
        ]
        for one in found.radius_curve:
            assert one.n == 16 and (one.low, one.high) == wilson(one.accuracy, 16)


def test_a_threat_in_l2_keeps_its_radius() -> None:
    scoring = Scoring(select_draws=4, score_draws=8, shown=1)
    threat = threat_model(L2(norm="l2", eps_l2=0.5), 60, scoring)
    assert threat.model_dump() == {
        "norm": "l2", "eps_l2": 0.5, "n": 60, "select_draws": 4, "score_draws": 8,
    }  # fmt: skip
    assert describe_threat(threat).startswith("L2, radius 127.5/255 = 0.5: ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 1}, "has schema 1, and this Limpid reads schema 5; `dvc repro`"),
        ({"schema_version": None}, "has no schema version, and this Limpid"),
        ({"seed": "0"}, "is damaged (seed: "),
        ({"surprise": 1}, "is damaged (surprise: "),
        ({"selftest": {"cases": 1}}, "is damaged (selftest.caught: "),
    ],
)
def test_metrics_of_another_form_are_refused_in_one_sentence(
    changes: dict[str, Any], message: str, evaluation: FakeEvaluation, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps({**evaluation.values(), **changes}))
    with pytest.raises(DataError) as raised:
        metrics.read(path)
    assert str(raised.value).startswith(f"{path} {message}")
    assert "\n" not in str(raised.value)


def _unmask(one: dict[str, Any]) -> None:
    one["headline"]["upper_bound"] = False


def _hide(one: dict[str, Any]) -> None:
    one["checks"]["blocking_failed"] = []
    one["headline"]["upper_bound"] = False


def _quiet(one: dict[str, Any]) -> None:
    one["checks"]["warnings"] = []


def _raise(one: dict[str, Any]) -> None:
    one["headline"]["accuracy"] = 0.9


@pytest.mark.parametrize(
    ("name", "edit", "sentence"),
    [
        (EVIL, _unmask, "headline.upper_bound is false, and gradient_present/full"),
        (EVIL, _hide, "blocking_failed names none, and of its findings gradient_present/full"),
        ("none", _quiet, "warnings names none, and of its findings quantisation failed"),
        ("student_adaptive", _raise, "its headline is 0.9, and full leaves 0.5833"),
    ],
)
def test_metrics_that_contradict_themselves_are_refused(
    name: str, edit: Callable[[dict[str, Any]], None], sentence: str, evaluation: FakeEvaluation,
    tmp_path: Path,
) -> None:  # fmt: skip
    values, path = evaluation.values(), tmp_path / "metrics.json"
    edit(values["defenses"][name])
    path.write_text(json.dumps(values))
    with pytest.raises(DataError) as raised:
        metrics.read(path)
    assert str(raised.value).startswith(f"{path} is damaged (defenses.{name}")
    assert sentence in str(raised.value) and "\n" not in str(raised.value)


def test_an_attack_that_left_the_ball_bounds_no_headline(evaluation: FakeEvaluation) -> None:
    values = evaluation.values()
    attack = values["defenses"]["student_adaptive"]["attacks"]["full/pgd"]
    attack |= {"accuracy": 0.0, "low": 0.0, "inside": 0.9}
    Metrics.model_validate_json(json.dumps(values))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"3"])
def test_a_file_that_holds_no_metrics_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"^{path} "):
        metrics.read(path)


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        metrics.read(tmp_path / "metrics.json")


@pytest.mark.parametrize(
    ("name", "rung", "attack"), [("full/pgd", "full", "pgd"), ("clean", "clean", "clean")]
)
def test_the_name_of_a_set_has_a_rung_and_an_attack(name: str, rung: str, attack: str) -> None:
    assert (rung_of(name), attack_of(name)) == (rung, attack)
