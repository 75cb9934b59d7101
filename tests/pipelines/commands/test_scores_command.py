"""The table of scores in a terminal, and metrics that cannot be read."""

from pathlib import Path

import pytest
from fake_evaluation import FakeEvaluation
from project import lock_of

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


@pytest.mark.parametrize("columns", ["80", "30"])
def test_scores_fit_into_80_columns_and_lose_no_digit(
    columns: str, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["scores", "--metrics", str(file)]) == 0
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())
    (row,) = (line for line in out.splitlines() if line.startswith("student_adaptive "))
    assert row.split() == ["student_adaptive", "100.0", "66.7", "66.7", "58.3", "58.3",
                           "32.0-80.7", "100/75", "no", "yes"]  # fmt: skip
    assert "<=100.0" in out
    (row,) = (line for line in out.splitlines() if line.startswith("rounded "))
    assert row.split()[1:5] == ["100.0", "-", "33.3", "void"] and row.split()[-2:] == ["yes", "+2"]
    words = " ".join(out.split())
    assert "robust accuracy" in out and "(worst of all" in out
    assert "failed checks: gradient_present/full, full_rung, undefended_falls" in words
    assert "2 warnings: gradient_present/full, quantisation" in words
    assert "student_grey: broken: does not beat none, the classifier without a defense" in words
    assert words.count("attacks written for this defense: none") == 4
    assert "attacks written for this defense: soft" in words
    assert "student_grey shows 91.7 % when the attacker ignores the purifier" in words
    assert "reports/report.html" in out
    assert "mlflow server --backend-store-uri sqlite:///mlflow.db --workers 1\n" in out
    assert "http://127.0.0.1:5000" in out


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"defenses": {"a": {}}}'])
def test_missing_or_damaged_metrics_end_in_one_sentence(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.json"
    if content is not None:
        path.write_bytes(content)
    assert main(["scores", "--metrics", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"error: {path} ")
    assert captured.err.count("\n") == 1


def test_scores_say_that_metrics_were_edited(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    lock_of(file.parent, "metrics.json")
    assert main(["scores", "--metrics", "metrics.json"]) == 0
    assert "dvc.lock" not in capsys.readouterr().out
    file.write_text(file.read_text() + "\n")
    assert main(["scores", "--metrics", "metrics.json"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert words.startswith("metrics.json is not what dvc.lock lists: it was edited, or made")
