"""Random transforms before a purifier, as fine-tuned by AToP (Lin et al. 2024, section 3.1).

RT1 hides a fraction of the square patches from the purifier. RT2 adds Gaussian noise, clips to
[0,1] and then hides patches. RT3 hides every patch once: noise as in RT2, then `masks` disjoint
masks that cover the image together, one pass of the inner purifier for each, and of every pass only
the pixels that it did not see (equation 4). After RT1 and RT2 the output of the inner purifier is
used as it is (no compositing), as in the paper.

Deviations. Every image has its own masks, so that it does not depend on its batch; the released
code draws one mask per batch. By default hidden pixels are black, and nothing marks them for the
inner purifier: they look like any black pixel. The released code paints them mid-grey and gives the
mask as a channel of its own (1 where a pixel is missing): `fill: 0.5` and `mask_channel: true`. Its
constant sketch channel is left out. In RT3 the passes share one noise, as in the formula.

Shapes: N batch, M masks of an image, C channels, H W.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from components.config import Config
from components.data.draws import NoiseStream
from components.data.image_set import Shape
from components.models.purifiers.autoencoder import ConvAutoencoder
from components.models.purifiers.contract import Purifier, PurifierSection
from components.models.purifiers.denoiser import Denoiser, RedNet


class Transform(Config):
    """Base of the transforms: patches of `patch` x `patch` pixels are hidden behind masks.

    `fill` is the value in [0,1] that hidden pixels show: 0 black (if absent), 0.5 mid-grey.
    """

    patch: Annotated[int, Field(ge=1)]
    fill: Annotated[float, Field(ge=0, le=1)] = 0.0

    def require_fit(self, patches: int) -> None:
        """Raise ValueError where `patches`, the number in an image, are too few."""
        raise NotImplementedError

    def apply(self, x: Tensor, stream: NoiseStream) -> tuple[Tensor, Tensor]:
        """Return what the inner purifier sees, and what is hidden from it.

        Takes pixels (N,C,H,W) in [0,1]; returns pixels (N,M,C,H,W) in [0,1] and masks (N,M,1,H,W),
        true where a pixel is hidden.
        """
        rows, columns = x.shape[2] // self.patch, x.shape[3] // self.patch
        # Every image has a random order of its patches.
        hidden = self._hidden(stream.permutation(rows * columns, "mask"))
        grid = hidden.view(len(x), -1, 1, rows, columns)
        masks = grid.repeat_interleave(self.patch, 3).repeat_interleave(self.patch, 4)
        return torch.where(masks, self.fill, self._noisy(x, stream)[:, None]), masks

    def _hidden(self, order: Tensor) -> Tensor:
        """Return which patches each mask hides (N,M,patches), from their order (N,patches)."""
        raise NotImplementedError

    def _noisy(self, x: Tensor, stream: NoiseStream) -> Tensor:
        """Return `x` with the noise of the transform."""
        return x


class Rt1(Transform):
    """Hide the fraction `missing` of the patches, at random."""

    kind: Literal["rt1"]
    missing: Annotated[float, Field(gt=0, lt=1)]

    def require_fit(self, patches: int) -> None:
        """Raise ValueError where the fraction rounds to no patch."""
        if not round(self.missing * patches):
            raise ValueError(
                f"missing: {self.missing} of {patches} patches rounds to none, so "
                "nothing would be removed"
            )

    def _hidden(self, order: Tensor) -> Tensor:
        return order[:, None] < round(self.missing * order.shape[1])


class _Noise(Config):
    """Adds Gaussian noise of standard deviation `sigma` (pixels in [0,1]), and clips."""

    sigma: Annotated[float, Field(gt=0)]

    def _noisy(self, x: Tensor, stream: NoiseStream) -> Tensor:
        noise = stream.normal(tuple(x.shape[1:]), "noise").to(x.dtype)
        return (x + self.sigma * noise).clamp(0, 1)


class Rt2(_Noise, Rt1):
    """Add noise, then hide the fraction `missing` of the patches."""

    kind: Literal["rt2"]  # type: ignore[assignment]


class Rt3(_Noise, Transform):
    """Add noise, then hide every patch behind one of `masks` masks (paper 4, each a quarter).

    Where the number of masks does not divide that of the patches, they differ by one patch.
    """

    kind: Literal["rt3"]
    masks: Annotated[int, Field(ge=2)]

    def require_fit(self, patches: int) -> None:
        """Raise ValueError where there are more masks than patches."""
        if self.masks > patches:
            raise ValueError(f"masks: {self.masks} are more than the {patches} patches of an image")

    def _hidden(self, order: Tensor) -> Tensor:
        group = order * self.masks // order.shape[1]
        return group[:, None] == torch.arange(self.masks, device=order.device)[:, None]


class RandomTransform(PurifierSection):
    """The purifier `inner` behind the random transform `transform`.

    With `mask_channel`, the mask is one more channel of the images that `inner` takes (1 where a
    pixel is hidden, else 0). `inner` returns as many channels as it takes; that one is dropped.
    """

    kind: Literal["random_transform"]
    transform: Annotated[Rt1 | Rt2 | Rt3, Field(discriminator="kind")]
    inner: Annotated[ConvAutoencoder | Denoiser | RedNet, Field(discriminator="kind")]
    mask_channel: bool = False

    def stochastic(self) -> bool:
        """Say that the purifier draws noise."""
        return True

    def build(self, shape: Shape) -> Purifier:
        """Make the untrained network.

        Raises ValueError if patches do not tile `shape` or are too few for the masks.
        """
        patch = self.transform.patch
        if shape[1] % patch or shape[2] % patch:
            raise ValueError(f"patches of side {patch} do not tile {shape[1]} x {shape[2]} images")
        self.transform.require_fit((shape[1] // patch) * (shape[2] // patch))
        return _RandomTransform(self, shape)


class _RandomTransform(Purifier):
    stochastic = True

    def __init__(self, config: RandomTransform, shape: Shape) -> None:
        super().__init__()
        self.transform, self.mask_channel = config.transform, config.mask_channel
        self.inner = config.inner.build((shape[0] + config.mask_channel, *shape[1:]))

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        assert stream is not None
        views, masks = self.transform.apply(x, stream)
        if self.mask_channel:
            views = torch.cat([views, masks.to(views.dtype)], 2)
        # All views are one batch.
        inpainted: Tensor = self.inner(views.flatten(0, 1))[:, : x.shape[1]].clamp(0, 1)
        if masks.shape[1] == 1:
            return inpainted
        return torch.where(masks, inpainted.reshape(*masks.shape[:2], *x.shape[1:]), 0).sum(1)
