"""Nothing is scored where the selftest does not show that the checks of this version work."""

import json
from pathlib import Path
from typing import Any

import project
import pytest

from components.data.shards import DataError
from components.selftest import HONEST, LIES
from pipelines.config import schema
from pipelines.stages import evaluate
from pipelines.tasks.entries import Entry

NO_STUDIES: dict[str, Any] = {"run": [], "studies": {}}


def results() -> list[dict[str, Any]]:
    """Return the results of a selftest in which all came out right."""
    lies = [
        {"case": lie, "expected": check, "raised": [check], "caught": True}
        for lie, (check, _) in LIES.items()
    ]
    honest = [{"case": n, "expected": None, "raised": [], "caught": True} for n in HONEST]
    return [*lies, *honest]


def refusal(path: Path) -> str:
    """Evaluate with this selftest and no other input, and return the error."""
    paths = ("train", "val", "test", "models", "ladders", "adversarial")
    outs = [f"out_{name}" for name in ("metrics", "headlines", "scores", "plots", "report")]
    missing = {name: path.parent / "missing" / name for name in (*paths, *outs)}
    project.write_params(path.parent, project.base())
    params = evaluate.EvaluateParams.of(schema.load(path.parent / "params.yaml"), None)
    nothing: Any = None
    with pytest.raises(DataError) as caught:
        evaluate.run(params, nothing, selftest=path, **missing)
    return str(caught.value)


def test_the_cases_of_this_version_are_asked_for_by_name(tmp_path: Path) -> None:
    path = tmp_path / "selftest.json"

    def refused(cases: list[dict[str, Any]]) -> str:
        path.write_text(json.dumps(cases))
        message = refusal(path)
        assert "\n" not in message
        return message.partition(" does not show ")[2]

    whole, lie, honest = results(), next(iter(LIES)), next(iter(HONEST))
    assert f"and {len(whole) - 3} more;" in refused([]) and f"right: {lie}, " in refused([])
    assert f"right: {lie};" in refused(whole[1:])
    assert f"right: {honest};" in refused([one for one in whole if one["case"] != honest])
    assert f"right: {lie};" in refused([{**whole[0], "caught": False}, *whole[1:]])
    assert f"right: {lie};" in refused([{**whole[0], "expected": "older"}, *whole[1:]])
    assert "right: more;" in refused([{**whole[0], "case": "more", "caught": False}, *whole])
    # Whole, it is believed: then the ladders are missing.
    assert refused([*whole, {**whole[0], "case": "more"}]) == ""


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1]", b'[{"case": "x"}]'])
def test_a_selftest_that_cannot_be_read_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "selftest.json"
    if content is not None:
        path.write_bytes(content)
    assert refusal(path) == f"{path} cannot be read; `limpid selftest` renews it"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the digits profile and its ladders, and nothing else."""
    project.write_params(tmp_path, project.base())
    project.resolve(tmp_path)
    return tmp_path


def entries_of(folder: Path) -> tuple[evaluate.EvaluateParams, list[Entry]]:
    params = evaluate.EvaluateParams.of(schema.load(folder / "params.yaml"), None)
    paths = (folder / name for name in ("models", "ladders", "adversarial"))
    return params, evaluate.entries_of(params, *paths)


def test_ladders_that_were_resolved_from_other_parameters_are_refused(folder: Path) -> None:
    entries_of(folder)
    for change in (
        {"threat": {"norm": "linf", "eps_255": 8}},
        {"checks": {"images": 64, "thorough": False}},
        {"defenses": {"student_grey": {**project.base()["defenses"]["atop"]}}},
        {"controls": {"bit_depth": {**project.base()["controls"]["gaussian_noise"]}}},
    ):
        project.write_params(folder, {**project.base(), **change, "tuning": NO_STUDIES})
        with pytest.raises(DataError, match="was resolved from other parameters: `limpid resolve"):
            entries_of(folder)
    (folder / "ladders/none.json").write_text("{}")
    with pytest.raises(DataError, match=r"none.json is missing or damaged: `limpid resolve_ladd"):
        entries_of(folder)


def test_grey_sets_are_those_of_the_classifier_behind_the_purifier(folder: Path) -> None:
    params = project.base()
    params["defenses"]["atop"]["classifier"] = "robust"
    # The bare row of the robust classifier has the same ladder.
    project.write_params(folder, params)
    project.resolve(folder)
    found = {entry.name: entry for entry in entries_of(folder)[1]}
    sets = {name: found[name].sets["classifier/pgd"] for name in ("student_grey", "atop")}
    assert sets["student_grey"] == folder / "adversarial/none/full/pgd"
    assert sets["atop"] == folder / "adversarial/adversarial_training/full/pgd"
    assert found["atop"].sets["full/pgd"] == folder / "adversarial/atop/full/pgd"
    assert found["atop"].subject.classifier == folder / "models/robust"


def test_examples_of_all_baselines_are_tried_on_the_others(folder: Path) -> None:
    params, entries = entries_of(folder)
    plan = evaluate._plan(params, entries, folder / "val", folder / "test", folder / "models")
    classifiers = {one.name: one.subject.classifier for one in plan.baselines}
    assert classifiers == {
        "none": folder / "models/standard", "adversarial_training": folder / "models/robust"
    }  # fmt: skip
