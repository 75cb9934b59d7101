"""`limpid compare`: counts, intervals and p-values of two verdicts, and what may be claimed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_evaluation import bare_scores
from scipy.stats import binomtest

from components.probes.statistics import summarise
from limpid import comparing
from limpid.__main__ import main
from pipelines.tasks import metrics
from pipelines.tasks.metrics import CleanScore, Headline, L2Threat, LinfThreat, Metrics, Selftest

N, ORDERS = 100, np.random.default_rng(0)


def right(*parts: tuple[int, float]) -> Any:
    return np.concatenate([np.full(count, value) for count, value in parts])


# Of 100 images, 40 stand in both, 3 in the low one alone, 25 in the high one alone.
LOW = right((40, 1.0), (3, 1.0), (25, 0.0), (32, 0.0))
HIGH = right((40, 1.0), (3, 0.0), (25, 1.0), (32, 0.0))


def verdict(
    folder: Path, accuracies: Any, rows: tuple[str, ...] = ("classifier",), draws: int = 1,
    eps: float = 8, images: str = "digest", norm: str = "linf", quick: bool = False,
) -> str:  # fmt: skip
    """Write a verdict in small: all that is compared of one."""
    rung = summarise(accuracies)
    scored = bare_scores(
        rung["accuracy"],
        clean=CleanScore(accuracy=1.0, low=0.9, high=1.0, n=N, agreement=1.0),
        headline=Headline(**rung, upper_bound=quick),
        quick=quick,
        role="baseline",
    )
    facts: dict[str, Any] = {"n": N, "select_draws": 1, "score_draws": 1}
    ball = LinfThreat(norm="linf", eps_255=eps, **facts)
    found = Metrics(
        seed=0, selftest=Selftest(cases=0, caught=0), published={},
        threat_model=ball if norm == "linf" else L2Threat(norm="l2", eps_l2=eps, **facts),
        defenses=dict.fromkeys(rows, scored),
    )  # fmt: skip
    metrics.write(folder / "metrics.json", found)
    # Out of order, each in another one, and beside another row and another attack.
    order = ORDERS.permutation(N)
    table = pa.table({
        "defense": [name for name in (*rows, "none") for _ in order],
        "attack": ["robust"] * N * (len(rows) + 1),
        "mode": [""] * N * (len(rows) + 1),
        "role": ["score"] * N * (len(rows) + 1),
        "id": np.tile(order, len(rows) + 1),
        "correct": np.concatenate(
            [(accuracies * draws).astype(int)[order]] * len(rows) + [np.zeros(N, int)]
        ),
        "draws": [draws] * N * (len(rows) + 1),
    })  # fmt: skip
    table = table.replace_schema_metadata({"images": images} if images else None)
    pq.write_table(table, folder / "scores.parquet")
    return str(folder)


def compare(*words: str) -> int:
    return main(["compare", *words])


def test_two_deterministic_verdicts_are_told_apart_by_mcnemars_test(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = verdict(tmp_path / "low", LOW), verdict(tmp_path / "high", HIGH)
    found = comparing.compared(comparing.read(one), comparing.read(other))
    assert (found.gained, found.lost) == (3, 25)
    assert found.mean == pytest.approx(-0.22)
    assert found.p_lower == pytest.approx(binomtest(3, 28, alternative="less").pvalue, rel=1e-6)
    assert found.p_higher == pytest.approx(binomtest(3, 28, alternative="greater").pvalue, rel=1e-6)
    assert found.lower and found.low < -0.22 < found.high < 0
    assert compare(one, other) == 0
    printed = capsys.readouterr().out
    assert "A less B: -22.0 points" in printed and "3 images stand better in A, 25 in B" in printed
    assert f"{other}:classifier is higher than {one}:classifier (p = " in printed
    assert compare(other, one) == 0
    assert "A less B: +22.0 points" in capsys.readouterr().out


def test_equal_verdicts_are_not_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = verdict(tmp_path, LOW)
    assert compare(path, f"{path}/metrics.json:classifier") == 0
    printed = capsys.readouterr().out
    assert "+0.0 points" in printed and "not told apart: neither is higher" in printed


def test_the_accuracies_of_a_random_defense_are_fractions(tmp_path: Path) -> None:
    few = verdict(tmp_path / "few", right((60, 0.5), (40, 1.0)), draws=32)
    many = verdict(tmp_path / "many", right((60, 0.75), (40, 1.0)), draws=32)
    found = comparing.compared(comparing.read(few), comparing.read(many))
    assert (found.gained, found.lost) == (0, 60) and found.mean == pytest.approx(-0.15)
    assert found.p_lower == pytest.approx(0.5**60, rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("bound", ["low", "high"])
def test_an_upper_bound_is_never_shown_to_be_higher(
    bound: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    low = verdict(tmp_path / "low", LOW, quick=bound == "low")
    high = verdict(tmp_path / "high", HIGH, quick=bound == "high")
    assert compare(low, high) == 0
    printed = capsys.readouterr().out
    assert ("so nothing says that it is higher" in printed) == (bound == "high")
    assert (f"{high}:classifier is higher than" in printed) == (bound == "low")
    assert f"{tmp_path / bound}:classifier: at most " in printed


def test_a_project_and_its_rows_are_found(tmp_path: Path) -> None:
    verdict(tmp_path / "reports", LOW, ("one", "two"))
    assert comparing.read(f"{tmp_path}:two").title.endswith("reports:two")
    with pytest.raises(ValueError, match=r"has one, two; write .*metrics\.json:NAME to say which"):
        comparing.read(str(tmp_path))
    with pytest.raises(ValueError, match="has no twoo, did you mean two"):
        comparing.read(f"{tmp_path}:twoo")


@pytest.mark.parametrize(
    ("changes", "code", "sentence"),
    [
        ({"images": "another"}, 2, "are about other test images (ids, labels or pixels differ)"),
        ({"eps": 4}, 2, "is about linf 8/255 and "),
        ({"norm": "l2"}, 2, "and {b}:classifier about l2 8: two threats cannot be compared"),
        (
            {"images": ""},
            3,
            "has no robust accuracy of single images; it takes the Limpid of today",
        ),
    ],
)
def test_verdicts_on_something_else_are_refused(
    changes: dict[str, Any], code: int, sentence: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    one, other = verdict(tmp_path / "a", LOW), verdict(tmp_path / "b", HIGH, **changes)
    assert compare(one, other) == code
    said = capsys.readouterr().err
    assert sentence.replace("{b}", other) in said and said.count("\n") == 1


def test_files_that_are_none_or_do_not_belong_together_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = verdict(tmp_path / "a", LOW)

    def refused(code: int, other: str, sentence: str) -> None:
        assert compare(path, other) == code
        said = capsys.readouterr().err
        assert sentence in said and said.count("\n") == 1

    refused(2, str(tmp_path / "none"), "none is not there; name a folder with a verdict")
    refused(2, str(tmp_path), "has neither metrics.json nor reports/metrics.json; name a folder")
    verdict(tmp_path / "b", HIGH)
    (tmp_path / "b/scores.parquet").write_bytes((tmp_path / "a/scores.parquet").read_bytes())
    refused(3, str(tmp_path / "b"), "are not of one evaluation")
    (tmp_path / "b/scores.parquet").write_text("mine")
    refused(3, str(tmp_path / "b"), "scores.parquet cannot be read: ")
    (tmp_path / "b/scores.parquet").unlink()
    refused(3, str(tmp_path / "b"), "scores.parquet cannot be read: ")
    (tmp_path / "b/metrics.json").write_text(json.dumps({}))
    refused(2, str(tmp_path / "b"), "has no schema version")
