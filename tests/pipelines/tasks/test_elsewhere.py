"""Attacks with a threat of their own: they count there, and in the primary ball where they lie."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_evaluation import PGD, FakeEvaluation

from components.attacks import L2, Attack, Linf
from components.attacks.stadv import StAdv
from components.evaluation.counting import Score
from pipelines.tasks.entries import Entry
from pipelines.tasks.metrics import Scored
from pipelines.tasks.scoring import Result, _elsewhere
from pipelines.tasks.summary import summary

N = 12
WIDE, EUCLID = Linf(norm="linf", eps_255=102.0), L2(norm="l2", eps_l2=1.0)
FLOW = StAdv(kind="stadv", bound=0.05, steps=10, step=0.1, smoothness=0.0, eot=1)
ATTACKS: dict[str, Attack] = {
    "bpda/wide": PGD.model_copy(update={"threat": WIDE}),
    "full/pgd": PGD,
    "full/wide": PGD.model_copy(update={"threat": WIDE}),
    "full/euclid": PGD.model_copy(update={"threat": EUCLID, "steps": 3}),
    "full/flow": FLOW,
}


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> FakeEvaluation:
    return FakeEvaluation(tmp_path_factory.mktemp("evaluation"))


def student(fake: FakeEvaluation) -> tuple[Entry, Result]:
    row = [entry.name for entry in fake.entries].index("student_adaptive")
    entry = replace(fake.entries[row], attacks=ATTACKS, sets=dict.fromkeys(ATTACKS, Path()))
    return entry, fake.results[row]


def test_examples_are_measured_in_every_threat_and_a_flow_knows_its_own(
    fake: FakeEvaluation,
) -> None:
    entry, _ = student(fake)
    clean = torch.full((2, 1, 8, 8), 0.5)
    far = clean.clone()
    far[1] += 0.3  # 2.4 in L2
    sets = {"clean": clean, **dict.fromkeys(ATTACKS, far)}
    found = _elsewhere(entry, sets, clean, fake.plan)
    assert list(found) == ["linf 102/255", "l2 1", "flow 0.05"]
    assert found["linf 102/255"]["full/pgd"].tolist() == [True, True]
    assert found["l2 1"]["full/pgd"].tolist() == [True, False]
    own = {name: inside.all() for name, inside in found["flow 0.05"].items()}
    assert own == {"clean": True, **{name: name == "full/flow" for name in ATTACKS}}


def counted(fake: FakeEvaluation, failing: bool = False) -> Scored:
    """Sum up: PGD leaves 8 of 12 images, the wide one 2, of which 4 examples are in the ball."""
    entry, result = student(fake)

    def score(right: int) -> Score:
        counts = np.where(np.arange(N) < right, 1, 0)
        return Score(1, counts, counts)

    rights = {
        "clean": 12,
        "bpda/wide": 9,
        "full/pgd": 8,
        "full/wide": 2,
        "full/euclid": 5,
        "full/flow": 1,
    }
    scores = {name: score(right) for name, right in rights.items()}
    everywhere = np.ones(N, dtype=bool)
    # The examples of the last four images are near; there PGD succeeded, too.
    near = {**dict.fromkeys(scores, np.arange(N) >= 8), "clean": everywhere, "full/pgd": everywhere}
    within = {name: everywhere if name != "full/flow" else ~everywhere for name in scores}
    flow = {name: np.full(N, name in ("clean", "full/flow")) for name in scores}
    findings = [*result.findings]
    if failing:
        findings.append(findings[0].model_copy(update={"name": "logits", "passed": False}))
    made = replace(
        result, scores=scores, inside=near, detector=None, findings=findings,
        elsewhere={"linf 102/255": within, "l2 1": within, "flow 0.05": flow},
        distance={name: np.zeros(N) for name in scores}, agreed={n: np.ones(N) for n in scores},
    )  # fmt: skip
    return summary(entry, made, fake.plan, fake.test)


def test_robust_accuracy_stays_that_of_the_primary_threat(fake: FakeEvaluation) -> None:
    found = counted(fake)
    assert found.headline.accuracy == pytest.approx(8 / 12)
    assert {rung: one.accuracy for rung, one in found.rungs.items()} == {
        "full": pytest.approx(8 / 12)
    }, "on bpda nothing was run within the primary threat"
    assert {n: (one.region, one.bounded) for n, one in found.attacks.items()} == {
        "bpda/wide": ("linf 102/255", False),
        "full/pgd": ("linf 51/255", True),
        "full/wide": ("linf 102/255", False),
        "full/euclid": ("l2 1", False),
        "full/flow": ("flow 0.05", False),
    }


def test_each_further_threat_has_the_worst_of_all_sets_inside_it(fake: FakeEvaluation) -> None:
    found = counted(fake).elsewhere
    assert {label: one.headline.accuracy for label, one in found.items()} == {
        "linf 102/255": pytest.approx(2 / 12),
        "l2 1": pytest.approx(2 / 12),
        "flow 0.05": pytest.approx(1 / 12),
    }
    assert [list(one.rungs) for one in found.values()] == [["bpda", "full"], ["full"], ["full"]]


def test_a_further_threat_without_strong_attacks_is_an_upper_bound(fake: FakeEvaluation) -> None:
    """Three steps carry no claim, and neither does a flow; nor does anything after a failed check.

    The wide attack climbs both losses by ten steps.
    """
    bounds = {label: one.headline.upper_bound for label, one in counted(fake).elsewhere.items()}
    assert bounds == {"linf 102/255": False, "l2 1": True, "flow 0.05": True}
    failed = counted(fake, failing=True)
    assert failed.headline.upper_bound
    assert all(one.headline.upper_bound for one in failed.elsewhere.values())
