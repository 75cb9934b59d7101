"""If any image is allowed, an attack succeeds, unless the defense does not heed its input."""

import pytest
import torch
from torch import Tensor, nn
from toy_networks import Rounded
from toys import LINF, failed, head

from components.data.draws import NoiseStream
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.defense import Defense
from components.models.purifiers import Purifier
from components.probes import attacks
from components.probes.bench import Bench


def bench_of(classifier: nn.Module, purifier: Purifier | None, data: ImageSet) -> Bench:
    some = head(data, 64)
    defense = Defense(classifier, purifier).freeze()
    return Bench(defense, some.pixels(), some.labels, some.ids, LINF, 0)


def test_an_unbounded_attack_fails_on_the_gradient_of_rounding(
    classifier: Classifier, test_set: ImageSet
) -> None:
    bench = bench_of(classifier, Rounded(7, differentiable=True), test_set)
    findings = attacks.unbounded(bench, ("full",))
    assert failed(findings, "warn") == ["unbounded_by_gradient"]
    assert failed(findings) == [], "an image of another class is classified as that"
    assert failed(attacks.unbounded(bench, ("full", "bpda")), "warn") == [], "bpda succeeds"


def test_a_defense_that_resists_an_unbounded_attack_is_reported(
    classifier: Classifier, test_set: ImageSet
) -> None:
    """The purifier returns the test images in their order, whatever its input is."""

    class Oracle(Purifier):
        def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
            return test_set.pixels()[: len(x)] + 0 * x

    findings = attacks.unbounded(bench_of(classifier, Oracle(), test_set), ("full",))
    assert failed(findings) == ["unbounded"]
    assert failed(findings, "warn") == ["unbounded_by_gradient"]


@pytest.mark.parametrize(
    ("stochastic", "count", "blamed"), [(False, 5, True), (True, 5, False), (True, 12, True)]
)
def test_lucky_draws_may_resist_an_unbounded_attack_on_a_tenth_of_the_images(
    stochastic: bool, count: int, blamed: bool, classifier: Classifier, test_set: ImageSet
) -> None:
    """The purifier returns the first `count` test images, whatever it is given in their place."""

    class Lucky(Purifier):
        def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
            return torch.cat([test_set.pixels()[:count][: len(x)], x[count:]])

    purifier = Lucky()
    purifier.stochastic = stochastic
    bench = bench_of(classifier, purifier, test_set)
    assert failed(attacks.unbounded(bench, ("full",))) == (["unbounded"] if blamed else [])


def test_a_defense_that_answers_one_class_is_not_blamed(
    classifier: Classifier, test_set: ImageSet
) -> None:
    """Its accuracy is the share of that class, whatever an attack may do."""

    class OneClass(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = classifier(x)
            return logits + 1000 * (torch.arange(10) == 3)

    bench = bench_of(OneClass(), None, test_set)
    assert failed(attacks.unbounded(bench, ("full",))) == []
