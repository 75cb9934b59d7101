"""APuDAE (Kalaria et al., section 4): descend on the reconstruction error of a denoiser.

The image x is changed until the denoiser f reconstructs it as well as a clean image. The gradient
flows through x and through f(x). The paper's variants for CIFAR-10 are settings here:

A: `optimiser: sgd`, `target: minimum`. B: A by Adam. C: B with `scaled`. D: `target: distribution`.
E: `target: one_sided`. F: E with `noise_255` 0.7. G: E or F with `transform`.
For ImageNet, the paper's A has fixed steps, its B adds noise to them and its C adds the transform.
"Direct" is the denoiser without a descent.

Paper and code differ in two places, and two switches, off if absent, follow the code. The paper's
C takes its rate from the "current" error, so in every step; the code computes it once, for the
first image: `scaled_once`. The paper's F adds noise at each step; here the gradient is then taken
at the noisy image. The code takes it at the image before the noise: `noise_after`.

Deviations from the authors' code: errors, rates and moments are per image, where the code takes
means over the batch; the purified image is clipped to [0,1]; the transform is one rotation and one
scaling, drawn per image (the code has none). The paper calls the descent non-differentiable;
`descend` gives its exact gradient. Adam masks this gradient, because its first step is nearly a
sign. That is why there are stand-ins for the backward pass.
"""

import math
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from components.config import Config
from components.data.draws import NoiseStream
from components.models.purifiers.contract import Inference, Purifier, StandIn
from components.models.purifiers.denoiser import DenoisingAutoencoder
from components.models.purifiers.descent import State, adam_direction, descend, gradient_at

BETAS = (0.9, 0.999)


class RandomAffine(Config):
    """Rotate by up to `degrees` either way and scale by 1 - `stretch` to 1 + `stretch`."""

    degrees: Annotated[float, Field(ge=0, le=45)]
    stretch: Annotated[float, Field(ge=0, lt=1)]

    def apply(self, x: Tensor, stream: NoiseStream) -> Tensor:
        """Return `x` (N,C,H,W) rotated and scaled about its centre; the outside is black."""
        spread = 2 * stream.uniform((2,), "turn").to(x.dtype) - 1
        angle, scale = spread[:, 0] * math.radians(self.degrees), 1 + spread[:, 1] * self.stretch
        # `affine_grid` has coordinates from -1 to 1 on both axes, whatever their lengths.
        aspect = x.shape[3] / x.shape[2]
        zero = torch.zeros_like(angle)
        matrix = torch.stack(
            [
                torch.stack([angle.cos(), -angle.sin() / aspect, zero], 1),
                torch.stack([angle.sin() * aspect, angle.cos(), zero], 1),
            ],
            1,
        )
        grid = F.affine_grid(matrix / scale[:, None, None], list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)


class Apudae(Inference):
    """`steps` steps of size `rate`: in pixels for Adam, per unit of gradient for SGD.

    `scaled_once` and `noise_after` do as the authors' code; without them, every step computes its
    rate, and adds its noise before it takes the gradient.
    """

    network_kinds: ClassVar[tuple[str, ...]] = ("denoiser", "red_net")

    kind: Literal["apudae"]
    steps: Annotated[int, Field(ge=1)]
    rate: Annotated[float, Field(gt=0)]
    optimiser: Literal["sgd", "adam"]
    target: Literal["minimum", "distribution", "one_sided"]
    scaled: bool
    noise_255: Annotated[float, Field(ge=0)]
    transform: RandomAffine | None
    scaled_once: bool = False
    noise_after: bool = False

    @model_validator(mode="after")
    def _switches_have_an_effect(self) -> "Apudae":
        if self.scaled_once and not self.scaled:
            raise ValueError("scaled_once: true needs scaled: true, whose rate it computes")
        if self.noise_after and not self.noise_255:
            raise ValueError("noise_after: true needs noise_255 above 0, the noise that it moves")
        return self

    def stand_ins(self) -> tuple[StandIn, ...]:
        """Offer one pass of the denoiser; for Adam, which masks its gradient, two more."""
        return ("direct",) if self.optimiser == "sgd" else ("direct", "plain", "detached")

    def stochastic(self) -> bool:
        """Say whether noise or a transform is drawn."""
        return self.noise_255 > 0 or self.transform is not None

    def wrap(self, network: nn.Module) -> Purifier:
        """Return the purifier; raise ValueError for a network that is not a denoiser."""
        if not isinstance(network, DenoisingAutoencoder):
            raise ValueError("apudae needs a denoiser or a red_net, and this model is neither")
        return _Apudae(self, network)


