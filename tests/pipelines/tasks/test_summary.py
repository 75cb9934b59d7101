"""Entries are compared with each other: with no defense, and with adversarial training."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from fake_evaluation import EVIL, FakeEvaluation

from components.evaluation.counting import Score
from components.models.checkpoints import load, read_card, save
from pipelines.config.sections import Scoring
from pipelines.tasks.subject import Subject
from pipelines.tasks.summary import compared, summary


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> FakeEvaluation:
    return FakeEvaluation(tmp_path_factory.mktemp("evaluation"))


def test_the_digest_is_that_of_what_was_scored(evaluation: FakeEvaluation) -> None:
    for entry in evaluation.entries:
        found = evaluation.metrics.defenses[entry.name]
        assert found.digest == entry.subject.defense().digest != ""
    digests = {found.digest for found in evaluation.metrics.defenses.values()}
    # A bare classifier is scored twice.
    assert len(digests) == len(evaluation.entries) - 1


def test_a_random_defense_stays_random_under_one_draw(evaluation: FakeEvaluation) -> None:
    of = [entry.name for entry in evaluation.entries].index("noisy")
    entry, result = evaluation.entries[of], evaluation.results[of]
    once = {n: Score(1, s.select // s.draws, s.score // s.draws) for n, s in result.scores.items()}
    plan = replace(evaluation.plan, scoring=Scoring(select_draws=1, score_draws=1, shown=3))
    found = summary(entry, replace(result, scores=once), plan, evaluation.test)
    assert found.stochastic and "scoring_draws" in found.checks.blocking_failed
    assert not evaluation.metrics.defenses["none"].stochastic


def test_only_defenses_get_a_verdict(evaluation: FakeEvaluation) -> None:
    for entry in evaluation.entries:
        found = evaluation.metrics.defenses[entry.name].verdict
        assert (found is not None) == (entry.role == "defense")
        assert found is None or found.adversarial_training is None


def save_hardened(evaluation: FakeEvaluation, folder: Path) -> None:
    """Save the classifier as one that was trained adversarially."""
    standard = evaluation.models / "standard"
    card = read_card(standard)
    objective = {"objective": {"kind": "adversarial_classification"}}
    changed = card.model_copy(update={"provenance": {**card.provenance, **objective}})
    save(folder, load(standard), changed)


def test_adversarial_training_is_known_by_its_objective(
    evaluation: FakeEvaluation, tmp_path: Path
) -> None:
    """A baseline that was trained adversarially and has the results of a defense."""
    save_hardened(evaluation, tmp_path / "robust")
    entries, results = list(evaluation.entries), list(evaluation.results)
    known = {entry.name: index for index, entry in enumerate(entries)}
    robust = replace(entries[known["none"]], name="robust", subject=Subject(tmp_path / "robust"))
    of = known["student_adaptive"]
    scored = evaluation.metrics.defenses
    scored = {**scored, "robust": scored["student_adaptive"]}
    found = compared([*entries, robust], [*results, results[of]], scored)
    one = found["student_adaptive"].verdict
    assert one is not None and one.adversarial_training is not None
    assert one.adversarial_training.baseline == "robust"
    assert one.adversarial_training.difference == 0 and one.adversarial_training.p == 1
    # It is no "no defense": only the bare classifier behind the defense is.
    assert one.standing == "broken" and one.rivals == ["none"]


def test_what_stands_before_another_classifier_is_no_rival(
    evaluation: FakeEvaluation, tmp_path: Path
) -> None:
    shutil.copytree(evaluation.models / "standard", tmp_path / "other")
    scored, moved = evaluation.metrics.defenses, []
    for entry in evaluation.entries:
        elsewhere = replace(entry.subject, classifier=tmp_path / "other")
        moved.append(replace(entry, subject=elsewhere) if entry.name == EVIL else entry)
    for entries, rivals in ((evaluation.entries, {EVIL}), (moved, set())):
        found = compared(entries, evaluation.results, scored)["student_adaptive"].not_better_than
        assert found is not None
        assert set(found) & {EVIL} == rivals and "none" in found


def test_a_purifier_before_a_robust_classifier_does_not_shine_by_its_light(
    evaluation: FakeEvaluation, tmp_path: Path
) -> None:
    """Alone the classifier keeps as much as behind the purifier, and no defense keeps nothing."""
    save_hardened(evaluation, tmp_path / "robust")
    known = {entry.name: index for index, entry in enumerate(evaluation.entries)}
    none, purified = (evaluation.entries[known[name]] for name in ("none", "student_adaptive"))
    robust = replace(none, name="robust", subject=Subject(tmp_path / "robust"))
    behind = replace(purified, subject=replace(purified.subject, classifier=tmp_path / "robust"))
    same = evaluation.results[known["student_adaptive"]]
    scored = {**evaluation.metrics.defenses}
    scored["robust"] = scored["student_adaptive"]
    results = [evaluation.results[known["none"]], same, same]
    found = compared([none, robust, behind], results, scored)["student_adaptive"].verdict
    assert found is not None and (found.standing, found.rivals) == ("broken", ["robust"])
    assert found.adversarial_training is not None
    assert found.adversarial_training.baseline == "robust"


def test_without_the_bare_classifier_no_defense_is_measured(evaluation: FakeEvaluation) -> None:
    of = [entry.name for entry in evaluation.entries].index("student_adaptive")
    alone = [evaluation.entries[of]], [evaluation.results[of]]
    found = compared(*alone, evaluation.metrics.defenses)["student_adaptive"].verdict
    assert found is not None and found.standing == "not measured"


def test_attacks_that_were_written_for_an_entry_are_named(evaluation: FakeEvaluation) -> None:
    scored = evaluation.metrics.defenses
    assert scored["rounded"].written_for == ["soft"]
    assert scored["student_grey"].written_for == []
