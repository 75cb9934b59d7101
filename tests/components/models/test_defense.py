"""Targets: values and gradients of the modes, counted passes, EOT, and folded BatchNorm."""

import gc
from copy import deepcopy
from types import BuiltinFunctionType, FunctionType, ModuleType

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.nn import functional as F
from toy_networks import Detached, Noisy, Rounded

from components.data.draws import Draws, NoiseStream
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier, ClassifierConfig
from components.models.defense import Defense, Mode, bind, fold_batch_norm, margin
from components.models.purifiers import Purifier, PurifierConfig

AUTOENCODER = {
    "kind": "conv_autoencoder", "blocks": 4, "width": 6, "strided": [2], "residual": "none",
}  # fmt: skip
RT2 = {"kind": "rt2", "patch": 2, "missing": 0.25, "sigma": 0.1}
PURIFIERS = {
    "autoencoder": AUTOENCODER,
    "global": {**AUTOENCODER, "residual": "global", "blocks": 5, "strided": [1, 3]},
    "random": {"kind": "random_transform", "transform": RT2, "inner": AUTOENCODER},
}
CLASSIFIERS = {
    "small_cnn": {"kind": "small_cnn", "width": 4},
    "resnet": {"kind": "resnet", "depth": 14, "width": 4},
    "resnet18": {"kind": "resnet18", "width": 4},
    "resnet50": {"kind": "resnet50", "width": 2},
    "wide_resnet": {"kind": "wide_resnet", "depth": 10, "widen": 1},
}


def purifier_of(name: str) -> Purifier:
    config = TypeAdapter(PurifierConfig).validate_python(PURIFIERS[name])
    purifier = config.build((1, 8, 8))
    randomise(purifier)
    return purifier


def classifier_of(name: str) -> Classifier:
    config = TypeAdapter(ClassifierConfig).validate_python(CLASSIFIERS[name])
    classifier = config.build((1, 8, 8), 10)
    randomise(classifier)
    return classifier


def randomise(module: nn.Module) -> None:
    """Give every BatchNorm random statistics and weights."""
    generator = torch.Generator().manual_seed(5)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor, low, high in (
                (layer.running_mean, -0.5, 0.5),
                (layer.running_var, 0.5, 2.0),
                (layer.weight, 0.5, 1.5),
                (layer.bias, -0.5, 0.5),
            ):
                assert tensor is not None
                tensor.data.uniform_(low, high, generator=generator)


def batch(test_set: ImageSet, count: int = 32) -> tuple[Tensor, Tensor, Draws]:
    some = test_set[torch.arange(count)]
    return some.pixels(), some.labels, Draws(0, "attack", some.ids)


@pytest.mark.parametrize("name", [*PURIFIERS, "none"])
def test_bpda_and_full_give_equal_logits_to_the_bit(
    name: str, classifier: Classifier, test_set: ImageSet
) -> None:
    x, _, draws = batch(test_set)
    purifier = None if name == "none" else purifier_of(name)
    defense = Defense(classifier, purifier).freeze()
    for draw in (0, 3):
        full = bind(defense, "full", draws, 1)(x, draw)
        assert torch.equal(bind(defense, "bpda", draws, 1)(x, draw), full)
        assert torch.equal(defense(x, draws.redraw(draw)), full)


def test_bpda_gradient_is_that_of_the_classifier_at_the_purified_image(
    classifier: Classifier, test_set: ImageSet
) -> None:
    x, labels, draws = batch(test_set)
    for purifier in (purifier_of("autoencoder"), Rounded(3), Detached(), Noisy(0.2)):
        defense = Defense(classifier, purifier).freeze()
        seen = bind(defense, "bpda", draws, 1).evaluate(x, labels, margin, 2)
        purified = defense.purify(x, draws.redraw(2)).detach().requires_grad_()
        with torch.enable_grad():
            margins = margin(classifier(purified), labels)
        (expected,) = torch.autograd.grad(margins.sum(), purified)
        assert torch.equal(seen.gradient, expected) and expected.abs().max() > 0
        assert torch.equal(seen.margin, margins.detach())
        full = bind(defense, "full", draws, 1).evaluate(x, labels, margin, 2).gradient
        assert not torch.allclose(full, expected)


