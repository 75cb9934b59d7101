"""AToP's random transforms: what each hides and adds, and what the inner purifier sees of it."""

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from toys import keyed

from components.models.purifiers import PurifierConfig
from components.models.purifiers.transforms import RandomTransform, Rt1, Rt2, Rt3, Transform

AUTOENCODER = {
    "kind": "conv_autoencoder", "blocks": 4, "width": 6, "strided": [2], "residual": "none",
}  # fmt: skip
RT1 = {"kind": "rt1", "patch": 2, "missing": 0.25}
RT2 = {**RT1, "kind": "rt2", "sigma": 0.1}
IMAGES = 24


def shown(transform: Transform, x: Tensor, draw: int = 0) -> Tensor:
    """Return what the inner purifier sees behind a transform of one mask."""
    views, masks = transform.apply(x, keyed(len(x)).redraw(draw))
    assert masks.shape == (len(x), 1, 1, *x.shape[2:])
    return views[:, 0]


def purifier(shape: tuple[int, int, int], inner: nn.Module, **changes: Any) -> Any:
    """Return a random transform whose inner purifier is replaced by `inner`."""
    section = {"kind": "random_transform", "transform": RT1, "inner": AUTOENCODER, **changes}
    built = TypeAdapter(PurifierConfig).validate_python(section).build(shape)
    built.inner = inner
    return built


@pytest.mark.parametrize(
    ("patch", "missing", "patches"), [(4, 0.25, 16), (2, 0.25, 64), (2, 0.5, 128), (1, 0.15, 154)]
)
def test_rt1_removes_the_requested_number_of_whole_patches(
    patch: int, missing: float, patches: int
) -> None:
    """On 32 x 32 images. AToP removes 16 of 64 patches of side 4."""
    white = torch.ones(IMAGES, 3, 32, 32)
    kept = shown(Rt1(kind="rt1", patch=patch, missing=missing), white)
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    removed = (kept == 0).flatten(1).sum(1)
    assert removed.tolist() == [patches * patch * patch * 3] * IMAGES
    blocks = kept.unfold(2, patch, patch).unfold(3, patch, patch).flatten(4)
    assert torch.equal(blocks.amin(4), blocks.amax(4)), "a patch is removed in part"
    assert torch.equal(kept[:, :1].expand_as(kept), kept), "channels differ"


def test_rt1_removes_patches_uniformly_and_separately_per_image() -> None:
    many = 4000
    white = torch.ones(many, 1, 8, 8)
    kept = shown(Rt1(kind="rt1", patch=2, missing=0.25), white)
    assert len({tuple(mask.flatten().tolist()) for mask in kept[:20]}) == 20
    removed = (kept == 0).float().mean(0)
    assert (removed - 0.25).abs().max() < 5 * (0.25 * 0.75 / many) ** 0.5
    assert not torch.equal(shown(Rt1(kind="rt1", patch=2, missing=0.25), white, draw=1), kept)


def test_rt2_adds_clipped_noise_and_then_removes_patches() -> None:
    grey = torch.full((IMAGES, 1, 32, 32), 0.5)
    rt2 = Rt2(kind="rt2", patch=2, missing=0.25, sigma=0.1)
    transformed = shown(rt2, grey)
    mask = shown(Rt1(kind="rt1", patch=2, missing=0.25), torch.ones_like(grey))
    assert torch.equal(transformed == 0, mask == 0), "a removed patch is not zero"
    noise = transformed[mask == 1] - 0.5
    n = noise.numel()
    assert abs(noise.mean()) < 5 * 0.1 / n**0.5
    assert abs(noise.std() - 0.1) < 5 * 0.1 / (2 * n) ** 0.5
    strong = shown(Rt2(kind="rt2", patch=2, missing=0.25, sigma=2.0), grey)
    assert strong.min() == 0 and strong.max() == 1
    assert 0.3 < (strong[mask == 1] == 1).float().mean() < 0.5


def test_hidden_pixels_have_the_value_of_the_fill() -> None:
    """One patch of four of a 4 x 4 image: four pixels are 0.5, the others as they were."""
    x = torch.arange(16).view(1, 1, 4, 4) / 100
    black, grey = (
        shown(Rt1(kind="rt1", patch=2, missing=0.25, **fill), x) for fill in ({}, {"fill": 0.5})
    )
    hidden = grey == 0.5
    assert hidden.sum() == 4 and (black[hidden] == 0).all()
    assert torch.equal(grey[~hidden], x[~hidden]) and torch.equal(black[~hidden], x[~hidden])
    noisy = shown(Rt2(kind="rt2", patch=2, missing=0.25, sigma=0.1, fill=0.5), x)
    assert torch.equal(noisy == 0.5, hidden), "the fill has noise of its own"


