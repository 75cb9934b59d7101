"""JPEG: it matches Pillow's files, and its gradient is the one it declares."""

import io
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from scipy.fft import dctn
from torch import Tensor

from components.attacks import Linf, craft
from components.attacks.gradient import Pgd
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.defense import Defense
from components.models.purifiers import Purifier
from components.models.purifiers.jpeg import (
    YCBCR,
    Jpeg,
    dct_matrix,
    quantisation_tables,
    round_coefficients,
    round_softly,
)

SHAPES = ((1, 8, 8), (3, 16, 24), (3, 12, 10), (1, 5, 5), (1, 28, 28))


def jpeg(quality: int, shape: tuple[int, int, int] = (1, 8, 8)) -> Purifier:
    return Jpeg(kind="jpeg", quality=quality).build(shape).eval()


def varied_images(shape: tuple[int, int, int], count: int = 24) -> Tensor:
    """Return images of 8-bit levels, smooth and rough ones, black, white and grey ones."""
    generator = torch.Generator().manual_seed(1)
    rough = torch.randint(0, 256, (count, *shape), generator=generator).float()
    smooth = rough.cumsum(3).cumsum(2)
    images = torch.cat([rough, (smooth / smooth.amax((1, 2, 3), keepdim=True) * 255).round()])
    flat = torch.tensor([0.0, 255.0, 127.0, 128.0, 129.0]).view(-1, 1, 1, 1).expand(-1, *shape)
    return torch.cat([images, flat]) / 255


def pillow(x: Tensor, quality: int, mode: Literal["RGB", "YCbCr"] = "RGB") -> Tensor:
    """Compress images (N,C,H,W) by Pillow, without chroma subsampling, and read them again."""
    read = []
    for image in (255 * x).round().byte().permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        colour = image.shape[2] == 3
        picture = Image.fromarray(image, mode) if colour else Image.fromarray(image.squeeze(2))
        picture.save(file, "JPEG", quality=quality, subsampling=0)
        opened = Image.open(file)
        if colour:
            opened.draft(mode, opened.size)
        array = np.array(opened)
        read.append(torch.from_numpy(array.reshape(image.shape)).permute(2, 0, 1))
    return torch.stack(read).float() / 255


def test_dct_matches_scipy() -> None:
    block = torch.randn(5, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = dct_matrix() @ block.double() @ dct_matrix().T
    theirs = dctn(block.numpy(), axes=(1, 2), norm="ortho")
    assert np.abs(ours.numpy() - theirs).max() < 1e-5
    assert torch.allclose(dct_matrix() @ dct_matrix().T, torch.eye(8).double())


@pytest.mark.parametrize("quality", [1, 10, 49, 50, 51, 75, 95, 100])
def test_quantisation_tables_match_those_in_a_file(quality: int) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", quality=quality)
    carried = Image.open(file).quantization  # type: ignore[attr-defined]
    ours = quantisation_tables(quality).int().flatten(1)
    assert ours[0].tolist() == list(carried[0])
    assert ours[1].tolist() == ours[2].tolist() == list(carried[1])


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] == 1])
@pytest.mark.parametrize("quality", [10, 50, 75, 95])
def test_grey_images_match_pillow(shape: tuple[int, int, int], quality: int) -> None:
    """Up to the rounding of pixels, and to ties that libjpeg's fixed-point DCT moves."""
    x = varied_images(shape)
    ours, theirs = jpeg(quality, shape)(x), pillow(x, quality)
    difference = 255 * (ours - theirs).abs()
    assert difference.median() < 0.51 and difference.mean() < 0.6
    assert (difference > 1.01).float().mean() < 0.12
    assert 255 * (theirs - x).abs().mean() > 2 * difference.mean(), "nothing was lost"


@pytest.mark.parametrize("quality", [10, 50, 75, 95])
def test_colour_images_match_pillow(quality: int) -> None:
    """The images have integer values of Y, Cb and Cr (N,3,H,W), as a file has."""
    shape = (3, 12, 24)
    levels = (98 + 60 * varied_images(shape)).round()
    matrix = torch.tensor(YCBCR)
    shift = torch.tensor([0.0, 128, 128]).view(3, 1, 1)
    x = torch.einsum("cp,nphw->nchw", matrix.inverse(), levels - shift) / 255
    inside = ((x > 0.1) & (x < 0.9)).flatten(1).all(1)
    x, levels = x[inside], levels[inside]
    assert len(x) > 10
    ours = torch.einsum("pc,nchw->nphw", matrix, 255 * jpeg(quality, shape)(x)) + shift
    theirs = pillow(levels / 255, quality, "YCbCr") * 255
    difference, loss = (ours - theirs).abs(), (theirs - levels).abs()
    for plane in range(3):
        assert difference[:, plane].median() < 0.51 and difference[:, plane].mean() < 0.6, plane
        assert (difference[:, plane] > 1.01).float().mean() < 0.12, plane
        assert loss[:, plane].mean() > 2 * difference[:, plane].mean(), "nothing was lost"
    grey = varied_images((1, 12, 24))
    threefold = jpeg(quality, shape)(grey.expand(-1, 3, -1, -1))
    assert torch.allclose(threefold, jpeg(quality)(grey).expand_as(threefold), atol=1e-5)


