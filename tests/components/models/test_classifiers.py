"""Classifiers take pixels in [0,1], normalise them and return logits."""

import subprocess
import sys
from typing import Any, get_args

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F
from toys import strided_pointwise, uniform_pixels

from components.data.image_set import ImageSet
from components.models.classifiers import Classifier, ClassifierConfig, KeyedDropout
from limpid.testing import check_classifier

SAMPLES: dict[str, dict[str, Any]] = {
    "small_cnn": {"kind": "small_cnn", "width": 4},
    "resnet": {"kind": "resnet", "depth": 14, "width": 4},
    "resnet18": {"kind": "resnet18", "width": 4},
    "resnet34": {"kind": "resnet34", "width": 2},
    "resnet50": {"kind": "resnet50", "width": 2},
    "wide_resnet": {"kind": "wide_resnet", "depth": 10, "widen": 1},
    "defense_gan_a": {"kind": "defense_gan_a"},
    "defense_gan_b": {"kind": "defense_gan_b"},
}
SMALLEST = {"defense_gan_a": 9, "defense_gan_b": 26}
EVERY = pytest.mark.parametrize("kind", SAMPLES)
# Sides and widths of a ResNet, and a step of training with the gradient that an attack takes.
NARROW = [(46, 8), (48, 8), (64, 8), (96, 8), (96, 3), (96, 12)]
STEPS = f"""
import torch
from torch.nn import functional as F
from components.data.draws import Draws
from components.models.classifiers import ResNet
from components.models.defense import Defense, bind, channels_last, fold_batch_norm, margin

torch.set_num_threads(1)
labels = torch.arange(16) % 2
for side, width in {NARROW}:
    x = torch.rand(16, 3, side, side)
    for images in (x, x.contiguous(memory_format=torch.channels_last)):
        network = ResNet(kind="resnet", depth=8, width=width).build((3, side, side), 2)
        channels_last(network)
        F.cross_entropy(network(images), labels).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
        defense = fold_batch_norm(Defense(network, None).freeze())
        target = bind(defense, "full", Draws(0, "attack", torch.arange(16)), 1)
        slope = target.evaluate(images, labels, margin, 0).gradient
        assert slope.isfinite().all() and slope.any()
    print(side, width, flush=True)
"""
SHAPES = [(1, 8, 8), (3, 32, 32), (1, 28, 28), (2, 9, 15)]


def build_classifier(
    config: dict[str, Any], shape: tuple[int, int, int], classes: int
) -> Classifier:
    torch.manual_seed(0)
    built: Classifier = TypeAdapter(ClassifierConfig).validate_python(config).build(shape, classes)
    return built.eval()


def small(kind: str, channels: int = 1) -> tuple[int, int, int]:
    """Return a small shape: 8 x 8, or the smallest that the kind takes."""
    return (channels, SMALLEST.get(kind, 8), SMALLEST.get(kind, 8))


def test_samples_cover_every_kind() -> None:
    members = get_args(get_args(ClassifierConfig)[0])
    kinds = {kind for m in members for kind in get_args(m.model_fields["kind"].annotation)}
    assert kinds == set(SAMPLES)
    assert all(SAMPLES[kind]["kind"] == kind for kind in SAMPLES)


@EVERY
@pytest.mark.parametrize("shape", SHAPES)
def test_every_kind_keeps_the_contract(kind: str, shape: tuple[int, int, int]) -> None:
    if min(shape[1:]) < SMALLEST.get(kind, 1):
        with pytest.raises(ValueError, match="at least"):
            build_classifier(SAMPLES[kind], shape, 7)
        return
    section = TypeAdapter(ClassifierConfig).validate_python(SAMPLES[kind])
    check_classifier(section.build, shape=shape, classes=7)


@EVERY
def test_every_pixel_has_a_gradient(kind: str) -> None:
    x = uniform_pixels(16, small(kind)).requires_grad_()
    logits = build_classifier(SAMPLES[kind], small(kind), 10)(x)
    (gradient,) = torch.autograd.grad((logits * torch.arange(10)).sum(), x)
    assert gradient.isfinite().all() and gradient.ne(0).any(0).all()


@EVERY
def test_classifier_normalises_its_input(kind: str) -> None:
    """The inner network gets images of mean 0 and deviation 1, whatever their brightness.

    So scaling the pixels and setting the normalisation again leaves the logits as they were.
    """
    model, x = (
        build_classifier(SAMPLES[kind], small(kind, 3), 10),
        uniform_pixels(16, small(kind, 3)),
    )
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
    assert {"mean", "std"} <= set(model.state_dict()), "it is saved with the weights"


@EVERY
def test_no_classifier_has_a_strided_convolution_of_one_pixel(kind: str) -> None:
    assert strided_pointwise(build_classifier(SAMPLES[kind], (3, 48, 48), 10)) == []


