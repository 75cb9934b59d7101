"""APuDAE (Kalaria et al., section 4): descend on the reconstruction error of a denoiser.

The image itself is changed until the denoiser reconstructs it as well as a clean one; the gradient
flows through x and through f(x), and every image goes its own way. The paper's variants for
CIFAR-10 are settings here:

A: `optimiser: sgd`, `target: minimum`. B: the same by Adam. C: B with `scaled`. D: `target:
distribution`. E: `target: one_sided`. F: E with `noise_255` 0.7. G: F or E with `transform`.
For ImageNet its A is fixed steps, its B adds noise to them and its C the transform. "Direct" is
the denoiser without this descent.

Deviations from the authors' code: errors, rates and moments are per image, where the code takes
the mean over the batch; the purified image is clipped to [0,1]; the transform is one rotation and
one scaling, drawn per image (the code has none). The paper calls the result non-differentiable; it
is not, and `descend` gives its exact gradient. Adam masks it, its first step being nearly a sign,
so there are stand-ins for the backward pass.
"""

import math
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from components.config import Config
from components.data.draws import Draws
from components.models.purifiers.contract import Inference, Purifier, StandIn
from components.models.purifiers.denoiser import DenoisingAutoencoder
from components.models.purifiers.descent import State, adam, descend, slope

BETAS = (0.9, 0.999)


class Turn(Config):
    """Rotate by up to `degrees` either way and scale by 1 - `stretch` to 1 + `stretch`."""

    degrees: Annotated[float, Field(ge=0, le=45)]
    stretch: Annotated[float, Field(ge=0, lt=1)]

    def apply(self, x: Tensor, draws: Draws) -> Tensor:
        """Return `x` (N,C,H,W) turned about its centre; what comes in from outside is black."""
        spread = 2 * draws.uniform((2,), "turn").to(x.dtype) - 1
        angle, scale = spread[:, 0] * math.radians(self.degrees), 1 + spread[:, 1] * self.stretch
        # Coordinates run from -1 to 1 either way, however long the sides are.
        wide = x.shape[3] / x.shape[2]
        nothing = torch.zeros_like(angle)
        rows = torch.stack(
            [
                torch.stack([angle.cos(), -angle.sin() / wide, nothing], 1),
                torch.stack([angle.sin() * wide, angle.cos(), nothing], 1),
            ],
            1,
        )
        grid = F.affine_grid(rows / scale[:, None, None], list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)


class Apudae(Inference):
    """`steps` descents of `rate` in pixels (Adam), or per unit of gradient (SGD)."""

    network_kinds: ClassVar[tuple[str, ...]] = ("denoiser", "red_net")

    kind: Literal["apudae"]
    steps: Annotated[int, Field(ge=1)]
    rate: Annotated[float, Field(gt=0)]
    optimiser: Literal["sgd", "adam"]
    target: Literal["minimum", "distribution", "one_sided"]
    scaled: bool
    noise_255: Annotated[float, Field(ge=0)]
    transform: Turn | None

    def stand_ins(self) -> tuple[StandIn, ...]:
        """One pass can stand in for the descent; for Adam's, which masks itself, more can."""
        return ("direct",) if self.optimiser == "sgd" else ("direct", "plain", "detached")

    def wrap(self, network: nn.Module) -> Purifier:
        """Return the purifier; raise ValueError for a network that is no denoiser."""
        if not isinstance(network, DenoisingAutoencoder):
            raise ValueError("apudae descends on a denoiser or a red_net, which this model is not")
        return _Apudae(self, network)


class _Apudae(Purifier):
    def __init__(self, config: Apudae, denoiser: DenoisingAutoencoder) -> None:
        super().__init__()
        self.config, self.denoiser = config, denoiser
        self.stochastic = config.noise_255 > 0 or config.transform is not None
        self.stand_ins = config.stand_ins()

    def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
        return self._descended(x, draws, self.config.optimiser)

    def stand_in(self, kind: StandIn, x: Tensor, draws: Draws | None) -> Tensor:
        if kind == "direct":
            passed: Tensor = self.denoiser(self._turned(x, draws))
            return passed
        return self._descended(x, draws, kind)

    def compute_detector_score(self, x: Tensor, draws: Draws | None, purified: Tensor | None) -> Tensor:
        return self.denoiser.detector_score(x)

    def _turned(self, x: Tensor, draws: Draws | None) -> Tensor:
        if self.config.transform is None:
            return x
        assert draws is not None
        return self.config.transform.apply(x, draws)

    def _descended(self, x: Tensor, draws: Draws | None, how: str) -> Tensor:
        start = self._turned(x, draws)
        moments = () if how in ("sgd", "plain") else (torch.zeros_like(start),) * 2
        step = partial(self._step, draws, how)
        image, *_ = descend(step, self.config.steps, (), (start, *moments))
        return image.clamp(0, 1)

    def _step(
        self, draws: Draws | None, how: str, index: int, constants: State, state: State
    ) -> State:
        """Take one step of all images (N,C,H,W); the state is the image and Adam's moments."""
        image, moments = self._noisy(state[0], draws, index), state[1:]
        way = slope(self._loss, image)
        if how == "plain":
            # As far in all as Adam goes, but along the gradient.
            way = way / way.detach().flatten(1).abs().mean(1).clamp_min(1e-12)[:, None, None, None]
        elif how != "sgd":
            way, moments = adam(way, moments, index, BETAS, detached=how == "detached")
        return image - self._rate(image) * way, *moments

    def _loss(self, image: Tensor) -> Tensor:
        if self.config.target == "minimum":
            return self.denoiser.error(image)
        beyond = self.denoiser.detector_score(image)
        # E: what is reconstructed at least as well as a clean image is left alone.
        return (beyond if self.config.target == "distribution" else beyond.clamp_min(0)).square()

    def _rate(self, image: Tensor) -> Tensor | float:
        if not self.config.scaled:
            return self.config.rate
        share = torch.sigmoid(self.denoiser.detector_score(image))
        return self.config.rate * share[:, None, None, None]

    def _noisy(self, image: Tensor, draws: Draws | None, index: int) -> Tensor:
        if not self.config.noise_255:
            return image
        assert draws is not None
        # The odder the image, the more noise; the factors are those of the authors' code.
        beyond = self.denoiser.detector_score(image)
        size = (beyond / 2).square().clamp(0, 4) * self.config.noise_255 / 255
        noise = 2 * draws.uniform(tuple(image.shape[1:]), f"step {index}").to(image.dtype) - 1
        return image + size[:, None, None, None] * noise
