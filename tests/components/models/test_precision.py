"""Scores, attacks and probes are computed in full float32, whatever is switched on around them.

On a GPU by deterministic algorithms, too.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_networks import Noisy
from toys import LINF, head, parse_attack

from components.attacks import craft
from components.data.image_set import ImageSet
from components.evaluation.detection import detector_scores
from components.models.accuracy import count_correct, predict_and_detect
from components.models.classifiers import Classifier
from components.models.defense import Defense
from components.models.precision import float32_products, full_precision, require_device
from components.probes import probe
from pipelines.tasks.panels import render
from pipelines.tasks.speed import seconds_per_image

cudnn: Any = torch.backends.cudnn
mkldnn: Any = torch.backends.mkldnn
cuda: Any = torch.backends.cuda
PRODUCTS = {
    "cuda.matmul": cuda.matmul, "cudnn.conv": cudnn.conv, "cudnn.rnn": cudnn.rnn,
    "mkldnn.matmul": mkldnn.matmul, "mkldnn.conv": mkldnn.conv, "mkldnn.rnn": mkldnn.rnn,
}  # fmt: skip
DEVICES = ("cpu", "cuda")
State = dict[str, Any]


def state() -> State:
    """Return every setting that could lower the precision, or change the bits of a second call."""
    autocast = {device: torch.is_autocast_enabled(device) for device in DEVICES}
    products = {name: one.fp32_precision for name, one in PRODUCTS.items()}
    chosen = {"deterministic": cudnn.deterministic, "benchmark": cudnn.benchmark}
    return autocast | products | chosen


FULL_PRODUCTS = dict.fromkeys(PRODUCTS, "ieee")
REPEATABLE = {"deterministic": True, "benchmark": False}
FULL = dict.fromkeys(DEVICES, False) | FULL_PRODUCTS | REPEATABLE


@pytest.fixture(autouse=True)
def _defaults_of_torch() -> Iterator[None]:
    """Set back what these tests change."""
    yield
    for one in (torch.backends, *PRODUCTS.values()):
        one.fp32_precision = "none"
    mkldnn.set_flags(_fp32_precision="none")
    cudnn.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    cudnn.allow_tf32 = True
    cudnn.deterministic, cudnn.benchmark = False, False


@contextmanager
def lowered_by_the_older_settings() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    cudnn.allow_tf32 = cudnn.benchmark = True
    with torch.autocast("cpu", torch.bfloat16):
        yield


@contextmanager
def lowered_by_the_newer_settings() -> Iterator[None]:
    for one in (cuda.matmul, cudnn.conv, cudnn.rnn):
        one.fp32_precision = "tf32"
    for one in (mkldnn.matmul, mkldnn.conv, mkldnn.rnn):
        one.fp32_precision = "bf16"
    with torch.autocast("cpu", torch.bfloat16):
        yield


@contextmanager
def lowered_in_general() -> Iterator[None]:
    for one in PRODUCTS.values():
        one.fp32_precision = "none"
    torch.backends.fp32_precision = "tf32"
    mkldnn.set_flags(_fp32_precision="bf16")
    yield


LOWERED = pytest.mark.parametrize(
    "lowered",
    [lowered_by_the_older_settings, lowered_by_the_newer_settings, lowered_in_general, nullcontext],
)
Lowered = Callable[[], AbstractContextManager[None]]


class Notes(list[State]):
    """A list that copies of its owner share."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Notes":
        return self


class Witness(nn.Module):
    """A classifier that notes the settings that it finds in every call."""

    def __init__(self, network: nn.Module, seen: Notes) -> None:
        super().__init__()
        self.network, self.seen = network, seen

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(state())
        logits: Tensor = self.network(x)
        return logits


class WitnessPurifier(Noisy):
    """Adds noise, and notes the settings in every call."""

    def __init__(self, seen: Notes) -> None:
        super().__init__(0.05)
        self.seen = seen

    def purify(self, x: Tensor, draws: Any) -> Tensor:
        self.seen.append(state())
        return super().purify(x, draws)


def results(defense: Defense, data: ImageSet) -> list[Any]:
    """Return what every entry point reports of a defense: counts, images, scores, findings."""
    pixels, labels, ids = data.pixels(), data.labels, data.ids
    counts = count_correct(defense, pixels, labels, ids, 0, "score", 2, 8)
    attack = parse_attack("pgd", steps=3, eot=1)
    crafted = craft(attack, defense, "full", data, LINF, 0, 8)
    findings = probe(defense, ["full"], data, LINF, 0, 8, 1, 8, None, None, thorough=False)
    detector = detector_scores(defense, {"clean": pixels}, ids, pixels, ids, 0, 8, {})
    panels = render(defense, data, {"pgd": crafted.images}, 0, 8)
    return [
        counts.tolist(), crafted.images.tolist(), findings,
        None if detector is None else detector.score["clean"].tolist(), panels,
    ]  # fmt: skip


