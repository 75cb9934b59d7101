"""Several seeds: means and deviations by hand, and runs that are not comparable are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from fake_evaluation import bare_scores, fail_checks

from pipelines.__main__ import main
from pipelines.tasks.metrics import CleanScore, Estimate, Headline, LinfThreat, Metrics, Selftest


def write_run(tmp_path: Path, number: int, headline: float, **changes: Any) -> str:
    """Write the metrics of a run of seed `number`; `changes` are keys of the file."""
    rung = {"low": 0.0, "high": 1.0, "n": 50}
    bound = changes.pop("bound", False)
    found = bare_scores(
        headline,
        clean=CleanScore(accuracy=0.9, agreement=0.95, **rung),
        headline=Headline(accuracy=headline, upper_bound=False, **rung),
        rungs={
            "classifier": Estimate(accuracy=0.8, **rung),
            "full": Estimate(accuracy=headline, **rung),
        },
    )
    metrics = Metrics(
        seed=number,
        selftest=Selftest(cases=1, caught=1),
        threat_model=LinfThreat(norm="linf", eps_255=8, n=50, select_draws=1, score_draws=1),
        published={},
        defenses={"purifier": found},
    )
    path = tmp_path / f"{number}.json"
    values = metrics.model_dump(mode="json")
    if bound:
        fail_checks(values["defenses"]["purifier"], "planted")
    path.write_text(json.dumps({**values, **changes}))
    return str(path)


def test_mean_and_deviation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [write_run(tmp_path, i, accuracy) for i, accuracy in enumerate((0.2, 0.3, 0.4))]
    assert main(["seeds", *files]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "purifier 90.0 ± 0.0 80.0 ± 0.0 - 30.0 ± 10.0 30.0 ± 10.0 20.0 to 40.0" in words
    assert "3 runs" in words and "n = 50" in words and "8/255" in words


def test_one_failed_check_makes_the_mean_a_bound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [write_run(tmp_path, 0, 0.2), write_run(tmp_path, 1, 0.2, bound=True)]
    assert main(["seeds", *files]) == 0
    assert "<=20.0 ± 0.0" in capsys.readouterr().out


OTHER_RADIUS = {"norm": "linf", "eps_255": 16, "n": 50, "select_draws": 1, "score_draws": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threat_model": OTHER_RADIUS}, "another threat model"),
        ({"defenses": {}}, "another set of defenses"),
        ({"defenses": 3}, "is damaged (defenses: "),
        ({"seed": 0}, "run of seed 0, which is there already"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [write_run(tmp_path, 0, 0.2), write_run(tmp_path, 1, 0.2, **changes)]
    assert main(["seeds", *files]) == 2
    assert message in capsys.readouterr().err


def test_one_run_has_no_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["seeds", write_run(tmp_path, 0, 0.2)]) == 2
    assert "two or more" in capsys.readouterr().err
    assert main(["seeds", write_run(tmp_path, 0, 0.2), str(tmp_path / "none.json")]) == 2
