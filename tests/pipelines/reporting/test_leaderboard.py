"""Trials are ranked by robust accuracy, with ties by chance and the front marked."""

import project

from pipelines.config.schema import Params
from pipelines.config.sections import Study
from pipelines.reporting import leaderboard
from pipelines.reporting.leaderboard import HIGH, LOW, Trial
from pipelines.tasks.trial import ROBUST


def trial(name: str, robust: float, clean: float, time: float = 1.0, n: int = 200) -> Trial:
    right = [1.0] * round(robust * n) + [0.0] * (n - round(robust * n))
    figures = {
        ROBUST: robust, LOW: robust, HIGH: robust, "clean": clean,
        "seconds_per_image": time,
    }  # fmt: skip
    return Trial(name, {"a": 1.0}, figures, 4, right)


def study(goal: str) -> Study:
    return (
        Params.model_validate(project.tiny())
        .tuning.studies["student"]
        .model_copy(update={"goal": goal})
    )


def test_the_best_trial_comes_first_and_trials_within_chance_of_it_are_tied() -> None:
    stopped = Trial("stopped", {"a": 1.0}, {ROBUST: 0.99, "clean": 1.0}, 2, None)
    given = [trial("far", 0.4, 1.0), stopped, trial("near", 0.795, 0.9), trial("best", 0.8, 0.9)]
    ranked = leaderboard.rank(given, study("robust"))
    assert [t.name for t in ranked] == ["best", "near", "far", "stopped"]
    assert [t.tied for t in ranked] == [True, True, False, False]
    assert not any(t.front for t in ranked)


def test_equal_robust_accuracy_is_ranked_by_clean_accuracy() -> None:
    ranked = leaderboard.rank([trial("b", 0.5, 0.8), trial("a", 0.5, 0.9)], study("robust"))
    assert [t.name for t in ranked] == ["a", "b"]


def test_the_front_holds_every_trial_that_no_other_dominates() -> None:
    figures = {"robust": (0.8, 0.7, 1.0), "clean": (0.5, 0.9, 1.0), "quick": (0.5, 0.7, 0.1)}
    figures |= {"beaten": (0.5, 0.7, 1.0), "twin": (0.8, 0.7, 1.0)}
    given = [trial(name, *values) for name, values in figures.items()]
    ranked = leaderboard.rank(given, study("pareto"))
    assert {t.name for t in ranked if t.front} == {"robust", "clean", "quick", "twin"}


def test_robust_accuracy_under_a_short_ladder_is_called_an_upper_bound() -> None:
    """In the table, in the line of a trial, and in the names under which it is stored."""
    shown = study("robust").model_copy(update={"space": {}})
    (one,) = leaderboard.rank([trial("one", 0.625, 0.9)], shown)
    titles = [str(column.header) for column in leaderboard.table([one], shown).columns]
    assert [title for title in titles if "robust" in title] == ["robust (upper bound), 95 %"]
    assert "clean 90.0, robust at most 62.5 (62.5-62.5)," in leaderboard.line(one, shown)
    assert all("upper_bound" in name for name in leaderboard.FIGURES if "robust" in name)
