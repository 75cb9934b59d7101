"""Each check of a purifier fails on the fault it is for, and on no other."""

import random
from typing import Any

import pytest
import torch
from planted import failures
from torch import Tensor

from components.data.draws import NoiseStream
from components.models.purifiers import Purifier
from components.models.purifiers.controls import Median
from limpid.testing import check_purifier, purifier_checks
from limpid.testing.toys import NoisyBlur

SHAPE = (1, 8, 8)


class Honest(Purifier):
    """A slight blur, and a detector score that is the brightness of the image."""

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        return 0.8 * x + 0.2 * torch.nn.functional.avg_pool2d(x, 3, 1, 1)

    def compute_detector_score(
        self, x: Tensor, stream: NoiseStream | None, purified: Tensor | None
    ) -> Tensor:
        return x.flatten(1).mean(1)


class AlwaysFloat32(Honest):
    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        return super().purify(x, stream).float()


class DividesByTheDeviation(Honest):
    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        return (0.5 + 0.1 * (x - x.mean((1, 2, 3), True)) / x.std((1, 2, 3), keepdim=True)).clamp(
            0, 1
        )


class RemembersTheLastBatch(Honest):
    stochastic, last = True, torch.zeros(0)

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        seen = torch.equal(x, self.last)
        self.last = x.detach().clone()
        noise = stream.normal(tuple(x.shape[1:]), "noise").to(x.dtype)
        return (0.9 * super().purify(x, stream) + 0.01 * noise + 0.05 * seen).clamp(0, 1)


class SaysItIsDeterministic(Honest):
    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        noise = 0 if stream is None else stream.uniform(tuple(x.shape[1:]), "noise").to(x.dtype)
        return 0.9 * super().purify(x, stream) + 0.1 * noise


class SaysItIsStochastic(Honest):
    stochastic = True


class HasOneNoiseOfItsOwn(NoisyBlur):
    def _or_fresh(self, stream: NoiseStream | None, x: Tensor) -> NoiseStream:
        return stream or NoiseStream(torch.zeros(len(x), dtype=torch.int64))


class Rounds(Honest):
    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        return torch.round(x * 15) / 15


class SaysItRounds(Honest):
    differentiable = False


class CentresTheBatch(Honest):
    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        return (x - 0.1 * x.mean(0)).clamp(0, 1)


class TakesLabels(Honest):
    def purify(self, x: Tensor, stream: NoiseStream | None, labels: Any = None) -> Tensor:
        return super().purify(x, stream)


class CountsCalls(Honest):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        self.calls += 1
        return super().purify(x, stream)


class DrawsFromPython(Honest):
    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        random.random()
        return super().purify(x, stream)


class HasAFlatStandIn(Honest):
    stand_ins = ("soft",)

    def stand_in(self, kind: Any, x: Tensor, stream: NoiseStream | None) -> Tensor:
        return torch.round(x * 15) / 15


class ScoresTheBatch(Honest):
    def compute_detector_score(
        self, x: Tensor, stream: NoiseStream | None, purified: Tensor | None
    ) -> Tensor:
        return x.flatten(1).mean(1) - x.mean()


class KeepsItsShiftOutOfTheState(Honest):
    def __init__(self) -> None:
        super().__init__()
        self.shift = 0.1 * float(torch.rand(()))

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        return 0.9 * super().purify(x, stream) + self.shift


FAULTS: dict[type[Purifier], set[str]] = {
    AlwaysFloat32: {"keeps_shape_dtype_device_and_range"},
    DividesByTheDeviation: {"extreme_images_stay_finite_and_in_range"},
    RemembersTheLastBatch: {"equal_noise_gives_equal_images"},
    SaysItIsDeterministic: {"stochastic_is_as_declared"},
    SaysItIsStochastic: {"stochastic_is_as_declared", "noise_is_fresh_without_a_stream"},
    HasOneNoiseOfItsOwn: {"noise_is_fresh_without_a_stream"},
    Rounds: {"differentiable_is_as_declared"},
    SaysItRounds: {"differentiable_is_as_declared"},
    CentresTheBatch: {"an_image_does_not_depend_on_its_batch"},
    TakesLabels: {"takes_images_and_noise_only"},
    CountsCalls: {"purifying_changes_no_state"},
    DrawsFromPython: {"leaves_global_random_streams_alone"},
    HasAFlatStandIn: {"stand_ins_purify_and_have_a_gradient"},
    ScoresTheBatch: {"detector_score_is_of_each_image"},
    KeepsItsShiftOutOfTheState: {"a_copy_purifies_as_the_original"},
}


def test_every_check_has_a_fault() -> None:
    assert set().union(*FAULTS.values()) == {check.name for check in purifier_checks()}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_fails_its_check_by_name_and_no_other(fault: type[Purifier]) -> None:
    failed = failures(purifier_checks(shape=SHAPE), fault)
    assert set(failed) == FAULTS[fault] and all(failed.values())
    check_purifier(fault, shape=SHAPE, expected_to_fail=dict.fromkeys(failed, "a planted fault"))


@pytest.mark.parametrize("honest", [Honest, NoisyBlur, lambda: Median(kind="median", size=3)])
@pytest.mark.parametrize("shape", [SHAPE, (3, 32, 32)])
def test_honest_purifiers_pass(honest: Any, shape: tuple[int, int, int]) -> None:
    check_purifier(honest, shape=shape)


def test_what_is_no_purifier_is_refused() -> None:
    with pytest.raises(TypeError, match="make returned Identity; it must return a Purifier"):
        check_purifier(torch.nn.Identity)