class Record(nn.Module):
    """An inner purifier that records what it sees and repeats it."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return x


def test_the_inner_purifier_sees_the_mask_as_its_last_channel() -> None:
    """As in the authors' code, 1 is missing. Without the switch there are the image's channels."""
    x = 0.2 + 0.6 * torch.rand(IMAGES, 3, 8, 8)
    marked, plain = (
        purifier((3, 8, 8), Record(), mask_channel=channel, transform={**RT1, "fill": 0.5})
        for channel in (True, False)
    )
    out = marked(x, keyed(IMAGES).stream())
    missing = (marked.inner.seen[:, :3] == 0.5).all(1)
    assert marked.inner.seen.shape == (IMAGES, 4, 8, 8) and missing.sum() == IMAGES * 16
    assert torch.equal(marked.inner.seen[:, 3], missing.float())
    assert torch.equal(out, marked.inner.seen[:, :3]), "the mask is no part of the purified image"
    assert torch.equal(plain(x, keyed(IMAGES).stream()), out)
    assert torch.equal(plain.inner.seen, marked.inner.seen[:, :3])


def test_rt3_hides_every_patch_behind_exactly_one_of_its_masks() -> None:
    """16 patches by 4 masks are 4 each; by 3 masks 6, 5 and 5."""
    for masks, patches in ((4, [4, 4, 4, 4]), (3, [5, 5, 6])):
        rt3 = Rt3(kind="rt3", patch=2, masks=masks, sigma=0.1)
        _, hidden = rt3.apply(torch.rand(IMAGES, 1, 8, 8), keyed(IMAGES).stream())
        assert hidden.shape == (IMAGES, masks, 1, 8, 8) and (hidden.sum(1) == 1).all()
        for counts in (hidden.flatten(2).sum(2) // 4).tolist():
            assert sorted(counts) == patches
        assert len({tuple(one.flatten().tolist()) for one in hidden}) == IMAGES


class Mean(nn.Module):
    """An inner purifier that paints the mean of what it sees."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).mean(1)[:, None, None, None].expand_as(x)


def test_rt3_takes_each_pixel_from_the_pass_that_did_not_see_it() -> None:
    """Equation 4 by hand: pixels .1 .2 .3 .4, each hidden alone (black), painted as the mean of the
    others: (1 - .1) / 4 = .225, .2, .175, .15. Filled with 0.4 it is 0.1 more.
    """
    x = torch.tensor([[[[0.1, 0.2], [0.3, 0.4]]]])
    expected = torch.tensor([[[[0.225, 0.2], [0.175, 0.15]]]])
    rt3 = {"kind": "rt3", "patch": 1, "masks": 4, "sigma": 1e-9}
    for fill, more in ((0.0, 0.0), (0.4, 0.1)):
        built = purifier((1, 2, 2), Mean(), transform={**rt3, "fill": fill})
        assert torch.allclose(built(x, keyed(1).stream()), expected + more, atol=1e-6)


def test_the_passes_of_rt3_share_their_noise() -> None:
    rt3 = {"kind": "rt3", "patch": 2, "masks": 4, "sigma": 0.1}
    built = purifier((1, 8, 8), Record(), transform=rt3)
    built(torch.full((2, 1, 8, 8), 0.5), keyed(2).stream())
    views = built.inner.seen.unflatten(0, (2, 4))
    # Three of four passes see a pixel; the fourth has zero.
    assert torch.allclose(views.sum(1), 3 * views.amax(1), atol=1e-5)


@pytest.mark.parametrize(
    "inner",
    [AUTOENCODER, {**AUTOENCODER, "residual": "global"}, {"kind": "denoiser", "width": 4},
     {"kind": "red_net", "blocks": 4, "width": 4}],
    ids=["autoencoder", "global", "denoiser", "red_net"],
)  # fmt: skip
def test_every_inner_purifier_returns_the_channels_of_the_image(inner: dict[str, Any]) -> None:
    for channel in (False, True):
        section = {"kind": "random_transform", "transform": RT2, "inner": inner}
        built = RandomTransform.model_validate({**section, "mask_channel": channel}).build(
            (3, 8, 8)
        )
        x = torch.rand(4, 3, 8, 8)
        assert built.eval()(x, keyed(4).stream()).shape == x.shape


def test_patches_that_do_not_tile_or_round_to_none_are_refused() -> None:
    section = {"kind": "random_transform", "transform": {**RT1, "patch": 3}, "inner": AUTOENCODER}
    with pytest.raises(ValueError, match="patches of side 3 do not tile 8 x 8 images"):
        RandomTransform.model_validate(section).build((1, 8, 8))
    few = {**section, "transform": {**RT1, "patch": 4, "missing": 0.1}}
    with pytest.raises(ValueError, match=r"missing: 0\.1 of 4 patches rounds to none"):
        RandomTransform.model_validate(few).build((1, 8, 8))
    many = {**section, "transform": {"kind": "rt3", "patch": 4, "masks": 5, "sigma": 0.1}}
    with pytest.raises(ValueError, match="masks: 5 are more than the 4 patches of an image"):
        RandomTransform.model_validate(many).build((1, 8, 8))
