"""AToP's random transforms: what RT1 and RT2 remove and add, and the settings they refuse."""

import pytest
import torch
from toys import keyed

from components.models.purifiers.transforms import RandomTransform, Rt1, Rt2

AUTOENCODER = {
    "kind": "conv_autoencoder", "blocks": 4, "width": 6, "strided": [2], "residual": "none",
}  # fmt: skip
RT1 = {"kind": "rt1", "patch": 2, "missing": 0.25}
IMAGES = 24


@pytest.mark.parametrize(
    ("patch", "missing", "patches"), [(4, 0.25, 16), (2, 0.25, 64), (2, 0.5, 128), (1, 0.15, 154)]
)
def test_rt1_removes_the_requested_number_of_whole_patches(
    patch: int, missing: float, patches: int
) -> None:
    """On 32 x 32 images. AToP removes 16 of 64 patches of side 4."""
    white = torch.ones(IMAGES, 3, 32, 32)
    kept = Rt1(kind="rt1", patch=patch, missing=missing).apply(white, keyed(IMAGES))
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    removed = (kept == 0).flatten(1).sum(1)
    assert removed.tolist() == [patches * patch * patch * 3] * IMAGES
    blocks = kept.unfold(2, patch, patch).unfold(3, patch, patch).flatten(4)
    assert torch.equal(blocks.amin(4), blocks.amax(4)), "a patch is removed in part"
    assert torch.equal(kept[:, :1].expand_as(kept), kept), "channels differ"


def test_rt1_removes_patches_uniformly_and_separately_per_image() -> None:
    many = 4000
    white = torch.ones(many, 1, 8, 8)
    kept = Rt1(kind="rt1", patch=2, missing=0.25).apply(white, keyed(many))
    assert len({tuple(mask.flatten().tolist()) for mask in kept[:20]}) == 20
    removed = (kept == 0).float().mean(0)
    assert (removed - 0.25).abs().max() < 5 * (0.25 * 0.75 / many) ** 0.5
    assert not torch.equal(
        Rt1(kind="rt1", patch=2, missing=0.25).apply(white, keyed(many).redraw(1)), kept
    )


def test_rt2_adds_clipped_noise_and_then_removes_patches() -> None:
    grey = torch.full((IMAGES, 1, 32, 32), 0.5)
    rt2 = Rt2(kind="rt2", patch=2, missing=0.25, sigma=0.1)
    transformed = rt2.apply(grey, keyed(IMAGES))
    mask = Rt1(kind="rt1", patch=2, missing=0.25).apply(torch.ones_like(grey), keyed(IMAGES))
    assert torch.equal(transformed == 0, mask == 0), "a removed patch is not zero"
    noise = transformed[mask == 1] - 0.5
    n = noise.numel()
    assert abs(noise.mean()) < 5 * 0.1 / n**0.5
    assert abs(noise.std() - 0.1) < 5 * 0.1 / (2 * n) ** 0.5
    strong = Rt2(kind="rt2", patch=2, missing=0.25, sigma=2.0).apply(grey, keyed(IMAGES))
    assert strong.min() == 0 and strong.max() == 1
    assert 0.3 < (strong[mask == 1] == 1).float().mean() < 0.5


def test_patches_that_do_not_tile_or_round_to_none_are_refused() -> None:
    section = {"kind": "random_transform", "transform": {**RT1, "patch": 3}, "inner": AUTOENCODER}
    with pytest.raises(ValueError, match="patches of side 3 do not tile 8 x 8 images"):
        RandomTransform.model_validate(section).build((1, 8, 8))
    few = {**section, "transform": {**RT1, "patch": 4, "missing": 0.1}}
    with pytest.raises(ValueError, match=r"missing: 0\.1 of 4 patches rounds to none"):
        RandomTransform.model_validate(few).build((1, 8, 8))
