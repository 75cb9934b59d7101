"""MagNet: its two autoencoders, their calibrated errors and the detector score, by hand."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F
from toys import uniform_pixels

from components.models.purifiers.magnet import MagNet, MagNetPurifier

SMALL = (1, 8, 8)
IMAGES = 12


def magnet(shape: tuple[int, int, int] = SMALL, width: int = 3) -> MagNetPurifier:
    torch.manual_seed(0)
    return MagNet(kind="magnet", width=width).build(shape).eval().requires_grad_(False)


class ConstantAutoencoder(nn.Module):
    """An autoencoder that returns one grey level."""

    def __init__(self, level: float) -> None:
        super().__init__()
        self.level = level

    def forward(self, x: Tensor) -> Tensor:
        return torch.full_like(x, self.level)


def constant_magnet(first: float = 0.0, second: float = 0.5) -> MagNetPurifier:
    made = magnet()
    made.halving, made.keeping = ConstantAutoencoder(first), ConstantAutoencoder(second)  # type: ignore[assignment]
    return made


def flat(*levels: float) -> Tensor:
    return torch.tensor(levels)[:, None, None, None].expand(-1, *SMALL).clone()


def test_networks_of_the_paper_have_their_size() -> None:
    made = magnet((1, 28, 28))
    sizes = [sum(p.numel() for p in net.parameters()) for net in (made.halving, made.keeping)]
    assert sizes == [30 + 3 * 84 + 28, 30 + 84 + 28]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 16), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autoencoders_match_their_layers(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    made, x = magnet(shape, 4).to(dtype), uniform_pixels(IMAGES, shape).to(dtype)

    def layers(net: nn.Module) -> list[tuple[Tensor, Tensor]]:
        found = list(net.parameters())
        return list(zip(found[::2], found[1::2], strict=True))

    def apply(x: Tensor, layer: tuple[Tensor, Tensor]) -> Tensor:
        return torch.sigmoid(F.conv2d(x, *layer, padding=1))

    first, second = layers(made.halving), layers(made.keeping)
    assert len(first) == 5 and len(second) == 3
    feature = apply(x, first[0])
    rows = (feature[:, :, ::2] + feature[:, :, 1::2]) / 2
    feature = (rows[..., ::2] + rows[..., 1::2]) / 2
    feature = apply(apply(feature, first[1]), first[2])
    feature = feature.repeat_interleave(2, 2).repeat_interleave(2, 3)
    halved = apply(apply(feature, first[3]), first[4])
    kept = x
    for layer in second:
        kept = apply(kept, layer)
    found = made.autoencode(x)
    assert torch.allclose(found[0], halved, atol=1e-6)
    assert torch.allclose(found[1], kept, atol=1e-6)
    purified = made(x)
    assert torch.equal(purified, found[0]), "AE-I is the reformer"
    assert purified.shape == x.shape and purified.dtype == dtype
    assert purified.min() >= 0 and purified.max() <= 1


def test_errors_are_squared_for_ae1_and_absolute_for_ae2() -> None:
    found = constant_magnet().errors(flat(0.0, 0.3, 1.0))
    assert torch.allclose(found, torch.tensor([[0.0, 0.5], [0.09, 0.2], [1.0, 0.5]]))
    half = flat(0.0)
    half[..., :4] = 1.0
    assert torch.allclose(constant_magnet(0.0, 0.0).errors(half), torch.tensor([[0.5, 0.5]]))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_calibration_matches_values_computed_by_hand_for_any_batch(batch: int) -> None:
    """Errors of AE-I 0.01, 0.09, 0.25, 0.49 and of AE-II 0.4, 0.2, 0, 0.2."""
    made = constant_magnet()
    made.calibrate(flat(0.1, 0.3, 0.5, 0.7), batch)
    first, second = (0.01, 0.09, 0.25, 0.49), (0.4, 0.2, 0.0, 0.2)
    means = [sum(errors) / 4 for errors in (first, second)]
    assert torch.allclose(made.error_mean, torch.tensor(means))
    deviations = [
        (sum((error - mean) ** 2 for error in errors) / 4) ** 0.5
        for errors, mean in zip((first, second), means, strict=True)
    ]
    assert torch.allclose(made.error_std, torch.tensor(deviations))
    assert {"error_mean", "error_std"} <= set(made.state_dict())


def test_detector_score_is_the_larger_standardised_error() -> None:
    made = constant_magnet()
    made.error_mean.copy_(torch.tensor([0.1, 0.2]))
    made.error_std.copy_(torch.tensor([0.5, 0.1]))
    found = made.detector_score(flat(0.0, 0.3, 1.0))
    # AE-I: -0.2, -0.02, 1.8; AE-II: 3, 0, 3.
    assert torch.allclose(found, torch.tensor([3.0, 0.0, 3.0]), atol=1e-6)
    made.error_std.copy_(torch.tensor([0.1, 0.5]))
    assert torch.allclose(made.detector_score(flat(1.0)), torch.tensor([9.0]), atol=1e-5)


def test_equal_clean_images_give_finite_scores() -> None:
    made = magnet()
    made.calibrate(flat(0.5, 0.5, 0.5), 2)
    assert (made.error_std >= 1e-6).all()
    assert made.detector_score(uniform_pixels(IMAGES, SMALL)).isfinite().all()
    made.calibrate(flat(0.5), 2)
    assert made.detector_score(uniform_pixels(IMAGES, SMALL)).isfinite().all()


def test_calibration_keeps_no_graph_and_changes_no_weight() -> None:
    made = magnet().requires_grad_(True)
    before = [p.clone() for p in made.parameters()]
    made.calibrate(uniform_pixels(IMAGES, SMALL), 4)
    assert not made.error_mean.requires_grad and not made.error_std.requires_grad
    assert all(torch.equal(one, two) for one, two in zip(before, made.parameters(), strict=True))


@pytest.mark.parametrize("call", ["forward", "detector_score"])
def test_results_are_deterministic_and_independent_of_the_batch(call: str) -> None:
    made, x = magnet(), uniform_pixels(IMAGES, SMALL)
    made.calibrate(x, 4)
    function = getattr(made, call)
    whole = function(x)
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(3))
    assert torch.equal(function(x), whole) and not made.stochastic
    assert torch.equal(function(x[order]), whole[order])
    assert torch.allclose(function(x[:1]), whole[:1], atol=1e-4)


@pytest.mark.parametrize("call", ["forward", "detector_score"])
def test_gradient_matches_differences(call: str) -> None:
    made, x = magnet().double(), uniform_pixels(IMAGES, SMALL)[:2].double().requires_grad_()
    made.error_mean.copy_(torch.tensor([0.05, 0.2]))
    made.error_std.copy_(torch.tensor([0.03, 0.05]))
    assert torch.autograd.gradcheck(getattr(made, call), (x,))
    (gradient,) = torch.autograd.grad(getattr(made, call)(x).sum(), x)
    assert gradient.ne(0).all(), "a pixel has no effect"


def test_odd_sides_and_zero_width_are_refused() -> None:
    for shape in ((1, 9, 8), (1, 8, 9)):
        with pytest.raises(
            ValueError, match=r"magnet halves once, which . x . images do not allow"
        ):
            magnet(shape)
    with pytest.raises(ValidationError):
        magnet(width=0)
