"""Networks from elsewhere: what is found out about them, and the sentence for each that fails."""

import random
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy_networks import Blurred, Noisy, Shaken
from toys import uniform_pixels

from components.attacks.apgd import dlr, targeted_dlr
from components.attacks.gradient import log_odds
from components.data.draws import Draws, NoiseStream
from components.models.behaviour import noise
from components.models.classifiers import Classifier
from components.models.defense import Defense, bind, fold_batch_norm, margin
from components.models.foreign import (
    ForeignClassifier,
    ForeignError,
    ForeignPurifier,
    adopt_classifier,
    adopt_purifier,
)
from components.models.identity import identity
from components.models.preprocessing import preprocessed
from components.models.purifiers.contract import Purifier
from components.models.purifiers.jpeg import Jpeg
from limpid.testing.check import grey_levels

X = grey_levels(12, (3, 8, 8))
CLASSES = 4
OWN = torch.Generator()


def network() -> nn.Sequential:
    """Return a small network with BatchNorm and dropout, in train mode, the same at every call."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
        nn.Linear(6 * 64, CLASSES),
    )  # fmt: skip


class Wrapped(nn.Module):
    """A network whose answer a function changes; the function may draw noise."""

    def __init__(self, change: Callable[[Tensor], Any], inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner, self.change = inner or network(), change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.inner(x))


class StillTraining(nn.Module):
    """A network whose BatchNorm takes the statistics of the batch, whatever mode it is in."""

    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(3, momentum=momentum), nn.Linear(192, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm.train()(x).flatten(1))
        return logits


class Counting(nn.Module):
    """A network that counts its calls in a buffer, and answers the same."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        logits: Tensor = self.inner(x)
        return logits


class Remembering(nn.Module):
    """A network that answers another way every second time."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = network(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        logits: Tensor = self.inner(x) * (1 + self.calls % 2)
        return logits


class Weight(nn.Module):
    """Holds a tensor that is no leaf, so no copy can be made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.ones(3, requires_grad=True) * 2


class Pixels(nn.Module):
    """A purifier from a function of pixels."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class Scaled(Purifier):
    """A purifier of Limpid's form that leaves [0,1]."""

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        return 2 * x


class _NoWayBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 0.9 * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise RuntimeError("not written")