def test_a_narrow_resnet_takes_large_images() -> None:
    """In a process of its own, which a signal may end."""
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{side} {width}" for side, width in NARROW], done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize("side", [8, 9, 15, 28])
def test_the_shortcut_equals_a_strided_convolution(side: int) -> None:
    model = build_classifier({"kind": "resnet", "depth": 8, "width": 4}, (1, 28, 28), 10).double()
    block = next(m for m in model.modules() if getattr(m, "stride", None) == 2)
    x = torch.randn(3, 4, side, side, dtype=torch.float64)
    convolution, norm = block.shortcut
    direct = norm(F.conv2d(x, convolution.weight, None, 2))
    assert torch.allclose(block(x), F.relu(block.body(x) + direct), rtol=0, atol=1e-12)


@EVERY
def test_raw_pixels_reach_the_network_as_they_are(kind: str) -> None:
    model = build_classifier({**SAMPLES[kind], "raw_pixels": True}, small(kind, 3), 10)
    x = uniform_pixels(16, small(kind, 3)) * 0.5
    model.normalise_by(x)
    seen: list[Tensor] = []
    model.network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(x)
    assert torch.equal(seen[0], x)


def test_constant_channel_gives_finite_logits() -> None:
    model, x = build_classifier(SAMPLES["small_cnn"], (1, 8, 8), 10), torch.full((4, 1, 8, 8), 0.5)
    model.normalise_by(x)
    assert model(uniform_pixels(16, (1, 8, 8))).isfinite().all()


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        ({"kind": "resnet", "depth": 20, "width": 16}, (0.265, 0.275)),
        ({"kind": "resnet", "depth": 56, "width": 16}, (0.85, 0.86)),
    ],
)
def test_resnets_have_their_published_sizes(
    config: dict[str, Any], millions: tuple[float, float]
) -> None:
    """0.27 M and 0.85 M; the shortcuts of `resnet` add some parameters."""
    model = build_classifier(config, (3, 32, 32), 10)
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions[0] <= count <= millions[1]


def block_size(inputs: int, outputs: int) -> int:
    """Return the parameters of a block of two 3 x 3 convolutions with BatchNorm after each."""
    changed = outputs * inputs + 2 * outputs if inputs != outputs else 0
    return 9 * outputs * (inputs + outputs) + 4 * outputs + changed


def bottleneck_size(inputs: int, width: int) -> int:
    """Return the parameters of a bottleneck: 1 x 1, 3 x 3, 1 x 1, BatchNorm after each."""
    outputs = 4 * width
    changed = outputs * inputs + 2 * outputs if inputs != outputs else 0
    return width * (inputs + 9 * width + outputs) + 4 * width + 2 * outputs + changed


def pre_block_size(inputs: int, outputs: int) -> int:
    """Return the parameters of a Wide ResNet's block, BatchNorm before each convolution."""
    changed = outputs * inputs if inputs != outputs else 0
    return 9 * outputs * (inputs + outputs) + 2 * (inputs + outputs) + changed


def stages_size(size: Any, first: int, widths: list[int], blocks: list[int], factor: int) -> int:
    """Return the parameters of all stages."""
    total, inputs = 0, first
    for width, count in zip(widths, blocks, strict=True):
        for _ in range(count):
            total += size(inputs, width)
            inputs = factor * width
    return total


FOUR, STEM = [64, 128, 256, 512], 3 * 64 * 9 + 2 * 64


@pytest.mark.parametrize(
    ("config", "expected", "published"),
    [
        ({"kind": "resnet18", "width": 64},
         STEM + stages_size(block_size, 64, FOUR, [2, 2, 2, 2], 1) + 5130, 11_173_962),
        ({"kind": "resnet34", "width": 64},
         STEM + stages_size(block_size, 64, FOUR, [3, 4, 6, 3], 1) + 5130, 21_282_122),
        ({"kind": "resnet50", "width": 64},
         STEM + stages_size(bottleneck_size, 64, FOUR, [3, 4, 6, 3], 4) + 20490, 23_520_842),
        ({"kind": "wide_resnet", "depth": 28, "widen": 10},
         432 + stages_size(pre_block_size, 16, [160, 320, 640], [4, 4, 4], 1) + 1280 + 6410,
         36_479_194),
    ],
)  # fmt: skip
def test_wide_networks_have_the_sizes_that_a_count_by_hand_gives(
    config: dict[str, Any], expected: int, published: int
) -> None:
    """On CIFAR-10; the paper prints 36.5 M for WRN-28-10."""
    model = TypeAdapter(ClassifierConfig).validate_python(config).build((3, 32, 32), 10)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected == published


def test_the_stages_of_a_wide_resnet_halve_the_resolution_and_keep_the_block_of_its_paper() -> None:
    """x + conv(relu(norm(conv(relu(norm(x)))))); where the shape changes, x is the first ReLU's."""
    config = {"kind": "wide_resnet", "depth": 10, "widen": 2}
    model = build_classifier(config, (3, 32, 32), 10).double()
    blocks = [part for part in model.network if hasattr(part, "body")]
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    inside = model.network[0](x)
    for block, (channels, side) in zip(blocks, [(32, 32), (64, 16), (128, 8)], strict=True):
        active = F.relu(block.norm(inside))
        norm, convolutions = block.body[1], (block.body[0], block.body[3])
        direct = F.conv2d(active, convolutions[0].weight, None, block.stride, 1)
        direct = F.conv2d(F.relu(norm(direct)), convolutions[1].weight, None, 1, 1)
        direct = direct + F.conv2d(active, block.shortcut.weight, None, block.stride)
        assert torch.allclose(block(inside), direct, rtol=0, atol=1e-10)
        inside = direct
        assert inside.shape == (2, channels, side, side)