@pytest.mark.parametrize("purifier", ["autoencoder", "global", "random"])
def test_full_gradient_matches_central_differences(
    purifier: str, classifier: Classifier, test_set: ImageSet
) -> None:
    x, labels, draws = batch(test_set, 4)
    # Differences fail at the kinks of ReLU, so it is replaced by softplus. Pixels stay away from
    # the clips, and the noise is fixed.
    inner = purifier_of(purifier)
    defense = smooth(deepcopy(Defense(classifier, inner))).double().freeze()
    x = 0.8 + 0.1 * x.double() if purifier == "global" else 0.4 + 0.2 * x.double()

    def loss(point: Tensor) -> Tensor:
        return F.cross_entropy(defense(point, draws.redraw(1)), labels, reduction="none")

    def each(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none")

    target = bind(defense, "full", draws, 1)
    gradient = target.evaluate(x, labels, each, 1).gradient.flatten(1)
    assert gradient.dtype == torch.float64
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        if purifier == "random":  # stay off the clip of the transform: move what is well inside
            noisy = x + 0.1 * draws.redraw(1).normal((1, 8, 8), "noise")
            direction *= (noisy > 1e-3) & (noisy < 1 - 1e-3)
        h = 1e-5
        with torch.no_grad():
            difference = (loss(x + h * direction) - loss(x - h * direction)) / (2 * h)
        predicted = (gradient * direction.flatten(1)).sum(1)
        assert torch.allclose(predicted, difference, rtol=1e-4, atol=1e-8)
        assert difference.abs().min() > 1e-7, "nothing to compare"


def smooth(defense: Defense) -> Defense:
    for module in list(defense.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Softplus(beta=5))
    return defense


@pytest.mark.parametrize("mode", ["full", "bpda"])
@pytest.mark.parametrize("stochastic", [False, True])
def test_passes_are_counted_per_image(
    mode: Mode, stochastic: bool, classifier: Classifier, test_set: ImageSet
) -> None:
    x, labels, draws = batch(test_set, 6)
    purifier = Noisy(0.2) if stochastic else None
    target = bind(Defense(classifier, purifier).freeze(), mode, draws, 3)
    eot = 3 if stochastic else 1  # a deterministic defense needs one draw and takes one
    target.margins(x, labels, 0)
    assert target.passes.forward.tolist() == [eot] * 6 and not target.passes.backward.any()
    target.evaluate(x, labels, margin, 1)
    assert target.passes.forward.tolist() == [2 * eot] * 6
    assert target.passes.backward.tolist() == [eot] * 6
    rows = torch.tensor([4, 1])
    part = target[rows][torch.tensor([True, False])]
    part.evaluate(x[[4]], labels[[4]], margin, 2)
    assert target.passes.forward.tolist() == [2 * eot] * 4 + [3 * eot] + [2 * eot]
    assert target.passes.backward.tolist() == [eot] * 4 + [2 * eot] + [eot]
    assert not target.passes.spared.any()
    target[rows].spare(torch.tensor([7, 2]))
    assert target.passes.spared.tolist() == [0, 2, 0, 0, 7, 0]
    assert target.passes.forward.tolist() == [2 * eot] * 4 + [3 * eot] + [2 * eot]


def test_rows_of_a_target_keep_their_noise(classifier: Classifier, test_set: ImageSet) -> None:
    x, labels, draws = batch(test_set)
    target = bind(Defense(classifier, Noisy(0.2)).freeze(), "full", draws, 2)
    whole = target.evaluate(x, labels, margin, 5)
    rows = torch.tensor([9, 30, 2])
    some = target[rows].evaluate(x[rows], labels[rows], margin, 5)
    assert torch.allclose(some.gradient, whole.gradient[rows], atol=1e-5)
    assert torch.allclose(some.margin, whole.margin[rows], atol=1e-5)
    moved = target[rows].evaluate(x[rows], labels[rows], margin, 6)
    assert not torch.allclose(moved.margin, some.margin, atol=1e-3)


def test_eot_averages_over_draws_of_its_own_query(
    classifier: Classifier, test_set: ImageSet
) -> None:
    x, labels, draws = batch(test_set, 8)
    defense = Defense(classifier, Noisy(0.2)).freeze()
    three = bind(defense, "full", draws, 3)
    for query in (0, 1, 4):
        seen = three.evaluate(x, labels, margin, query)
        alone = [
            bind(defense, "full", draws, 1).evaluate(x, labels, margin, 3 * query + k)
            for k in range(3)
        ]
        assert torch.allclose(seen.gradient, sum(a.gradient for a in alone) / 3, atol=1e-6)
        assert torch.allclose(seen.margin, sum(a.margin for a in alone) / 3, atol=1e-5)
        assert torch.allclose(seen.loss, sum(a.loss for a in alone) / 3, atol=1e-5)
        assert torch.allclose(three.margins(x, labels, query), seen.margin, atol=1e-5)


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("purifier", PURIFIERS)
def test_folding_batch_norm_keeps_outputs_and_the_original(
    purifier: str, name: str, test_set: ImageSet
) -> None:
    x, _, draws = batch(test_set)
    defense = Defense(classifier_of(name), purifier_of(purifier)).freeze()
    before = deepcopy(defense.state_dict())
    folded = fold_batch_norm(defense)
    norms = [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    # Those of a Wide ResNet that no convolution comes before stay: one a block, and the last.
    assert len(norms) == (4 if name == "wide_resnet" else 0)
    assert len(norms) < sum(isinstance(m, nn.BatchNorm2d) for m in defense.modules())
    assert torch.allclose(folded.purify(x, draws), defense.purify(x, draws), atol=1e-5)
    scale = defense(x, draws).abs().max().clamp_min(1)
    assert ((folded(x, draws) - defense(x, draws)).abs() / scale).max() < 1e-5
    assert all(torch.equal(before[key], value) for key, value in defense.state_dict().items())
    assert not any(p.requires_grad for p in folded.parameters()) and not folded.training


def test_folded_defense_has_the_same_gradient(test_set: ImageSet) -> None:
    x, labels, draws = batch(test_set)
    defense = Defense(classifier_of("resnet"), purifier_of("autoencoder")).freeze()
    gradients = [
        bind(one, "full", draws, 1).evaluate(x, labels, margin, 0).gradient.flatten(1)
        for one in (defense, fold_batch_norm(defense))
    ]
    assert F.cosine_similarity(*gradients).min() > 1 - 1e-5


def test_margin_is_the_true_logit_minus_the_largest_other() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0], [1.0, 4.0, 2.0], [3.0, 3.0, -1.0]])
    assert margin(logits, torch.tensor([1, 2, 0])).tolist() == [2.0, -2.0, 0.0]


