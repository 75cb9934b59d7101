"""Each check of an attack fails on the fault it is for."""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal

import pytest
import torch
from planted import failures
from torch import Tensor

from components.attacks import L2, Attack, Linf
from components.attacks.contract import Cost, LossFamily, Outcome
from components.attacks.search import Search, search_cost
from components.data.draws import Draws
from components.models.defense import Target, margin
from limpid.testing import attack_checks, check_attack

SHAPE, CLASSES = (1, 6, 6), 4


class Honest(Attack):
    """Sign-gradient descent of the margin from a random start."""

    early_stopping: ClassVar[bool] = True
    losses: ClassVar[tuple[LossFamily, ...]] = ("margin",)

    kind: Literal["honest"] = "honest"
    steps: int = 3
    eot: int = 2

    def effort(self, classes: int, stochastic: bool) -> Cost:
        return search_cost(self.steps, 1, self.draws(stochastic), stochastic)

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        search = self.search(target, images, labels, threat)
        if len(search.rows):
            x = self.start(images, threat, draws)[search.rows]
            for _ in range(self.steps):
                found = search.evaluate(x, lambda logits, labels: -margin(logits, labels))
                x = search.project(threat.ascend(x, found.gradient, 0.5 * threat.eps))
                self.stepped(search)
                if not len(search.rows):
                    break
            search.query(x)
        return search.outcome()

    def search(self, *arguments: Any) -> Search:
        search = Search(*arguments, early_stop=True)
        search.restart()
        return search

    def start(self, images: Tensor, threat: Linf | L2, draws: Draws) -> Tensor:
        return threat.start(images, draws, "start")

    def stepped(self, search: Search) -> None:
        """Nothing is done between two steps."""


class RunsWhatItDoesNotTake(Honest):
    norms: ClassVar[tuple[str, ...]] = ("linf",)


class CountsInFloats(Honest):
    def run(self, *arguments: Any) -> Outcome:
        found = super().run(*arguments)
        return replace(found, iterations=found.iterations.double())


class LeavesTheBall(Honest):
    def search(self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2) -> Search:
        return super().search(target, images, labels, threat.scaled(2))

    def start(self, images: Tensor, threat: Linf | L2, draws: Draws) -> Tensor:
        return threat.scaled(2).start(images, draws, "start")


class GradesItself(Honest):
    def run(self, *arguments: Any) -> Outcome:
        found = super().run(*arguments)
        return replace(found, margin=found.margin - 1000)


class AttacksWhatIsWrong(Honest):
    def search(self, *arguments: Any) -> Search:
        return Search(*arguments, early_stop=False)


class RemembersTheLastBatch(Honest):
    last: ClassVar[list[Tensor]] = [torch.zeros(0)]

    def run(self, target: Target, images: Tensor, *arguments: Any) -> Outcome:
        found = super().run(target, images, *arguments)
        seen = torch.equal(images, self.last[0])
        self.last[0] = torch.zeros(0) if seen else images.clone()
        return replace(found, iterations=found.iterations + seen)


class DrawsByRow(Honest):
    def start(self, images: Tensor, threat: Linf | L2, draws: Draws) -> Tensor:
        return threat.start(images, replace(draws, ids=torch.arange(len(images))), "start")


class RanksTheBatch(Honest):
    def run(self, target: Target, images: Tensor, *arguments: Any) -> Outcome:
        found = super().run(target, images, *arguments)
        rank = images.flatten(1).mean(1).argsort().argsort()
        return replace(found, iterations=found.iterations + rank)


class AsksBehindTheCounter(Honest):
    def run(self, target: Target, images: Tensor, *arguments: Any) -> Outcome:
        target.defense.classifier(images)
        return super().run(target, images, *arguments)


class PromisesAStepMore(Honest):
    def effort(self, classes: int, stochastic: bool) -> Cost:
        return super().effort(classes, stochastic) + Cost(0, 1)


class FollowsOneNoise(Honest):
    def stepped(self, search: Search) -> None:
        search.queries = 1


class MovesLabels(Honest):
    def run(self, target: Target, images: Tensor, labels: Tensor, *arguments: Any) -> Outcome:
        found = super().run(target, images, labels, *arguments)
        labels.zero_()
        return found


class DrawsFromPython(Honest):
    def run(self, *arguments: Any) -> Outcome:
        random.random()
        return super().run(*arguments)


class TakesNanForRobust(Honest):
    def run(self, *arguments: Any) -> Outcome:
        found = super().run(*arguments)
        return replace(found, margin=found.margin.where(found.margin > -1e30, 1.0))


FAULTS: dict[type[Attack], set[str]] = {
    RunsWhatItDoesNotTake: {"runs_or_refuses_in_one_sentence"},
    CountsInFloats: {"returns_one_image_for_each"},
    LeavesTheBall: {"stays_inside_the_ball"},
    GradesItself: {"reports_no_success_that_is_none"},
    AttacksWhatIsWrong: {"leaves_misclassified_images_alone"},
    RemembersTheLastBatch: {"equal_seeds_give_equal_bytes"},
    # A row is another row in a smaller batch, too.
    DrawsByRow: {"the_order_of_images_changes_none", "the_batch_size_changes_no_image"},
    RanksTheBatch: {"the_batch_size_changes_no_image"},
    AsksBehindTheCounter: {"counts_every_pass"},
    PromisesAStepMore: {"makes_the_passes_it_promises"},
    FollowsOneNoise: {"no_two_gradients_share_noise"},
    MovesLabels: {"changes_neither_model_nor_images"},
    DrawsFromPython: {"leaves_global_random_streams_alone"},
    TakesNanForRobust: {"takes_logits_that_are_nan_or_tied"},
}


@pytest.fixture(autouse=True)
def _nothing_is_remembered() -> Iterator[None]:
    yield
    RemembersTheLastBatch.last[0] = torch.zeros(0)


def test_every_check_has_a_fault() -> None:
    assert set().union(*FAULTS.values()) == {check.name for check in attack_checks()}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_fails_its_check_by_name_and_no_other(fault: type[Attack]) -> None:
    failed = failures(attack_checks(shape=SHAPE, classes=CLASSES), fault)
    assert set(failed) == FAULTS[fault] and all(failed.values())


@pytest.mark.parametrize(("shape", "classes"), [(SHAPE, CLASSES), (SHAPE, 2), ((3, 32, 32), 10)])
def test_an_honest_attack_passes(shape: tuple[int, int, int], classes: int) -> None:
    check_attack(Honest, shape=shape, classes=classes)


def test_what_is_no_attack_is_refused() -> None:
    with pytest.raises(TypeError, match="make returned dict; it must return an Attack"):
        check_attack(dict)
