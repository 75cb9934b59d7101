"""What changes without a gradient that shows it is found, whatever gradient the logits have."""

import pytest
import torch
from torch import Tensor, nn
from toy_networks import Function, Noisy, Rounded
from toys import LINF, head

from components.data.draws import NoiseStream
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.defense import Defense
from components.models.purifiers import Purifier
from components.probes.bench import Bench
from components.probes.paths import gradient_adds_up
from components.selftest.hidden import Plateaus, Votes


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


def test_the_gradients_of_a_smooth_defense_add_up(
    classifier: Classifier, test_set: ImageSet
) -> None:
    for purifier in (None, Noisy(0.1)):
        found = gradient_adds_up(bench_of(Defense(classifier, purifier), test_set))
        assert found.passed and found.figures["judged"] > 30 and found.figures["apart"] == 0


@pytest.mark.parametrize("random", [False, True], ids=["deterministic", "random"])
def test_labels_on_plateaus_have_no_gradient_that_adds_up(
    random: bool, classifier: Classifier, test_set: ImageSet
) -> None:
    defense = Defense(Plateaus(classifier, classifier), Noisy(0.05) if random else None)
    found = gradient_adds_up(bench_of(defense, test_set))
    assert not found.passed and found.figures["apart"] > 0.9 * found.figures["judged"]
    low = gradient_adds_up(
        bench_of(Defense(Plateaus(classifier, classifier, 0.01), None), test_set)
    )
    assert low.passed, "a plateau that decides nothing"


def test_many_small_jumps_are_as_bad_as_one(classifier: Classifier, test_set: ImageSet) -> None:
    found = gradient_adds_up(bench_of(Defense(Votes(classifier, classifier), None), test_set))
    assert not found.passed, found.detail


def test_a_kink_that_a_few_points_miss_is_looked_at_again(test_set: ImageSet) -> None:
    """Margin and gradient in closed form: all of the fall is on a thirtieth of the way."""

    def steep(x: Tensor) -> Tensor:
        bright = x.flatten(1).mean(1)
        edge = (60 * (bright - 0.5)).clamp(-1, 1)
        return torch.stack([edge, -edge], 1)

    data = head(test_set, 20)
    levels = torch.where(torch.arange(20) % 2 == 0, 0, 255).to(torch.uint8)
    images = levels[:, None, None, None].expand_as(data.images).contiguous()
    two = ImageSet(images, (levels == 0).long(), data.ids, ("0", "1"))
    found = gradient_adds_up(bench_of(Defense(Function(steep), None), two, 20))
    assert found.passed and found.figures == {"apart": 0, "judged": 20}, found.detail


def test_too_few_right_images_say_nothing(classifier: Classifier, test_set: ImageSet) -> None:
    bench = bench_of(Defense(Plateaus(classifier, classifier), None), test_set, 5)
    found = gradient_adds_up(bench)
    assert found.passed and "too few" in found.detail


def test_behind_a_purifier_that_descends_the_classifier_is_judged(
    classifier: Classifier, test_set: ImageSet
) -> None:
    plateaus = Plateaus(classifier, classifier)
    for purifier in (Rounded(15), Repainted(classifier, test_set.pixels(), test_set.labels)):
        purifier.stand_ins = ("direct",)
        assert gradient_adds_up(bench_of(Defense(classifier, purifier), test_set)).passed
        assert not gradient_adds_up(bench_of(Defense(plateaus, purifier), test_set)).passed


def test_a_purifier_that_repaints_jumps_and_may_if_it_descends(
    classifier: Classifier, test_set: ImageSet
) -> None:
    purifier = Repainted(classifier, test_set.pixels(), test_set.labels)
    found = gradient_adds_up(bench_of(Defense(classifier, purifier), test_set))
    assert not found.passed, found.detail
    purifier.stand_ins = ("direct",)
    assert gradient_adds_up(bench_of(Defense(classifier, purifier), test_set)).passed
