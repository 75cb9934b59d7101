"""A defense of two faces is caught by whatever it goes; honest ones give one answer."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toy_networks import Blurred, Noisy, Rounded
from toys import failed, head

from components.attacks import Linf
from components.data.draws import NoiseStream
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.defense import Defense
from components.models.purifiers import Purifier
from components.probes import answers
from components.probes.bench import Bench
from components.probes.gradients import gradient_declared, gradient_honest

THREAT = Linf(norm="linf", eps_255=25.5)


class TwoFaced(Purifier):
    """A blur, but the identity where `attacked` says so."""

    def __init__(self, attacked: Callable[[Tensor], bool], random: bool = False) -> None:
        super().__init__()
        self.attacked, self.stochastic = attacked, random

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        if stream is not None:
            x = x + 0.01 * stream.normal(tuple(x.shape[1:]), "noise").to(x.dtype)
        return x if self.attacked(x) else torch.nn.functional.avg_pool2d(x, 3, 1, 1)


def bench_of(purifier: Purifier | None, classifier: Classifier, data: ImageSet) -> Bench:
    some = head(data, 40)
    defense = Defense(classifier, purifier).freeze()
    return Bench(defense, some.pixels(), some.labels, some.ids, THREAT, 0, None, 30)


def calls() -> Callable[[Tensor], bool]:
    count = [0]

    def attacked(x: Tensor) -> bool:
        count[0] += 1
        return count[0] > 6

    return attacked


FACES: dict[str, Callable[[], Callable[[Tensor], bool]]] = {
    "gradients on": lambda: lambda x: torch.is_grad_enabled(),
    "a gradient wanted": lambda: lambda x: x.requires_grad,
    "one image": lambda: lambda x: len(x) == 1,
    "seven images": lambda: lambda x: len(x) == 7,
    "a large batch": lambda: lambda x: len(x) >= 128,
    "the batch of the scoring": lambda: lambda x: len(x) == 30,
    "float64": lambda: lambda x: x.dtype == torch.float64,
    "later calls": calls,
}


def test_a_large_constant_in_the_logits_hides_no_second_face(
    classifier: Classifier, test_set: ImageSet
) -> None:
    """Of logits near 1e5 a thousandth is more than any margin."""

    class Shifted(nn.Module):
        def __init__(self, classifier: nn.Module, honest: bool) -> None:
            super().__init__()
            self.classifier, self.honest = classifier, honest

        def forward(self, x: Tensor) -> Tensor:
            blurred = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
            seen = x.requires_grad and not self.honest
            logits: Tensor = self.classifier(blurred if seen else x)
            return logits + 1e5

    some = head(test_set, 64)
    for honest in (True, False):
        defense = Defense(Shifted(classifier, honest), None).freeze()
        bench = Bench(defense, some.pixels(), some.labels, some.ids, THREAT, 0, None, 30)
        assert answers.one_answer(bench, bench.still_points()).passed == honest


@pytest.mark.parametrize("random", [False, True], ids=["deterministic", "random"])
@pytest.mark.parametrize("face", FACES)
def test_a_defense_of_two_faces_is_caught(
    face: str, random: bool, classifier: Classifier, test_set: ImageSet
) -> None:
    bench = bench_of(TwoFaced(FACES[face](), random), classifier, test_set)
    found = answers.one_answer(bench, bench.still_points())
    assert found.level == "block" and not found.passed, found.detail


@pytest.mark.parametrize("purifier", [None, Blurred(), Noisy(0.2), Rounded()])
def test_an_honest_defense_gives_one_answer(
    purifier: Purifier | None, classifier: Classifier, test_set: ImageSet
) -> None:
    bench = bench_of(purifier, classifier, test_set)
    found = answers.one_answer(bench, bench.points())
    assert found.passed, found.detail


def test_points_lie_in_the_ball_and_on_the_way_of_the_attack(
    classifier: Classifier, test_set: ImageSet
) -> None:
    bench = bench_of(None, classifier, test_set)
    points = bench.points()
    assert list(points) == [
        "clean", "ball", "a quarter of the way", "half of the way", "all of the way",
    ]  # fmt: skip
    for x in points.values():
        assert x.min() >= 0 and x.max() <= 1
        assert (x - bench.x).abs().max() <= THREAT.eps + 1e-6
    on_grid = (255 * points["ball"] - (255 * points["ball"]).round()).abs() < 1e-3
    assert on_grid.float().mean() < 0.05
    right = [(bench.defense(x).argmax(1) == bench.labels).float().mean() for x in points.values()]
    assert right[-1] <= right[2] < right[0], "further on, more are fooled"


# Gradients


class Slanted(Purifier):
    """The identity, whose gradient is too small by `factor`, in float32 or everywhere."""

    def __init__(self, factor: float, everywhere: bool = True) -> None:
        super().__init__()
        self.factor, self.everywhere = factor, everywhere

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        if x.dtype == torch.float64 and not self.everywhere:
            return x
        return x.detach() + self.factor * (x - x.detach())


@pytest.mark.parametrize(
    ("purifier", "honest"),
    [
        (None, True), (Blurred(), True), (Noisy(0.1), True), (Slanted(1.0), True),
        (Slanted(0.1), False), (Slanted(-1.0), False), (Slanted(10.0), False),
        (Slanted(-1.0, everywhere=False), False), (Slanted(1e-20), False),
    ],
)  # fmt: skip
def test_a_gradient_that_differences_do_not_measure_is_caught(
    purifier: Purifier | None, honest: bool, classifier: Classifier, test_set: ImageSet
) -> None:
    bench = bench_of(purifier, classifier, test_set)
    found = gradient_honest(bench, bench.points())
    assert found.passed == honest, found.detail
    assert found.figures["undecided"] == 0
    assert (found.figures["wrong"] <= 1) == honest


def test_a_declared_absence_of_a_gradient_is_checked(
    classifier: Classifier, test_set: ImageSet
) -> None:
    assert gradient_declared(bench_of(Rounded(), classifier, test_set)).passed
    honest = Blurred()
    honest.differentiable = False
    found = gradient_declared(bench_of(honest, classifier, test_set))
    assert found.level == "block" and not found.passed, found.detail
    straight = Slanted(1.0)
    straight.differentiable = False
    assert not gradient_declared(bench_of(straight, classifier, test_set)).passed


# Code


def test_code_that_asks_where_it_runs_is_named(
    classifier: Classifier, test_set: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "curious.py").write_text(
        "import os\n\nfrom components.models.purifiers import Purifier\n\n\n"
        "class Curious(Purifier):\n    def purify(self, x, stream):\n"
        "        return 0 * x if os.environ.get('RAY') else x\n"
    )
    (tmp_path / "plain.py").write_text(
        "from components.models.purifiers import Purifier\n\n\n"
        "class Plain(Purifier):\n    def purify(self, x, stream):\n        return x  # environ\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    curious, plain = __import__("curious").Curious(), __import__("plain").Plain()
    found = answers.looks_around(Defense(classifier, curious).freeze())
    assert found.level == "warn" and not found.passed and "curious (environ)" in found.detail
    assert failed([answers.looks_around(Defense(classifier, plain).freeze())], "warn") == []
    assert answers.looks_around(Defense(classifier, None).freeze()).passed
