"""What a score rests on: void rungs carry no claim, and still count in the worst of all."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from fake_evaluation import PGD, FakeEvaluation

from components.attacks import Attack
from components.attacks.a3 import A3
from components.attacks.apgd import ApgdDlr
from components.attacks.gradient import Pgd
from components.probes import Finding
from pipelines.tasks.metrics import Scored
from pipelines.tasks.summary import summary

CROSS_ENTROPY = Pgd(**PGD.model_dump())
DLR = ApgdDlr(kind="apgd_dlr", steps=10, restarts=1, eot=1)
# What it leaves is an upper bound, whatever it climbs.
QUICK = A3(kind="a3")


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> FakeEvaluation:
    return FakeEvaluation(tmp_path_factory.mktemp("evaluation"))


def scored(
    fake: FakeEvaluation, name: str, failed: Sequence[str] = (), attack: Attack = PGD
) -> Scored:
    """Return the scores of an entry whose probes of these names failed."""
    row = [entry.name for entry in fake.entries].index(name)
    result = fake.results[row]
    findings = [Finding(name=one, level="warn", passed=False, detail="none") for one in failed]
    entry = fake.entries[row]
    attacks = {n: attack if n.endswith("/pgd") else one for n, one in entry.attacks.items()}
    return summary(
        replace(entry, attacks=attacks),
        replace(result, findings=[*result.findings, *findings]),
        fake.plan,
        fake.test,
    )


def test_a_score_whose_only_white_box_rung_is_void_is_blocked(fake: FakeEvaluation) -> None:
    sound = scored(fake, "student_adaptive")
    assert "full_rung" not in sound.checks.blocking_failed and sound.void_rungs == []
    void = scored(fake, "student_adaptive", ["gradient_present/full"])
    assert "full_rung" in void.checks.blocking_failed and void.void_rungs == ["full"]
    assert void.headline.accuracy == sound.headline.accuracy
    assert void.white_box == sound.white_box and void.carried_by == sound.carried_by


def test_a_void_stand_in_carries_no_claim(fake: FakeEvaluation) -> None:
    """The purifier that rounds is attacked on `bpda` and `soft`, and needs both."""
    assert "strong_attack" not in scored(fake, "rounded").checks.blocking_failed
    void = scored(fake, "rounded", ["gradient_present/soft"])
    assert "strong_attack" in void.checks.blocking_failed and void.void_rungs == ["soft", "full"]


def test_a_flat_loss_voids_a_rung_of_the_cross_entropy_alone(fake: FakeEvaluation) -> None:
    flat = ["loss_alive/full"]
    assert scored(fake, "student_adaptive", flat).void_rungs == []
    assert scored(fake, "student_adaptive", flat, DLR).void_rungs == []
    void = scored(fake, "student_adaptive", flat, CROSS_ENTROPY)
    assert void.void_rungs == ["full"] and "full_rung" in void.checks.blocking_failed


@pytest.mark.parametrize("attack", [CROSS_ENTROPY, DLR, QUICK])
def test_one_family_of_losses_carries_no_claim(fake: FakeEvaluation, attack: Attack) -> None:
    assert "strong_attack" not in scored(fake, "student_adaptive").checks.blocking_failed
    alone = scored(fake, "student_adaptive", (), attack)
    assert "strong_attack" in alone.checks.blocking_failed and alone.headline.upper_bound
