"""Every classifier takes pixels in [0,1], normalises them itself and returns logits."""

from typing import Any, get_args

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from components.classifiers import Classifier, ClassifierConfig
from components.data import ImageSet

SAMPLES: dict[str, dict[str, Any]] = {
    "small_cnn": {"kind": "small_cnn", "width": 4},
    "resnet": {"kind": "resnet", "depth": 14, "width": 4},
    "resnet18": {"kind": "resnet18", "width": 4},
}
EVERY = pytest.mark.parametrize("kind", SAMPLES)
SHAPES = [(1, 8, 8), (3, 32, 32), (1, 28, 28), (2, 9, 15)]


def make(config: dict[str, Any], shape: tuple[int, int, int], classes: int) -> Classifier:
    torch.manual_seed(0)
    built: Classifier = TypeAdapter(ClassifierConfig).validate_python(config).build(shape, classes)
    return built.eval()


def images(shape: tuple[int, int, int], count: int = 16) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(1))


def test_the_table_has_every_kind() -> None:
    members = get_args(get_args(ClassifierConfig)[0])
    kinds = {kind for m in members for kind in get_args(m.model_fields["kind"].annotation)}
    assert kinds == set(SAMPLES)
    assert all(SAMPLES[kind]["kind"] == kind for kind in SAMPLES)


@EVERY
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pixels_in_are_logits_out(
    kind: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    logits = make(SAMPLES[kind], shape, 7).to(dtype)(images(shape).to(dtype))
    assert logits.shape == (16, 7) and logits.dtype == dtype and logits.isfinite().all()
    assert not torch.allclose(logits.sum(1), torch.ones(16, dtype=dtype)), "softmaxed"
    assert logits.std(0).max() > 0, "the same for every image"


@EVERY
def test_an_image_is_classified_on_its_own(kind: str) -> None:
    model, x = make(SAMPLES[kind], (1, 8, 8), 10), images((1, 8, 8))
    whole = model(x)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(2))
    assert torch.equal(model(x[order]), whole[order])
    assert torch.allclose(model(x[:1]), whole[:1], atol=1e-5)


@EVERY
def test_every_pixel_is_looked_at(kind: str) -> None:
    x = images((1, 8, 8)).requires_grad_()
    logits = make(SAMPLES[kind], (1, 8, 8), 10)(x)
    (gradient,) = torch.autograd.grad((logits * torch.arange(10)).sum(), x)
    assert gradient.isfinite().all() and gradient.ne(0).any(0).all()


@EVERY
def test_normalisation_lies_inside(kind: str) -> None:
    """Scaling the pixels and renormalising leaves the logits as they were: the network itself
    sees images of mean 0 and deviation 1, whatever their brightness.
    """
    model, x = make(SAMPLES[kind], (3, 8, 8), 10), images((3, 8, 8))
    x = x * torch.tensor([0.3, 0.6, 0.9])[:, None, None]
    model.normalise_by(x)
    assert torch.allclose(model.mean, x.mean((0, 2, 3)))
    assert torch.allclose(model.std, x.std((0, 2, 3)))
    seen: list[Tensor] = []
    hook = model.network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    before = model(x)
    assert seen[0].mean((0, 2, 3)).abs().max() < 1e-5
    assert (seen[0].std((0, 2, 3)) - 1).abs().max() < 1e-4
    model.normalise_by(0.25 + x / 2)
    assert torch.allclose(model(0.25 + x / 2), before, atol=1e-3)
    hook.remove()
    assert {"mean", "std"} <= set(model.state_dict()), "the normalisation is part of the weights"


def test_a_channel_of_one_grey_does_not_divide_by_zero() -> None:
    model, x = make(SAMPLES["small_cnn"], (1, 8, 8), 10), torch.full((4, 1, 8, 8), 0.5)
    model.normalise_by(x)
    assert model(images((1, 8, 8))).isfinite().all()


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        ({"kind": "resnet", "depth": 20, "width": 16}, (0.265, 0.275)),
        ({"kind": "resnet", "depth": 56, "width": 16}, (0.85, 0.86)),
        ({"kind": "resnet18", "width": 64}, (11.165, 11.180)),
    ],
)
def test_the_networks_have_the_published_sizes(
    config: dict[str, Any], millions: tuple[float, float]
) -> None:
    """0.27 M, 0.85 M and 11.17 M; `resnet` has 1 x 1 convolutions where the original pads."""
    model = make(config, (3, 32, 32), 10)
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions[0] <= count <= millions[1]


@pytest.mark.parametrize(("depth", "convolutions"), [(8, 7 + 2), (20, 19 + 2), (56, 55 + 2)])
def test_depth_counts_the_layers_that_learn(depth: int, convolutions: int) -> None:
    model = make({"kind": "resnet", "depth": depth, "width": 2}, (1, 8, 8), 10)
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == convolutions
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == 1


@pytest.mark.parametrize("depth", [2, 7, 9, 11, 18, 55, -4, 0])
def test_a_depth_that_is_no_resnet_is_refused_with_a_sentence(depth: int) -> None:
    with pytest.raises(ValidationError, match=f"depth {depth} is not 6n\\+2"):
        TypeAdapter(ClassifierConfig).validate_python(
            {"kind": "resnet", "depth": depth, "width": 4}
        )


@pytest.mark.parametrize("change", [{"width": 0}, {"width": 4.0}, {"wdith": 4}, {"kind": "vgg"}])
def test_impossible_sections_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(ClassifierConfig).validate_python({**SAMPLES["small_cnn"], **change})


def test_training_teaches_it_something(classifier: Classifier, test_set: ImageSet) -> None:
    right = classifier(test_set.pixels()).argmax(1) == test_set.labels
    assert right.float().mean() > 0.93
