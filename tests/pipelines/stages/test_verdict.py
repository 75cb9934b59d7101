"""The verdict fails where a blocking check failed, and where metrics cannot be read."""

import json
from pathlib import Path

import pytest
from fake_evaluation import FakeEvaluation, fail_checks
from project import lock_of

from components.data.shards import write_json
from pipelines.__main__ import main
from pipelines.tasks import metrics


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> FakeEvaluation:
    return FakeEvaluation(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture
def file(evaluation: FakeEvaluation, tmp_path: Path) -> Path:
    path = tmp_path / "metrics.json"
    metrics.write(path, evaluation.metrics)
    return path


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"defenses": {"a": {}}}'])
def test_missing_or_damaged_metrics_end_in_one_sentence(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.json"
    if content is not None:
        path.write_bytes(content)
    assert main(["verdict", "--metrics", str(path)]) == 3
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"error: {path} ")
    assert captured.err.count("\n") == 1


def test_the_verdict_ignores_controls(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verdict", "--metrics", str(file)]) == 0
    out = capsys.readouterr().out
    assert "no blocking check failed on 3 scored" in out
    assert "noisy" not in out and "rounded" not in out


def test_the_verdict_says_how_each_defense_stands_and_what_warns_of_it(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(file.read_text())
    fail_checks(found["defenses"]["student_grey"], "chance", "selection", level="warn")
    fail_checks(found["defenses"]["student_adaptive"], level="warn")
    write_json(file, found)
    assert main(["verdict", "--metrics", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "none: 1 warning: quantisation" in lines
    assert "student_grey: broken; 2 warnings: chance, selection" in lines
    assert "student_adaptive: broken; no warnings" in lines


@pytest.mark.parametrize("name", ["none", "student_grey"])
def test_the_verdict_fails_and_names_the_failed_checks(
    name: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(file.read_text())
    fail_checks(found["defenses"][name], "logits", "provenance/full/pgd")
    write_json(file, found)
    assert main(["verdict", "--metrics", str(file)]) == 5
    error = capsys.readouterr().err
    assert error.startswith("error: ") and f"{name} (logits, provenance/full/pgd)" in error
    assert "student_adaptive" not in error and error.count("\n") == 1


@pytest.mark.parametrize(("cases", "caught"), [(0, 0), (34, 33)])
def test_the_verdict_fails_where_the_selftest_did_not_pass(
    cases: int, caught: int, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(file.read_text())
    found["selftest"] = {"cases": cases, "caught": caught}
    write_json(file, found)
    assert main(["verdict", "--metrics", str(file)]) == 5
    assert f"of {cases} cases of the selftest {caught} came out right" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ["stages: {a: [", "stages: [a]", "{}", "stages: {a: {outs: [{}]}}"]
)
def test_nothing_is_judged_by_a_damaged_lock(
    content: str, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    Path("dvc.lock").write_text(content)
    assert main(["verdict", "--metrics", "metrics.json"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: dvc.lock is cut short or altered: `git checkout dvc.lock`")
    assert error.count("\n") == 1


def test_metrics_that_were_edited_are_not_judged(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    lock_of(file.parent, "metrics.json")
    for path in ("metrics.json", str(file)):
        assert main(["verdict", "--metrics", path]) == 0
    file.write_text(file.read_text() + "\n")
    capsys.readouterr()
    for path in ("metrics.json", str(file)):
        assert main(["verdict", "--metrics", path]) == 3
        error = capsys.readouterr().err
        assert error.startswith(f"error: {path} is not what dvc.lock lists: it was edited")
        assert "`dvc repro` makes it again" in error and error.count("\n") == 1