class _Apudae(Purifier):
    def __init__(self, config: Apudae, denoiser: DenoisingAutoencoder) -> None:
        super().__init__()
        self.config, self.denoiser = config, denoiser
        self.stochastic = config.stochastic()
        self.stand_ins = config.stand_ins()

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        return self._descend(x, stream, self.config.optimiser)

    def stand_in(self, kind: StandIn, x: Tensor, stream: NoiseStream | None) -> Tensor:
        if kind == "direct":
            purified: Tensor = self.denoiser(self._transform(x, stream))
            return purified
        return self._descend(x, stream, kind)

    def compute_detector_score(
        self, x: Tensor, stream: NoiseStream | None, purified: Tensor | None
    ) -> Tensor:
        return self.denoiser.detector_score(x)

    def _transform(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        if self.config.transform is None:
            return x
        assert stream is not None
        return self.config.transform.apply(x, stream)

    def _descend(self, x: Tensor, stream: NoiseStream | None, rule: str) -> Tensor:
        """Return the image after all steps; `rule` is an optimiser or the name of a stand-in."""
        start = self._transform(x, stream)
        moments = () if rule in ("sgd", "plain") else (torch.zeros_like(start),) * 2
        step = partial(self._step, stream, rule)
        rate = (self._scaled_rate(start),) if self.config.scaled_once else ()
        image, *_ = descend(step, self.config.steps, rate, (start, *moments))
        return image.clamp(0, 1)

    def _step(
        self, stream: NoiseStream | None, rule: str, index: int, constants: State, state: State
    ) -> State:
        """Take one step of all images (N,C,H,W); the state is the image and Adam's moments.

        The only constant is the rate, if it is computed once.
        """
        noisy, moments = self._add_noise(state[0], stream, index), state[1:]
        image = state[0] if self.config.noise_after else noisy
        direction = gradient_at(self._loss, image)
        if rule == "plain":
            # The step has the length of Adam's, but the direction of the gradient.
            size = direction.detach().flatten(1).abs().mean(1).clamp_min(1e-12)
            direction = direction / size[:, None, None, None]
        elif rule != "sgd":
            detached = rule == "detached"
            direction, moments = adam_direction(direction, moments, index, BETAS, detached)
        rate: Tensor | float = self.config.rate
        if self.config.scaled:
            rate = constants[0] if constants else self._scaled_rate(image)
        return noisy - rate * direction, *moments

    def _loss(self, image: Tensor) -> Tensor:
        """Return the loss of every image (N,) that the descent lowers."""
        if self.config.target == "minimum":
            return self.denoiser.error(image)
        excess = self.denoiser.detector_score(image)
        # E leaves an image alone that is reconstructed at least as well as a clean one.
        return (excess if self.config.target == "distribution" else excess.clamp_min(0)).square()

    def _scaled_rate(self, image: Tensor) -> Tensor:
        """Return the rate of every image (N,1,1,1): it grows with the detector score."""
        factor = torch.sigmoid(self.denoiser.detector_score(image))
        return self.config.rate * factor[:, None, None, None]

    def _add_noise(self, image: Tensor, stream: NoiseStream | None, index: int) -> Tensor:
        if not self.config.noise_255:
            return image
        assert stream is not None
        # The noise grows with the detector score; the factors are those of the authors' code.
        excess = self.denoiser.detector_score(image)
        size = (excess / 2).square().clamp(0, 4) * self.config.noise_255 / 255
        noise = 2 * stream.uniform(tuple(image.shape[1:]), f"step {index}").to(image.dtype) - 1
        return image + size[:, None, None, None] * noise
