"""Eight defenses that the field broke: the harness ends near their bare nets, or blocks them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from components.evaluation.counting import CLEAN, Score
from components.models.defense import Defense
from components.selftest import Toy, train_toy
from components.selftest.broken import BROKEN, Attacked, Ladder, Verdict, attack, close, judge

# Purifiers that iterate or draw noise cost several times as much as a net alone.
DEAR = {
    "total variation",
    "pixel deflection",
    "anti-adversary",
    "SOAP-like",
    "mixup inference",
}
QUICK = Ladder(steps=60, queries=100, draws=10)
QUICKER = Ladder(steps=20, queries=80, draws=10)


@pytest.fixture(scope="module")
def toy() -> Toy:
    return train_toy()


@pytest.mark.parametrize("name", BROKEN)
def test_attacks_leave_a_broken_defense_no_more_than_its_bare_net(name: str, toy: Toy) -> None:
    defense, base = BROKEN[name](toy)
    data = toy.test[torch.arange(40)]
    found = attack(defense, base, data, QUICKER if name in DEAR else QUICK)
    assert found.accuracy(CLEAN) > 0.7
    assert close(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_the_harness_ends_within_five_points_of_the_bare_net_or_blocks(name: str, toy: Toy) -> None:
    verdict = judge(*BROKEN[name](toy), toy, Ladder())
    assert not verdict.fooled(), verdict.attacked.robust()


def test_the_anti_adversary_falls_to_examples_of_the_bare_net_alone(toy: Toy) -> None:
    defense, base = BROKEN["anti-adversary"](toy)
    found = attack(defense, base, toy.test[torch.arange(24)], QUICKER)
    assert found.white_box() > found.robust() + 0.1
    assert found.robust() == found.base_robust()


def test_a_number_above_the_bare_net_fools_unless_a_check_blocks(toy: Toy) -> None:
    def scored(right: int) -> dict[str, Score]:
        counts = (np.arange(100) < right).astype(np.int64)
        return {CLEAN: Score(1, counts, counts)}

    bare = Defense(toy.classifier, None).freeze()
    above = Attacked(bare, toy.test, {}, {}, scored(16), scored(10))
    assert not close(above)
    assert close(replace(above, scores=scored(15)))
    assert Verdict(above, [], ["a warning"], []).fooled()
    assert not Verdict(above, ["blind_attack"], [], []).fooled()
