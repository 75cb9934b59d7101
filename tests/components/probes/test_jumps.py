"""A label that jumps is found, whatever the gradient of the logits is."""

import pytest
import torch
from torch import Tensor, nn
from toy_networks import Noisy, Rounded
from toys import LINF, head

from components.data.draws import NoiseStream
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.defense import Defense
from components.models.purifiers import Purifier
from components.probes.bench import Bench
from components.probes.jumps import boundary_jump


class Plateaus(nn.Module):
    """The label of a network without its gradient, beside its logits."""

    def __init__(self, classifier: nn.Module, height: float) -> None:
        super().__init__()
        self.classifier, self.height = classifier, height

    def forward(self, x: Tensor) -> Tensor:
        label = self.classifier(x.detach()).argmax(1)
        logits: Tensor = self.classifier(x)
        return logits + self.height * nn.functional.one_hot(label, 10)


class Repainted(Purifier):
    """Repaints an image as one of the class that a network sees in it."""

    def __init__(self, classifier: nn.Module, images: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.seen = classifier
        first = [images[labels == label][0] for label in range(10)]
        self.register_buffer("of_class", torch.stack(first))

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        chosen = self.seen(x.detach()).argmax(1)
        return 0.1 * x + 0.9 * self.of_class[chosen].to(x.dtype)


def bench_of(defense: Defense, data: ImageSet, count: int = 48) -> Bench:
    some = head(data, count)
    return Bench(defense.freeze(), some.pixels(), some.labels, some.ids, LINF, 0, None, 50)


def test_a_smooth_defense_does_not_jump(classifier: Classifier, test_set: ImageSet) -> None:
    for purifier in (None, Noisy(0.1)):
        found = boundary_jump(bench_of(Defense(classifier, purifier), test_set))
        assert found.passed and found.figures["judged"] > 30 and found.figures["jumps"] <= 1


@pytest.mark.parametrize("random", [False, True], ids=["deterministic", "random"])
def test_labels_on_plateaus_jump(random: bool, classifier: Classifier, test_set: ImageSet) -> None:
    defense = Defense(Plateaus(classifier, 100.0), Noisy(0.05) if random else None)
    found = boundary_jump(bench_of(defense, test_set))
    assert not found.passed and found.figures["jumps"] > 0.9 * found.figures["judged"]
    low = boundary_jump(bench_of(Defense(Plateaus(classifier, 0.01), None), test_set))
    assert low.passed, "a plateau that decides nothing"


def test_too_few_right_images_say_nothing(classifier: Classifier, test_set: ImageSet) -> None:
    bench = bench_of(Defense(Plateaus(classifier, 100.0), None), test_set, 5)
    found = boundary_jump(bench)
    assert found.passed and "too few" in found.detail


def test_behind_a_purifier_that_descends_the_classifier_is_judged(
    classifier: Classifier, test_set: ImageSet
) -> None:
    plateaus = Plateaus(classifier, 100.0)
    for purifier in (Rounded(15), Repainted(classifier, test_set.pixels(), test_set.labels)):
        purifier.stand_ins = ("direct",)
        assert boundary_jump(bench_of(Defense(classifier, purifier), test_set)).passed
        assert not boundary_jump(bench_of(Defense(plateaus, purifier), test_set)).passed


def test_a_purifier_that_repaints_jumps_and_may_if_it_descends(
    classifier: Classifier, test_set: ImageSet
) -> None:
    purifier = Repainted(classifier, test_set.pixels(), test_set.labels)
    found = boundary_jump(bench_of(Defense(classifier, purifier), test_set))
    assert not found.passed, found.detail
    purifier.stand_ins = ("direct",)
    assert boundary_jump(bench_of(Defense(classifier, purifier), test_set)).passed
