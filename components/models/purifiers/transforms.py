"""Random transforms before a purifier, as fine-tuned by AToP (Lin et al. 2024, section 3.2).

RT1 removes a fraction of the square patches. RT2 adds Gaussian noise, clips to [0,1] and then
removes patches. The inner purifier sees the transformed image and repaints all of it; its output is
used as it is (no compositing), as in the paper. Deviation: every image has its own mask, so that it
does not depend on its batch; the released code draws one mask per batch.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from components.config import Config
from components.data.draws import NoiseStream
from components.data.image_set import Shape
from components.models.purifiers.autoencoder import ConvAutoencoder
from components.models.purifiers.contract import Purifier


class Rt1(Config):
    """Remove the fraction `missing` of the patches of `patch` x `patch` pixels, at random."""

    kind: Literal["rt1"]
    patch: Annotated[int, Field(ge=1)]
    missing: Annotated[float, Field(gt=0, lt=1)]

    def apply(self, x: Tensor, stream: NoiseStream) -> Tensor:
        """Return `x` (N,C,H,W) in [0,1] with the removed patches set to zero."""
        return x * self._mask(x, stream)

    def _mask(self, x: Tensor, stream: NoiseStream) -> Tensor:
        """Return the mask (N,1,H,W): 0 where a patch is removed, else 1."""
        rows, columns = x.shape[2] // self.patch, x.shape[3] // self.patch
        missing = round(self.missing * rows * columns)
        # Every image has a random order of its patches, and loses the first `missing`.
        kept = (stream.permutation(rows * columns, "mask") >= missing).to(x.dtype)
        grid = kept.view(-1, 1, rows, columns)
        return grid.repeat_interleave(self.patch, 2).repeat_interleave(self.patch, 3)


class Rt2(Rt1):
    """Add Gaussian noise of standard deviation `sigma` (pixels in [0,1]), clip, remove patches."""

    kind: Literal["rt2"]  # type: ignore[assignment]
    sigma: Annotated[float, Field(gt=0)]

    def apply(self, x: Tensor, stream: NoiseStream) -> Tensor:
        """Return the noisy `x` (N,C,H,W) in [0,1] with the removed patches set to zero."""
        noise = stream.normal(tuple(x.shape[1:]), "noise").to(x.dtype)
        return (x + self.sigma * noise).clamp(0, 1) * self._mask(x, stream)


class RandomTransform(Config):
    """The purifier `inner` behind the random transform `transform`."""

    kind: Literal["random_transform"]
    transform: Annotated[Rt1 | Rt2, Field(discriminator="kind")]
    inner: ConvAutoencoder

    def build(self, shape: Shape) -> Purifier:
        """Make the untrained network.

        Raises ValueError if patches do not tile `shape` or none of them would be removed.
        """
        patch = self.transform.patch
        if shape[1] % patch or shape[2] % patch:
            raise ValueError(f"patches of side {patch} do not tile {shape[1]} x {shape[2]} images")
        patches = (shape[1] // patch) * (shape[2] // patch)
        if not round(self.transform.missing * patches):
            raise ValueError(
                f"missing: {self.transform.missing} of {patches} patches rounds to none, so "
                "nothing would be removed"
            )
        return _RandomTransform(self, shape)


class _RandomTransform(Purifier):
    stochastic = True

    def __init__(self, config: RandomTransform, shape: Shape) -> None:
        super().__init__()
        self.transform = config.transform
        self.inner = config.inner.build(shape)

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        assert stream is not None
        purified: Tensor = self.inner(self.transform.apply(x, stream))
        return torch.clamp(purified, 0, 1)