class Convolved(nn.Module):
    """A small network that purifies, with kinks, a skip and a squashing to [0,1]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(4 * (x - 0.5) + self.two(self.one(x).relu()))


def stream(draw: int = 0, count: int = len(X)) -> NoiseStream:
    return Draws(0, "score", torch.arange(count), draw).stream("salt")


def adopted(given: Any, images: Tensor = X, classes: int = CLASSES) -> ForeignClassifier:
    found = adopt_classifier(given, images, classes)
    assert isinstance(found, ForeignClassifier)
    return found


# Classifiers that come through


def test_logits_and_gradients_are_those_of_the_network_itself() -> None:
    itself = network().eval()
    classifier = adopted(itself)
    x = X.clone().requires_grad_()
    logits, expected = classifier(x), itself(x)
    assert torch.equal(logits, expected) and not classifier.stochastic
    gradients = [torch.autograd.grad(each.square().sum(), x)[0] for each in (logits, expected)]
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0


def test_the_callers_network_and_random_streams_stay_as_they_are() -> None:
    given = network()
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    purifying = Convolved()
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[union-attr, index]
    classifier, purifier = adopt_classifier(given, X, CLASSES), adopt_purifier(purifying, X)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # type: ignore[index]
    assert random.getstate() == states[2]
    assert all(part.training for part in given.modules())
    assert all(weight.requires_grad for weight in given.parameters())
    assert all(torch.equal(before[name], held) for name, held in given.state_dict().items())
    for copy in (classifier, purifier):
        assert not any(part.training for part in copy.modules())
        assert not any(weight.requires_grad for weight in copy.parameters())
    with torch.no_grad():
        given[0].weight.zero_()  # type: ignore[union-attr, operator]
    assert torch.equal(classifier(X), adopt_classifier(network(), X, CLASSES)(X))


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: SimpleNamespace(logits=logits, loss=None), lambda logits: (logits,),
        lambda logits: [logits], lambda logits: {"scores": logits},
    ],
    ids=["attribute", "tuple", "list", "mapping"],
)  # fmt: skip
def test_logits_are_found_in_what_a_network_returns(change: Callable[[Tensor], Any]) -> None:
    assert torch.equal(adopted(Wrapped(change))(X), network().eval()(X))


def test_a_wrapper_for_several_gpus_is_taken_off() -> None:
    classifier = adopted(nn.DataParallel(network()))
    assert type(classifier.network) is nn.Sequential
    assert torch.equal(classifier(X), network().eval()(X))


@pytest.mark.slow
def test_a_compiled_network_is_taken_as_it_was_before() -> None:
    compiled = torch.compile(network())
    classifier = adopted(nn.DataParallel(compiled))  # type: ignore[arg-type]
    assert type(classifier.network) is nn.Sequential
    assert torch.equal(classifier(X), network().eval()(X))


def test_more_columns_than_classes_and_a_single_image_are_all_right() -> None:
    assert adopted(network(), X[:1], CLASSES - 1)(X).shape == (len(X), CLASSES)


def test_a_classifier_without_weights_has_a_device_and_runs_in_float64() -> None:
    classifier = adopted(Pixels(lambda x: 5 * x.mean((2, 3))), classes=3)
    assert next(classifier.parameters()).device == X.device
    exact = deepcopy(classifier).double()
    assert next(exact.parameters()).dtype == torch.float64
    assert exact(X.double()).dtype == torch.float64


def test_log_probabilities_are_as_good_as_logits_for_every_loss() -> None:
    plain, shifted = adopted(network()), adopted(Wrapped(lambda z: z.log_softmax(1)))
    labels = torch.arange(len(X)) % CLASSES
    others = (labels + 1) % CLASSES
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "cross-entropy": lambda z, y: F.cross_entropy(z, y, reduction="none"),
        "margin": margin, "log odds": log_odds, "dlr": dlr,
        "targeted dlr": lambda z, y: targeted_dlr(z, y, others),
    }  # fmt: skip
    for name, loss in losses.items():
        seen = []
        for classifier in (plain, shifted):
            target = bind(Defense(classifier, None), "full", Draws(0, "attack", labels), 1)
            seen.append(target.evaluate(X, labels, loss, 0))
        assert torch.allclose(seen[0].loss, seen[1].loss, rtol=1e-4, atol=1e-5), name
        assert torch.allclose(seen[0].gradient, seen[1].gradient, rtol=1e-3, atol=1e-5), name


def test_a_classifier_of_our_own_keeps_its_identity(classifier: Classifier) -> None:
    images = uniform_pixels(4, (1, 8, 8))
    copy = adopt_classifier(classifier, images, 10)
    assert type(copy) is type(classifier) and copy is not classifier
    assert identity(copy) == identity(classifier)


def test_an_adopted_classifier_stands_in_a_defense_folded_or_not() -> None:
    defense = Defense(adopted(network()), adopt_purifier(Convolved(), X)).freeze()
    logits = defense(X)
    assert torch.allclose(fold_batch_norm(defense)(X), logits, atol=1e-5) and defense.digest
    assert not defense.stochastic and defense.differentiable


def test_a_report_can_say_that_a_classifier_resizes() -> None:
    small = preprocessed(network(), [0.5] * 3, [0.5] * 3, 8)
    assert adopted(small).resized is None and adopted(network()).resized is None
    images = uniform_pixels(4, (3, 11, 13))
    assert adopted(nn.Sequential(small), images).resized == ((11, 13), (8, 8))
    with pytest.raises(ForeignError, match=r"images have 1 channels, and .* mean has 3"):
        adopt_classifier(small, X[:, :1], CLASSES)


# Random classifiers


def dropping() -> nn.Module:
    return Wrapped(lambda z: F.dropout(z, 0.5, training=True))


def test_dropout_that_stays_on_is_found_and_keyed() -> None:
    classifier = adopted(dropping())
    assert classifier.stochastic
    state = torch.get_rng_state()
    first, again, other = (classifier(X, stream(draw)) for draw in (0, 0, 1))
    fresh = [classifier(X), classifier(X)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(*fresh)
    torch.manual_seed(77)
    assert torch.equal(classifier(X, stream()), first)


def test_a_classifier_of_keyed_noise_is_copied_as_it_is() -> None:
    mine = Shaken(network(), pixels=0.2)
    state = torch.get_rng_state()
    copy = adopt_classifier(mine, X, CLASSES)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(copy) is Shaken and copy is not mine and identity(copy) == identity(mine.eval())
    assert not any(weight.requires_grad for weight in copy.parameters())
    assert not Defense(copy, None).batchwise and Defense(adopted(dropping()), None).batchwise
    again = adopt_classifier(adopted(dropping()), X, CLASSES)
    assert type(again) is ForeignClassifier and Defense(again, None).batchwise
    weightless = Shaken(Pixels(lambda x: x.flatten(1)[:, :CLASSES]))
    weightless = adopt_classifier(weightless, X, CLASSES)
    assert next(weightless.parameters()).device == X.device


def test_a_random_classifier_that_takes_no_stream_ends_in_one_sentence() -> None:
    class Silent(Wrapped):
        stochastic = True

    sentence = "called with a stream since it says that it is stochastic, fails on pixels of shape"
    with pytest.raises(ForeignError, match=sentence) as caught:
        adopted(Silent(lambda z: z))
    assert "\n" not in str(caught.value)


def test_the_key_of_every_image_decides_the_noise() -> None:
    classifier = adopted(dropping())
    keys = torch.arange(len(X))
    first = classifier(X, NoiseStream(keys))
    for row in (0, len(X) - 1):
        changed = keys.clone()
        changed[row] += 100
        assert not torch.equal(classifier(X, NoiseStream(changed)), first)


def test_a_network_is_as_random_as_it_is_not_as_its_layers_look() -> None:
    """A dropout layer in eval mode draws nothing; noise below rounding makes no random network."""
    assert not adopted(network()).stochastic
    assert not adopted(Wrapped(lambda z: z + 1e-7 * torch.randn_like(z))).stochastic
    assert adopted(Wrapped(lambda z: z + 1e-2 * torch.randn_like(z))).stochastic


# Purifiers


FLAGS = {
    "identity": (lambda x: x, False, True),
    "scaled": (lambda x: 0.9 * x, False, True),
    "network": (Convolved(), False, True),
    "clipped": (lambda x: (1.5 * x - 0.25).clamp(0, 1), False, True),
    "median": (
        lambda x: F.pad(x, (1,) * 4, mode="replicate").unfold(2, 3, 1).unfold(3, 3, 1)
        .flatten(4).median(4).values, False, True,
    ),
    "float32 inside": (lambda x: (0.9 * x.float()).sin().to(x.dtype), False, True),
    "cast to half precision": (lambda x: x.bfloat16().to(x.dtype), False, False),
    "noisy": (lambda x: (x + 0.1 * torch.randn_like(x)).clamp(0, 1), True, True),
    "noisy and rounded": (lambda x: (15 * (x + torch.rand_like(x)) / 2).round() / 15, True, False),
    "rounded": (lambda x: (15 * x).round() / 15, False, False),
    "rounded to 8 bits": (lambda x: (255 * x).round() / 255, False, False),
    "straight through": (lambda x: x + ((15 * x).round() / 15 - x).detach(), False, False),
    "straight through 8 bits": (lambda x: x + ((255 * x).round() / 255 - x).detach(), False, False),
    "detached": (lambda x: 0.9 * x.detach(), False, False),
    "half detached": (
        lambda x: 0.5 * x + 0.5 * F.avg_pool2d(x, 3, 1, 1).sqrt().detach(), False, False,
    ),
    "half of the pixels detached": (
        lambda x: torch.cat([x[..., ::2].detach(), x[..., 1::2]], 3), False, False,
    ),
    "no way back": (lambda x: _NoWayBack.apply(x), False, False),
    "jpeg": (Jpeg(kind="jpeg", quality=50).build((3, 8, 8)).purify, False, False),
}  # fmt: skip


@pytest.mark.parametrize("name", FLAGS)
def test_randomness_and_gradient_of_a_purifier_are_found_out(name: str) -> None:
    given, stochastic, differentiable = FLAGS[name]
    if name == "jpeg":
        given = lambda x, purify=given: purify(x, None)  # noqa: E731
    module = given if isinstance(given, nn.Module) else Pixels(given)
    for images in (X, uniform_pixels(6, (3, 8, 8)), grey_levels(3, (3, 40, 40))):
        purifier = adopt_purifier(module, images)
        assert isinstance(purifier, ForeignPurifier)
        assert (purifier.stochastic, purifier.differentiable) == (stochastic, differentiable)


def test_the_fallback_in_float32_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    class Strict(nn.Module):
        def __init__(self, inner: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            if x.dtype != torch.float32:
                raise TypeError("float32 alone")
            return self.inner(x)

    for name in ("scaled", "network", "clipped", "noisy", "rounded to 8 bits", "half detached",
                 "straight through 8 bits"):  # fmt: skip
        given, stochastic, differentiable = FLAGS[name]
        purifier = adopt_purifier(Strict(given), X)  # type: ignore[arg-type]
        assert (purifier.stochastic, purifier.differentiable) == (stochastic, differentiable), name


@pytest.mark.parametrize(("rounded", "differentiable"), [(6, False), (2, True)])
def test_most_images_decide_on_the_gradient(rounded: int, differentiable: bool) -> None:
    images = 0.4 * uniform_pixels(8, (3, 8, 8))
    images[:rounded] += 0.6
    bright = Pixels(lambda x: torch.where(x.mean((1, 2, 3), True) > 0.5, (9 * x).round() / 9, x))
    assert adopt_purifier(bright, images).differentiable == differentiable


def test_a_deterministic_purifier_gives_what_the_network_gives() -> None:
    itself = Convolved().eval()
    purifier = adopt_purifier(itself, X)
    assert torch.equal(purifier(X), itself(X))
    x = X.clone().requires_grad_()
    gradients = [torch.autograd.grad(part(x).square().sum(), x)[0] for part in (purifier, itself)]
    assert torch.equal(*gradients)


def test_noise_of_a_purifier_is_keyed_and_leaves_the_global_stream_alone() -> None:
    purifier = adopt_purifier(Pixels(FLAGS["noisy"][0]), X)  # type: ignore[arg-type]
    state = torch.get_rng_state()
    first, again, other = (purifier(X, stream(draw)) for draw in (0, 0, 1))
    fresh = [purifier(X), purifier(X), purifier.purify(X, None)]
    assert float(purifier.detector_score(X).min()) > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(fresh[0], fresh[1]) and not torch.equal(fresh[1], fresh[2])
    defense = Defense(adopted(network()), purifier).freeze()
    assert defense.stochastic
    draws = Draws(0, "score", torch.arange(len(X)))
    assert torch.equal(defense(X, draws), defense(X, draws))
    assert not torch.equal(defense(X, draws), defense(X, draws.redraw(1)))


def test_a_purifier_of_our_own_is_copied_as_it_is() -> None:
    given = Noisy(0.2)
    state = torch.get_rng_state()
    purifier = adopt_purifier(given, X)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(purifier) is Noisy and purifier is not given and not purifier.training
    assert given.training and identity(purifier) == identity(given)
    declared = Blurred()
    declared.differentiable = False  # for the checks to judge
    assert not adopt_purifier(declared, X).differentiable


# One sentence each


def raising(message: str) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        raise AssertionError(message)

    return forward


WRONG_CLASSIFIERS: dict[str, tuple[Any, str]] = {
    "a path": (Path("net.pt"), r"is a PosixPath; .* load_state_dict, with read_weights"),
    "a text": ("net.pt", "is a str; .* read_weights"),
    "a state dict": (network().state_dict(), "is a OrderedDict; .* load_state_dict"),
    "a function": (lambda x: x, "is a function; .* forward calls it"),
    "a class": (nn.Flatten, "is the class Flatten; .* call the class to build one"),
    "no copy": (Weight(), r"cannot be copied \(Only Tensors .*\); build it anew"),
    "lazy": (nn.Sequential(nn.Flatten(), nn.LazyLinear(4)), r"frozen on cpu \(.*LazyModule"),
    "script": (torch.jit.trace(network().eval(), X[:2]), "is TorchScript, .* give the torch.nn"),
    "another size": (nn.Sequential(nn.Flatten(), nn.Linear(5, 4)), r"fails .* \(8, 3, 8, 8\) \("),
    "its own error": (Pixels(raising("224 only\nmore")), r"fails .* \(224 only\); .*preprocessed"),
    "single images": (Wrapped(lambda z: z.squeeze(0)), r"shape \(4,\) for 1 images; .*\(N,K\)"),
    "a map": (nn.Conv2d(3, 4, 3), r"shape \(8, 4, 6, 6\) for 8 images; .* \(N,K\)"),
    "two outputs": (Wrapped(lambda z: (z, z)), "returns a tuple of 2; .* forward picks it"),
    "None": (Wrapped(lambda z: None), "returns a NoneType; .* logits"),
    "half precision": (Wrapped(lambda z: z.half()), "torch.float16 .*must be float32"),
    "labels": (Wrapped(lambda z: z.argmax(1)), r"shape \(8,\)"),
    "few columns": (nn.Sequential(network(), nn.Linear(4, 3)), "the labels need 4 classes"),
    "nan": (Wrapped(lambda z: z.log()), r"inf or nan for \d of 8 images"),
    "probabilities": (Wrapped(lambda z: z.softmax(1)), "probabilities: .* return the logits"),
    "the batch": (StillTraining(), "beside other images; .* BatchNorm run in train mode"),
    "the mean of the batch": (Wrapped(lambda z: z - z.mean(0)), "beside other images"),
    "the size of the batch": (Wrapped(lambda z: z * len(z)), "beside other images"),
    "the batch, under noise": (
        Wrapped(lambda z: z + z.mean(0) + 0.01 * torch.randn_like(z)), "beside other images",
    ),
    "numpy": (Wrapped(lambda z: z + float(np.random.rand())), "under the same seed; .* no numpy"),
    "counter": (Counting(), "changes its own calls while it answers; .* eval mode"),
    "history": (Remembering(), "under the same seed; .* nothing from call to call"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_CLASSIFIERS)
def test_a_classifier_that_cannot_be_judged_ends_in_one_sentence(name: str) -> None:
    given, sentence = WRONG_CLASSIFIERS[name]
    with pytest.raises(ForeignError, match=sentence) as caught:
        adopt_classifier(given, X, CLASSES)
    assert str(caught.value).startswith("the classifier ") and "\n" not in str(caught.value)


WRONG_PURIFIERS: dict[str, tuple[Any, str]] = {
    "a path": ("purifier.pt", "is a str; .* read_weights"),
    "another shape": (nn.AvgPool2d(2), r"\(8, 3, 4, 4\) .* same shape"),
    "a pair": (Pixels(lambda x: (x, x)), "returns a tuple of 2; .* forward picks it"),
    "double": (Pixels(lambda x: x.double()), "torch.float64 .* must return float32"),
    "nan": (Pixels(lambda x: x / x.mean((1, 2, 3), keepdim=True).floor()), "inf or nan"),
    "above 1": (Pixels(lambda x: x + 0.25), r"leaves \[0,1\] by 0.25: .* \[0.25, 1.25\]"),
    "below 0": (Pixels(lambda x: 2 * x - 1), r"leaves \[0,1\] by 1: .* \[-1, 1\]"),
    "its own error": (Pixels(raising("no\nmore")), r"fails .* \(no\)"),
    "gradients off": (
        Pixels(lambda x: torch.autograd.grad(x.clone().requires_grad_().square().sum(), x)[0]),
        r"fails .*require grad.*, under torch.no_grad\(\) too",
    ),
    "the batch": (Pixels(lambda x: x * x.mean()), "beside other images"),
    "a generator": (
        Pixels(lambda x: x / 2 + torch.rand(x.shape, generator=OWN) / 2),
        "no generator of its own",
    ),
    "our own, above 1": (Scaled(), r"leaves \[0,1\] by 1:"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_PURIFIERS)
def test_a_purifier_that_cannot_be_judged_ends_in_one_sentence(name: str) -> None:
    given, sentence = WRONG_PURIFIERS[name]
    with pytest.raises(ForeignError, match=sentence) as caught:
        adopt_purifier(given, X)
    assert str(caught.value).startswith("the purifier ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        ((255 * X).byte(), r"torch.uint8 of shape \(12, 3, 8, 8\); they must be a float32"),
        (X[0], r"shape \(3, 8, 8\); .*\(N,C,H,W\)"),
        (X.numpy(), "are a ndarray; they must be a float32 tensor"),
        (2 * X - 1, r"pixels lie in \[-1, 1\]; .* in \[0,1\]"),
        (X[:0], "pixels are not there; give at least one image"),
    ],
)
def test_images_that_are_no_pixels_end_in_one_sentence(images: Any, sentence: str) -> None:
    for adopt in (lambda: adopt_classifier(network(), images, CLASSES),
                  lambda: adopt_purifier(Convolved(), images)):  # fmt: skip
        with pytest.raises(ForeignError, match=sentence):
            adopt()


def test_a_device_that_is_not_there_ends_in_one_sentence() -> None:
    with pytest.raises(ForeignError, match=r"cannot be frozen on cuda:99 .*; name another device"):
        adopt_classifier(network(), X, CLASSES, "cuda:99")


class Drawing(nn.Module):
    """Adds everything that a network may draw."""

    def forward(self, x: Tensor) -> Tensor:
        drawn = torch.randn_like(x) + torch.rand(x.shape, dtype=x.dtype)
        drawn = drawn + torch.empty_like(x).uniform_() + torch.randn(x.shape, dtype=x.dtype)
        return nn.functional.dropout(x + torch.bernoulli(0.5 * torch.ones_like(x)) + drawn, 0.5)


def test_noise_in_float64_is_that_of_float32() -> None:
    """A float64 copy is compared with the network under the same noise."""
    x = torch.rand(4, 1, 8, 8)
    stream = Draws(0, "score", torch.arange(4)).stream("salt")
    with noise(stream, x):
        single = Drawing()(x)
    exact = x.double().requires_grad_()
    with noise(stream, exact):
        double = Drawing()(exact)
    assert double.dtype == torch.float64 and double.requires_grad
    assert torch.allclose(double.float(), single, atol=1e-5)
