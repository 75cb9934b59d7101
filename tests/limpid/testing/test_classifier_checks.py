"""Each check of a classifier fails on the fault it is for, and on no other."""

import random

import pytest
import torch
from planted import failures
from torch import Tensor, nn

from components.data.draws import NoiseStream, fresh
from components.models.classifiers import SmallCnn
from components.models.foreign import adopt_classifier
from limpid.testing import check_classifier, classifier_checks

SHAPE, CLASSES = (1, 8, 8), 5


class Honest(nn.Module):
    """A small network behind `before`, with `after` behind it."""

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.network = SmallCnn(kind="small_cnn", width=4).build(shape, classes)

    def before(self, x: Tensor) -> Tensor:
        return x

    def after(self, logits: Tensor) -> Tensor:
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.network(self.before(x)))


class ReturnsProbabilities(Honest):
    def after(self, logits: Tensor) -> Tensor:
        return logits.softmax(1)


class DividesByTheDeviation(Honest):
    def before(self, x: Tensor) -> Tensor:
        return x / x.std((1, 2, 3), keepdim=True)


class RemembersTheLastBatch(Honest):
    last = torch.zeros(0)

    def before(self, x: Tensor) -> Tensor:
        seen, self.last = torch.equal(x, self.last), x.detach().clone()
        return x / 2 if seen else x


class CentresTheBatch(Honest):
    def before(self, x: Tensor) -> Tensor:
        return x - 0.5 * x.mean(0)


class Rounds(Honest):
    def before(self, x: Tensor) -> Tensor:
        return torch.round(x * 15) / 15


class CountsCalls(Honest):
    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__(shape, classes)
        self.register_buffer("calls", torch.zeros(()))

    def before(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


class DrawsFromPython(Honest):
    def before(self, x: Tensor) -> Tensor:
        random.random()
        return x


class KeepsItsScaleOutOfTheState(Honest):
    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__(shape, classes)
        self.scale = 1 + float(torch.rand(()))

    def after(self, logits: Tensor) -> Tensor:
        return logits * self.scale


class _OutOfOrder(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return self[1](self[0](x).relu())


class NormalisesAfterItsReLU(Honest):
    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__(shape, classes)
        self.stem = _OutOfOrder(
            nn.Conv2d(shape[0], shape[0], 3, padding=1), nn.BatchNorm2d(shape[0])
        )
        self.stem[1].running_mean.fill_(0.5)

    def before(self, x: Tensor) -> Tensor:
        return self.stem(x) + x


class Shaken(Honest):
    """Random, and keeps the contract: keyed noise on the pixels, fresh without a stream."""

    stochastic = True

    def forward(self, x: Tensor, stream: NoiseStream | None = None) -> Tensor:
        stream = fresh(len(x), x.device) if stream is None else stream
        return super().forward(x + 0.1 * stream.normal(tuple(x.shape[1:]), "noise").to(x.dtype))


class SaysThatItIsRandom(Honest):
    stochastic = True

    def forward(self, x: Tensor, stream: NoiseStream | None = None) -> Tensor:
        return super().forward(x)


class DrawsTheSameWithoutAStream(Shaken):
    def forward(self, x: Tensor, stream: NoiseStream | None = None) -> Tensor:
        return super().forward(x, stream or NoiseStream(torch.arange(len(x))))


class DrawsFromTheGlobalStream(Honest):
    def before(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x)


class SharesTheNoiseOfTheFirst(Shaken):
    def forward(self, x: Tensor, stream: NoiseStream | None = None) -> Tensor:
        first = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return super().forward(x, None if stream is None else stream[first])


FAULTS: dict[type[Honest], str] = {
    ReturnsProbabilities: "returns_logits",
    DividesByTheDeviation: "extreme_images_give_finite_logits",
    RemembersTheLastBatch: "equal_images_give_equal_logits",
    SaysThatItIsRandom: "other_noise_gives_other_logits",
    CentresTheBatch: "an_image_does_not_depend_on_its_batch",
    Rounds: "every_image_has_a_gradient",
    CountsCalls: "answering_changes_no_state",
    DrawsFromPython: "leaves_global_random_streams_alone",
    KeepsItsScaleOutOfTheState: "a_copy_answers_as_the_original",
    NormalisesAfterItsReLU: "the_folded_copy_answers_as_the_original",
}


def test_every_check_has_a_fault() -> None:
    assert list(FAULTS.values()) == [check.name for check in classifier_checks()]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_fails_its_check_by_name_and_no_other(fault: type[Honest]) -> None:
    failed = failures(classifier_checks(shape=SHAPE, classes=CLASSES), fault)
    assert list(failed) == [FAULTS[fault]] and all(failed.values())


@pytest.mark.parametrize(
    ("fault", "names"),
    [
        (DrawsTheSameWithoutAStream, {"other_noise_gives_other_logits"}),
        (SharesTheNoiseOfTheFirst, {"an_image_does_not_depend_on_its_batch"}),
        (DrawsFromTheGlobalStream,
         {"equal_images_give_equal_logits", "an_image_does_not_depend_on_its_batch",
          "leaves_global_random_streams_alone", "a_copy_answers_as_the_original",
          "the_folded_copy_answers_as_the_original"}),
    ],
)  # fmt: skip
def test_noise_that_is_not_keyed_fails_by_name(fault: type[Honest], names: set[str]) -> None:
    assert set(failures(classifier_checks(shape=SHAPE, classes=CLASSES), fault)) == names


def test_an_adopted_random_classifier_keeps_all_but_the_batch() -> None:
    def make(shape: tuple[int, int, int], classes: int) -> nn.Module:
        images = torch.rand(8, *shape, generator=torch.Generator().manual_seed(1))
        return adopt_classifier(DrawsFromTheGlobalStream(shape, classes), images, classes)

    check_classifier(
        make, shape=SHAPE, classes=CLASSES,
        expected_to_fail={"an_image_does_not_depend_on_its_batch": "one seed serves the batch"},
    )  # fmt: skip


@pytest.mark.parametrize("network", [Honest, Shaken])
@pytest.mark.parametrize("shape", [SHAPE, (3, 32, 32)])
def test_an_honest_classifier_passes(shape: tuple[int, int, int], network: type[Honest]) -> None:
    check_classifier(network, shape=shape, classes=CLASSES)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match="make returned int; it must return"):
        check_classifier(lambda shape, classes: classes)