@LOWERED
def test_whatever_is_on_outside_a_defense_is_called_in_full_float32(
    lowered: Lowered, classifier: Classifier, test_set: ImageSet
) -> None:
    data, seen = head(test_set, 8), Notes()
    pixels, labels, ids = data.pixels(), data.labels, data.ids
    defense = Defense(Witness(classifier, seen), WitnessPurifier(seen)).freeze()
    calls: dict[str, Callable[[], Any]] = {
        "count_correct": lambda: count_correct(defense, pixels, labels, ids, 0, "score", 1, 8),
        "predict_and_detect": lambda: predict_and_detect(
            Defense(Witness(classifier, seen), None), pixels, 8
        ),
        "craft": lambda: craft(parse_attack("fgsm"), defense, "full", data, LINF, 0, 8),
        "probe": lambda: probe(
            defense, ["full"], data, LINF, 0, 8, 1, 8, None, None, thorough=False
        ),
        "detector_scores": lambda: detector_scores(
            defense, {"clean": pixels}, ids, pixels, ids, 0, 8, {}
        ),
        "panels": lambda: render(defense, data, {"pgd": pixels}, 0, 8),
        "speed": lambda: seconds_per_image(defense, pixels, ids),
    }
    with lowered():
        before = state()
        for name, call in calls.items():
            seen.clear()
            call()
            assert seen and all(one == FULL for one in seen), name
            assert state() == before, f"{name} did not restore what was on"


@pytest.mark.parametrize("purifier", [None, Noisy()], ids=repr)
def test_lowered_precision_outside_changes_no_result(
    purifier: Noisy | None, classifier: Classifier, test_set: ImageSet
) -> None:
    data, defense = head(test_set, 16), Defense(classifier, purifier).freeze()
    expected = results(defense, data)
    for lowered in (lowered_by_the_older_settings, lowered_by_the_newer_settings):
        with lowered():
            assert results(defense, data) == expected


@LOWERED
def test_what_was_on_is_restored_after_an_error(lowered: Lowered) -> None:
    with lowered():
        before = state()
        with pytest.raises(ZeroDivisionError), full_precision():
            raise ZeroDivisionError
        assert state() == before
        with full_precision(), full_precision():
            assert state() == FULL
        assert state() == before


@LOWERED
def test_tf32_is_switched_on_for_products_on_cuda_alone(lowered: Lowered) -> None:
    cuda_products = [name for name in PRODUCTS if name.startswith("cud")]
    with lowered():
        before = state()
        with float32_products(tf32=True):
            products = {name: one.fp32_precision for name, one in PRODUCTS.items()}
            assert products == {**FULL_PRODUCTS, **dict.fromkeys(cuda_products, "tf32")}
            with full_precision():
                assert state() == FULL
            assert {name: one.fp32_precision for name, one in PRODUCTS.items()} == products
        assert state() == before


def test_torch_can_read_its_older_settings_while_tf32_is_on() -> None:
    with float32_products(tf32=True):
        assert torch.get_float32_matmul_precision() == "high"
        assert cudnn.allow_tf32 and cuda.matmul.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("precision", "device", "capability", "refusal"),
    [
        ("tf32", "cpu", None, "precision tf32 needs a GPU, and this training runs on the cpu: set"),
        ("tf32", "cuda", (7, 5), "compute capability 8.0 or more, and this one has 7.5: set"),
        ("bfloat16", "cuda", (7, 0), "precision bfloat16 needs a GPU of compute capability 8.0"),
        ("bfloat16", "cuda", (8, 0), None), ("tf32", "cuda", (9, 0), None),
        ("bfloat16", "cpu", None, None), ("float32", "cuda", (5, 0), None),
        ("float32", "cpu", None, None),
    ],
)  # fmt: skip
def test_a_precision_that_a_device_lacks_is_refused(
    precision: Any, device: str, capability: tuple[int, int] | None, refusal: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if refusal is None:
        return require_device(precision, torch.device(device))
    with pytest.raises(ValueError, match=refusal):
        require_device(precision, torch.device(device))


def test_settings_that_follow_a_general_one_follow_it_afterwards() -> None:
    for one in PRODUCTS.values():
        one.fp32_precision = "none"
    torch.backends.fp32_precision = "tf32"
    with full_precision():
        assert state() == FULL
    torch.backends.fp32_precision = "ieee"
    assert state() == {**FULL, "deterministic": False}, (
        "a setting was left at the value that it only followed"
    )


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_torch_can_read_its_older_settings_inside_and_afterwards(precision: str) -> None:
    """It does when it compiles, and refuses to where they contradict the newer ones."""
    torch.set_float32_matmul_precision(precision)
    with full_precision():
        assert torch.get_float32_matmul_precision() == "highest"
        assert not cudnn.allow_tf32 and not cuda.matmul.allow_tf32
    assert torch.get_float32_matmul_precision() == precision
    assert cudnn.allow_tf32 and cuda.matmul.allow_tf32 == (precision != "highest")


def test_what_a_network_switches_on_itself_is_its_own() -> None:
    with full_precision():
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.is_autocast_enabled("cpu")
        assert not torch.is_autocast_enabled("cpu")