@pytest.mark.parametrize("row", [[torch.nan] * 3, [0.0, torch.nan, 1.0], [torch.nan, 0.0, 1.0]])
def test_nan_logits_give_nan_margins(row: list[float]) -> None:
    for label in range(3):
        assert margin(torch.tensor([row]), torch.tensor([label])).isnan().all()


@pytest.mark.parametrize("purifier", [Rounded(3), Detached()], ids=["rounded", "detached"])
def test_detached_purifier_gives_a_zero_gradient(
    purifier: Purifier, classifier: Classifier, test_set: ImageSet
) -> None:
    x, labels, draws = batch(test_set)
    target = bind(Defense(classifier, purifier).freeze(), "full", draws, 1)
    seen = target.evaluate(x, labels, margin, 0)
    assert seen.gradient.shape == x.shape and not seen.gradient.any()
    assert target.passes.backward.tolist() == [1] * len(x)


def test_queries_change_no_state(classifier: Classifier, test_set: ImageSet) -> None:
    x, labels, draws = batch(test_set)
    defense = Defense(deepcopy(classifier), purifier_of("random")).freeze()
    before, stream = deepcopy(defense.state_dict()), torch.get_rng_state()
    pixels = x.clone()
    seen = bind(defense, "full", draws, 2).evaluate(x, labels, margin, 0)
    assert all(torch.equal(before[key], value) for key, value in defense.state_dict().items())
    assert torch.equal(x, pixels) and not x.requires_grad
    assert not seen.loss.requires_grad and not seen.margin.requires_grad
    assert not any(p.grad is not None for p in defense.parameters())
    assert torch.equal(torch.get_rng_state(), stream)


