"""The first screen: what is claimed, what is left, and that a collapse does not look like a gap."""

import re
from typing import Any

import pytest
from fake_evaluation import FakeEvaluation

from pipelines.reporting import wording
from pipelines.reporting.claims import claims, compared_baseline, conclusion
from pipelines.reporting.report import first_shown
from pipelines.tasks.metrics import Difference, Metrics, Scored, Verdict


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> FakeEvaluation:
    return FakeEvaluation(tmp_path_factory.mktemp("evaluation"))


def changed(evaluation: FakeEvaluation, **standings: str) -> dict[str, Scored]:
    """Return the scores with other verdicts, by the names of defenses."""
    scored = dict(evaluation.metrics.defenses)
    robust = Difference(baseline="none", difference=0.1, low=-0.1, high=0.3, p=0.5)
    for name, standing in standings.items():
        verdict: Any = {"standing": standing, "rivals": [], "adversarial_training": robust}
        scored[name] = scored[name].model_copy(update={"verdict": Verdict(**verdict)})
    return scored


def test_the_claim_is_the_best_blind_rung_and_what_is_left_is_robust_accuracy(
    evaluation: FakeEvaluation,
) -> None:
    scored = changed(evaluation, student_adaptive="not told apart")
    first, second = claims(evaluation.entries, scored)
    assert (first.name, first.fate, second.name, second.fate) == (
        "student_adaptive", "holds", "student_grey", "collapses",
    )  # fmt: skip
    assert first.seen is not None and second.seen is not None
    assert first.seen == scored["student_adaptive"].rungs["classifier"]
    assert second.seen == scored["student_grey"].rungs["bpda"] and second.left.accuracy == 0


def test_the_sentence_names_the_collapse_and_what_holds(evaluation: FakeEvaluation) -> None:
    scored = changed(evaluation, student_adaptive="not told apart")
    assert compared_baseline(scored) == "none"
    assert conclusion(claims(evaluation.entries, scored), scored) == (
        "1 of 2 defenses collapses: student_grey claims 100.0 % before an attacker who is blind "
        "to it, and keeps 0.0 % under the worst of all attacks; student_adaptive keeps most, "
        "58.3 % of 66.7 %; none, without a purifier, keeps 0.0 %."
    )


def test_an_invalid_measurement_neither_holds_nor_collapses(evaluation: FakeEvaluation) -> None:
    scored = changed(evaluation, student_adaptive="above", student_grey="above")
    for name in ("student_adaptive", "student_grey"):
        checks = scored[name].checks.model_copy(update={"blocking_failed": ["planted"]})
        scored[name] = bounded(scored[name], checks=checks)
    found = claims(evaluation.entries, scored)
    assert {claim.fate for claim in found} == {"not valid"}
    sentence = conclusion(found, scored)
    assert "None is validly measured" in sentence and "2 measurements are not valid" in sentence


def test_an_upper_bound_of_a_quick_ladder_decides_nothing(evaluation: FakeEvaluation) -> None:
    scored = changed(evaluation, student_adaptive="not measured", student_grey="broken")
    scored["student_adaptive"] = bounded(scored["student_adaptive"], quick=True)
    found = claims(evaluation.entries, scored)
    fates = {claim.name: claim.fate for claim in found}
    assert fates["student_adaptive"] == "not decided" and fates["student_grey"] == "collapses"
    assert "1 has an upper bound of a quick ladder" in conclusion(found, scored)


def bounded(scored: Scored, **changes: Any) -> Scored:
    """Return scores whose headline is an upper bound."""
    head = scored.headline.model_copy(update={"upper_bound": True})
    return scored.model_copy(update={"headline": head, **changes})


def test_what_was_not_compared_with_no_defense_does_not_hold(evaluation: FakeEvaluation) -> None:
    scored = changed(evaluation, student_adaptive="not measured")
    fates = {claim.name: claim.fate for claim in claims(evaluation.entries, scored)}
    assert fates["student_adaptive"] == "not valid"
    assert "was not scored without a defense" in wording.verdict(scored["student_adaptive"])


def test_adversarial_training_that_beats_nothing_is_named(evaluation: FakeEvaluation) -> None:
    verdict = Verdict(standing="no comparison", rivals=["sham"], adversarial_training=None)
    found = evaluation.metrics.defenses["student_adaptive"].model_copy(update={"verdict": verdict})
    assert wording.verdict(found) == (
        "no comparison: the adversarial training of sham does not beat the classifier without a "
        "defense"
    )


def test_the_sentence_claims_no_more_than_was_measured(evaluation: FakeEvaluation) -> None:
    """A baseline whose measurement failed keeps at most its number; controls must be there."""
    scored = changed(evaluation, student_adaptive="broken")
    head = scored["none"].headline.model_copy(update={"upper_bound": True})
    scored["none"] = scored["none"].model_copy(update={"headline": head})
    found = claims(evaluation.entries, scored)
    assert "beat no defense and every control; none, without a purifier, keeps at most 0.0 %." in (
        conclusion(found, scored)
    )
    alone = {name: one for name, one in scored.items() if one.role != "control"}
    sentence = conclusion(found, alone)
    assert "beat no defense; none" in sentence and "control" not in sentence


def test_what_falls_without_a_claim_fails(evaluation: FakeEvaluation) -> None:
    # As made up, twelve images are too few for seven right answers to beat none.
    assert [claim.fate for claim in claims(evaluation.entries, evaluation.metrics.defenses)] == [
        "fails", "collapses",
    ]  # fmt: skip
    assert conclusion([], {}) == "No defense was scored."


def test_a_collapse_is_drawn_with_other_marks_and_words_than_a_gap_that_holds(
    evaluation: FakeEvaluation,
) -> None:
    values = evaluation.values()
    values["defenses"]["student_adaptive"]["verdict"]["standing"] = "no comparison"
    html = evaluation.html(values)
    figure = html[html.index('<figure class="claims"') :].partition("</figure>")[0]
    rows = re.findall(r'<div class="claim">.*?</div>', figure, re.DOTALL)
    holds, collapses = rows
    assert "student_adaptive" in holds and 'class="mark holds" style="left:58.3%"' in holds
    assert 'class="kept holds" style="width:58.3%"' in holds and ">holds<" in holds
    assert "student_grey" in collapses and 'class="mark collapses" style="left:0.0%"' in collapses
    assert "kept" not in collapses and ">collapses<" in collapses
    assert 'class="gap collapses" style="left:0.0%;width:100.0%"' in collapses


def test_panels_open_on_the_attack_that_wins_and_not_on_the_one_that_is_credited(
    evaluation: FakeEvaluation,
) -> None:
    found: Metrics = evaluation.metrics
    (entry,) = (one for one in evaluation.entries if one.name == "student_adaptive")
    scored = found.defenses["student_adaptive"]
    # The grey box is credited with the images that it shares with the full gradient.
    assert scored.carried_by["classifier/pgd"] > scored.carried_by["full/pgd"]
    assert first_shown(entry, scored, evaluation.plan) == "full/pgd"