def test_single_blocks_match_values_computed_by_hand() -> None:
    """At quality 50 the constant coefficient is divided by 16.

    So levels change in steps of 2, with ties away from 0.
    """
    levels = torch.tensor([0, 1, 2, 3, 127, 128, 129, 130, 131, 255.0])
    expected = torch.tensor([0, 0, 2, 2, 126, 128, 130, 130, 132, 256.0]).clamp(0, 255)
    x = (levels / 255).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    assert torch.allclose(255 * jpeg(50)(x), expected.view(-1, 1, 1, 1).expand_as(x), atol=1e-4)
    # The highest horizontal frequency alone: coefficient (0, 7), which table K.1 divides by 61.
    wave = torch.outer(torch.ones(8), dct_matrix()[7].float())
    for amplitude, steps in ((30.0, 0), (31.0, 1), (91.0, 1), (92.0, 2), (-92.0, -2)):
        x = (128 + amplitude * wave / 8**0.5) / 255
        back = 255 * jpeg(50)(x[None, None]) - 128
        assert torch.allclose(back[0, 0], 61 * steps * wave / 8**0.5, atol=1e-3)


def test_lower_quality_loses_more() -> None:
    x = varied_images((3, 16, 16))
    lost = [(jpeg(quality, (3, 16, 16))(x) - x).abs().mean().item() for quality in (1, 10, 50, 90)]
    assert lost == sorted(lost, reverse=True)
    assert (jpeg(100)(varied_images((1, 8, 8))) - varied_images((1, 8, 8))).abs().max() < 3 / 255


@pytest.mark.parametrize("quality", [1, 50, 75, 100])
def test_images_and_ties_do_not_depend_on_batch_or_precision(quality: int) -> None:
    """Blocks of 8-bit levels have coefficients half way between two steps: ties."""
    for shape in SHAPES:
        purifier, x = jpeg(quality, shape), varied_images(shape, 40)
        whole = purifier(x)
        assert whole.min() >= 0 and whole.max() <= 1 and whole.isfinite().all()
        exact = jpeg(quality, shape).double()(x.double())
        assert torch.allclose(exact.float(), whole, rtol=0, atol=1e-5), "precision decides a tie"
        for rows in (torch.tensor([5]), torch.arange(7), torch.arange(84).flip(0)):
            assert torch.allclose(purifier(x[rows]), whole[rows], rtol=0, atol=1e-5)
    half = torch.tensor([0.5, 1.5, -0.5, -2.5, 0.4999, 0.4996, -0.2])
    assert round_coefficients(half).tolist() == [1, 2, -1, -3, 1, 0, 0]


def test_gradient_of_rounding_is_that_of_shin_and_song() -> None:
    """It is the slope of round(x) + (x - round(x))^3: 3 (x - round(x))^2."""
    x = torch.linspace(-3.3, 3.3, 41, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(round_softly(x).sum(), x)
    rest = x.detach() - x.detach().round()
    assert torch.allclose(gradient, 3 * rest**2)

    def soft(value: Tensor) -> Tensor:
        return value.round() + (value - value.round()) ** 3

    step = 1e-6
    difference = (soft(x + step) - soft(x - step)).detach() / (2 * step)
    assert torch.allclose(gradient, difference, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 12, 8), (3, 8, 12)])
def test_gradient_of_the_soft_stand_in_matches_differences(shape: tuple[int, int, int]) -> None:
    purifier = jpeg(80, shape).double()
    x = (0.4 + 0.2 * varied_images(shape, 3)[:3]).double()  # so that nothing is clipped
    probe = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double()
    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((probe * purifier.stand_in("soft", point, None)).sum(), point)
    for seed in range(4):
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).double()
        values = [
            (probe * purifier.stand_in("soft", x + step * direction, None)).sum()
            for step in (1e-7, -1e-7)
        ]
        predicted = (gradient * direction).sum()
        assert (values[0] - values[1]).item() / 2e-7 == pytest.approx(predicted.item(), rel=0.02)


def test_attacks_succeed_through_jpeg_by_soft_and_bpda_gradient(
    classifier: Classifier, test_set: ImageSet
) -> None:
    data, threat = test_set[torch.arange(100)], Linf(norm="linf", eps_255=40.0)
    defense = Defense(classifier, jpeg(40)).freeze()
    clean = (defense(data.pixels()).argmax(1) != data.labels).sum()
    pgd = Pgd(
        kind="pgd", steps=10, step=0.25, restarts=1, random_start=False, early_stop=True, eot=1
    )
    for mode in ("soft", "bpda"):
        crafted = craft(pgd, defense, mode, data, threat, 0, 100)  # type: ignore[arg-type]
        assert crafted.success.sum() > clean + 40, mode


def test_unfit_channels_and_qualities_are_refused() -> None:
    with pytest.raises(ValueError, match="jpeg takes images of 1 or 3 channels, not of 4"):
        jpeg(50, (4, 8, 8))
    for quality in (0, 101, 50.5):
        with pytest.raises(ValidationError):
            Jpeg.model_validate({"kind": "jpeg", "quality": quality})