def test_defense_has_the_flags_of_its_purifier(classifier: Classifier) -> None:
    facts = [
        (d.stochastic, d.differentiable)
        for d in (Defense(classifier, p) for p in (None, Rounded(3), Noisy(0.2), Detached()))
    ]
    assert facts == [(False, True), (False, False), (True, True), (False, True)]


class _Curious(Noisy):
    """Keeps all that its base is given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[object] = []

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        self.given.append(stream)
        return super().purify(x, stream)


# What all of Python is reached by.
SHARED = (type, ModuleType, FunctionType, BuiltinFunctionType)


def everything_in(thing: object) -> list[object]:
    """Return all objects that can be reached from `thing`, other than classes and modules."""
    seen: dict[int, object] = {}
    waiting = [thing]
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(
            one, type | ModuleType | FunctionType | BuiltinFunctionType
        ):
            continue
        seen[id(one)] = one
        waiting += gc.get_referents(one)
        if isinstance(one, Tensor) and one._base is not None:
            waiting.append(one._base)
    return list(seen.values())


def test_a_purifier_is_told_neither_role_nor_image_nor_draw() -> None:
    purifier = _Curious()
    defense = Defense(classifier_of("small_cnn"), purifier).freeze()
    ids = torch.tensor([7_654_321, 1_234_567])
    draws = Draws(424_242, "attack", ids, 313_131)
    target = bind(defense, "full", draws, 1)
    x = torch.rand(2, 1, 8, 8)
    target.evaluate(x, torch.tensor([1, 2]), margin, 313_131)
    defense(x, draws)
    defense.detector_score(x, draws)
    assert len(purifier.given) == 3
    for stream in purifier.given:
        for one in everything_in(stream):
            assert not isinstance(one, Draws)
            if isinstance(one, str):
                assert "attack" not in one and "424242" not in one
            if isinstance(one, int):
                assert one not in (424_242, 313_131, 7_654_321, 1_234_567)
            if isinstance(one, Tensor):
                assert not set(one.flatten().tolist()) & {7_654_321, 1_234_567}


def test_noise_of_two_defenses_differs_for_the_same_images() -> None:
    one, other = _Curious(), _Curious()
    draws = Draws(0, "score", torch.arange(4))
    torch.manual_seed(1)
    for purifier in (one, other):
        Defense(classifier_of("small_cnn"), purifier).freeze()(torch.rand(4, 1, 8, 8), draws)
    again = _Curious()
    noise = []
    for name, purifier in (("small_cnn", again), ("resnet", _Curious())):
        torch.manual_seed(2)
        Defense(classifier_of(name), purifier).freeze()(torch.rand(4, 1, 8, 8), draws)
        stream = purifier.given[0]
        assert isinstance(stream, NoiseStream)
        noise.append(stream.normal((3,), "noise"))
    assert not torch.equal(noise[0], noise[1])


def test_a_deterministic_purifier_gets_no_stream() -> None:
    purifier = _Curious()
    purifier.stochastic = False
    purifier.purify = lambda x, stream: purifier.given.append(stream) or x  # type: ignore[method-assign, func-returns-value]
    defense = Defense(classifier_of("small_cnn"), purifier).freeze()
    defense(torch.rand(2, 1, 8, 8), Draws(0, "score", torch.arange(2)))
    assert purifier.given == [None]
