"""Several seeds: means and deviations by hand, and runs that are not comparable are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.commands import seeds


def metrics_file(tmp_path: Path, name: str, headline: float, **changes: Any) -> str:
    rung = {"accuracy": headline, "low": 0.0, "high": 1.0, "n": 50}
    found = {
        "role": "defense",
        "clean": {**rung, "accuracy": 0.9},
        "headline": {**rung, "upper_bound": changes.pop("bound", False)},
        "rungs": {"classifier": {**rung, "accuracy": 0.8}, "full": rung},
    }
    threat = {"norm": "linf", "eps_255": 8, "n": 50}
    path = tmp_path / f"{name}.json"
    path.write_text(
        json.dumps(
            {
                "seed": name,
                "threat_model": threat,
                "defenses": {"purifier": found},
                **changes,
            }
        )
    )
    return str(path)


def test_mean_and_deviation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [metrics_file(tmp_path, str(i), share) for i, share in enumerate((0.2, 0.3, 0.4))]
    assert seeds.main(files) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "purifier 90.0 ± 0.0 80.0 ± 0.0 - 30.0 ± 10.0 30.0 ± 10.0 20.0 to 40.0" in words
    assert "3 runs" in words and "n = 50" in words and "8/255" in words


def test_one_failed_check_makes_the_mean_a_bound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        seeds.main([metrics_file(tmp_path, "a", 0.2), metrics_file(tmp_path, "b", 0.2, bound=True)])
        == 0
    )
    assert "<=20.0 ± 0.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"threat_model": {"norm": "linf", "eps_255": 16, "n": 50}}, "another threat model"),
        ({"defenses": {}}, "another set of defenses"),
        ({"defenses": 3}, "no metrics.json of ours"),
        ({"seed": "a"}, "run of seed a, which is there already"),
    ],
)
def test_runs_of_another_kind_are_refused(
    changes: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        seeds.main([metrics_file(tmp_path, "a", 0.2), metrics_file(tmp_path, "b", 0.2, **changes)])
        == 2
    )
    assert said in capsys.readouterr().err


def test_one_run_has_no_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert seeds.main([metrics_file(tmp_path, "a", 0.2)]) == 2
    assert "two or more" in capsys.readouterr().err
    assert seeds.main([metrics_file(tmp_path, "a", 0.2), str(tmp_path / "none.json")]) == 2