def test_equal_shapes_are_added_as_they_are() -> None:
    config = {"kind": "wide_resnet", "depth": 16, "widen": 1}
    model = build_classifier(config, (3, 16, 16), 10)
    first = next(part for part in model.network if hasattr(part, "body"))
    assert first.shortcut is None
    nn.init.zeros_(first.body[3].weight)
    x = torch.randn(2, 16, 16, 16)
    assert torch.equal(first(x), x)


@pytest.mark.parametrize("depth", [4, 9, 27, 30])
def test_a_wide_resnet_of_another_depth_is_refused(depth: int) -> None:
    with pytest.raises(ValidationError, match=rf"depth {depth} is not 6n\+4"):
        build_classifier({"kind": "wide_resnet", "depth": depth, "widen": 1}, (3, 32, 32), 10)


@pytest.mark.parametrize(("kind", "millions"), [("defense_gan_a", 0.925), ("defense_gan_b", 0.710)])
def test_classifiers_of_defense_gan_have_their_sizes(kind: str, millions: float) -> None:
    model = build_classifier(SAMPLES[kind], (1, 28, 28), 10)
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.001)


@pytest.mark.parametrize("kind", SMALLEST)
def test_images_too_small_for_the_convolutions_are_refused(kind: str) -> None:
    side = SMALLEST[kind]
    message = f"{kind} takes images of at least {side} x {side}, not {side - 1} x {side}"
    with pytest.raises(ValueError, match=message):
        build_classifier(SAMPLES[kind], (1, side - 1, side), 10)
    with pytest.raises(ValueError, match="at least"):
        build_classifier(SAMPLES[kind], (1, side, side - 1), 10)


@pytest.mark.parametrize(
    ("kind", "rates"), [("defense_gan_a", [0.25, 0.5]), ("defense_gan_b", [0.2, 0.5])]
)
def test_dropout_acts_at_its_rate_and_in_training_only(kind: str, rates: list[float]) -> None:
    model, x = build_classifier(SAMPLES[kind], (1, 28, 28), 10), uniform_pixels(64, (1, 28, 28))
    seen: list[tuple[Tensor, Tensor]] = []
    for module in model.network.children():
        if isinstance(module, KeyedDropout):
            module.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    model(x)
    assert len(seen) == 2 and all(torch.equal(before, after) for before, after in seen)
    seen.clear()
    model.train()(x)
    for (before, after), rate in zip(seen, rates, strict=True):
        alive = before != 0
        kept = (after != 0)[alive].double()
        assert kept.mean() == pytest.approx(1 - rate, abs=5 * 0.5 / kept.numel() ** 0.5)
        scaled = before[after != 0] / (1 - rate)
        assert torch.allclose(after[after != 0], scaled), "the mean has changed"
        assert len({tuple(row.tolist()) for row in (after != 0).flatten(1)}) == len(x)


@pytest.mark.parametrize("kind", SMALLEST)
def test_dropout_resumes_from_the_state_and_leaves_the_global_stream(kind: str) -> None:
    model, x = (
        build_classifier(SAMPLES[kind], (1, 28, 28), 10).train(),
        uniform_pixels(16, (1, 28, 28)),
    )
    stream = torch.get_rng_state()
    first = model(x)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    second = model(x)
    assert not torch.equal(first, second), "the same mask twice"
    assert torch.equal(torch.get_rng_state(), stream)
    other = build_classifier(SAMPLES[kind], (1, 28, 28), 10).train()
    other.load_state_dict(state)
    assert torch.equal(other(x), second)


@pytest.mark.parametrize(("depth", "convolutions"), [(8, 7 + 2), (20, 19 + 2), (56, 55 + 2)])
def test_depth_counts_the_trained_layers(depth: int, convolutions: int) -> None:
    model = build_classifier({"kind": "resnet", "depth": depth, "width": 2}, (1, 8, 8), 10)
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == convolutions
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == 1


@pytest.mark.parametrize("depth", [2, 7, 9, 11, 18, 55, -4, 0])
def test_depths_other_than_6n_plus_2_are_refused(depth: int) -> None:
    with pytest.raises(ValidationError, match=f"depth {depth} is not 6n\\+2"):
        TypeAdapter(ClassifierConfig).validate_python(
            {"kind": "resnet", "depth": depth, "width": 4}
        )


@pytest.mark.parametrize("change", [{"width": 0}, {"width": 4.0}, {"wdith": 4}, {"kind": "vgg"}])
def test_invalid_sections_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(ClassifierConfig).validate_python({**SAMPLES["small_cnn"], **change})


def test_trained_classifier_is_accurate(classifier: Classifier, test_set: ImageSet) -> None:
    right = classifier(test_set.pixels()).argmax(1) == test_set.labels
    assert right.float().mean() > 0.93
