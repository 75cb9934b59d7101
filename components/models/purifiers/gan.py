"""Defense-GAN (Samangouei et al. 2018): the nearest image that a generator can make.

A WGAN-GP is trained on clean images. At test time the latent code of its generator is fitted to the
image by gradient descent with momentum, from several random starts. The best reconstruction is the
purified image. Rate, decay and momentum are those of the authors' code. The two training losses are
here; the objective that alternates them is in `components/training/generative.py`.

The networks are the paper's for 28 x 28 images: the generator goes from 4 x 4 through 8, cropped to
7, and 14. Other shapes follow the same rule: the sides are halved three times, rounding up, and
every layer doubles them and crops to the next larger size; 8 x 8 images start from 1 x 1.

Deviations: the gradient penalty takes the norm over the whole image (Gulrajani et al. 2017, eq. 3),
where the authors' code takes it over one axis; initial weights are torch's. The gradient through
the unrolled descent is exact. Users of the authors' code found that theirs vanishes (its issue 1);
this one does not, but it is expensive, so `short` is offered for the backward pass. The choice of
the best start has no gradient, because it is locally constant.

Shapes: N batch, R restarts, Z latent, C channels, H W.
"""

from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from components.data.draws import NoiseStream
from components.data.image_set import Shape
from components.models.purifiers.contract import (
    Inference,
    Purifier,
    PurifierSection,
    StandIn,
    mean_squared_error,
)
from components.models.purifiers.descent import State, descend, gradient_at

PENALTY = 10.0
MOMENTUM = 0.7


class Gan(PurifierSection):
    """A generator from `latent` normal numbers, and its critic; the paper has 128 and width 64."""

    kind: Literal["gan"]
    latent: Annotated[int, Field(ge=1)]
    width: Annotated[int, Field(ge=1)]

    def build(self, shape: Shape) -> "GenerativePair":
        """Make the untrained networks, for any shape."""
        return GenerativePair(self, shape)


class GenerativePair(nn.Module):
    """`generator`: codes (N,Z) to pixels (N,C,H,W) in [0,1]; `critic`: pixels to numbers (N,).

    The generator is trained on standard normal codes. The critic is high on real images.
    """

    def __init__(self, config: Gan, shape: Shape) -> None:
        super().__init__()
        self.latent = config.latent
        sides = [shape[1:]]
        for _ in range(3):
            sides.append((-(-sides[-1][0] // 2), -(-sides[-1][1] // 2)))
        self.generator = _Generator(config, shape[0], sides[::-1])
        self.critic = _critic(config.width, shape[0], sides[-1])


class _Generator(nn.Module):
    def __init__(self, config: Gan, channels: int, sides: list[tuple[int, int]]) -> None:
        super().__init__()
        widths = (4 * config.width, 2 * config.width, config.width, channels)
        self.sides = sides
        self.first = nn.Linear(config.latent, widths[0] * sides[0][0] * sides[0][1])
        self.rises = nn.ModuleList(
            nn.ConvTranspose2d(widths[i], widths[i + 1], 5, 2, 1) for i in range(3)
        )

    def forward(self, codes: Tensor) -> Tensor:
        feature = self.first(codes).unflatten(1, (-1, *self.sides[0]))
        for rise, (height, width) in zip(self.rises, self.sides[1:], strict=True):
            # A layer makes 2n + 1 pixels of n. They are cropped to 2n, or to 2n - 1 if that is odd.
            feature = rise(torch.relu(feature))[:, :, :height, :width]
        return torch.sigmoid(feature)


def _critic(width: int, channels: int, last: tuple[int, int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in ((channels, width), (width, 2 * width), (2 * width, 4 * width)):
        layers += [nn.Conv2d(inputs, outputs, 5, 2, 2), nn.LeakyReLU(0.2)]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(4 * width * last[0] * last[1], 1), nn.Flatten(0)
    )


def critic_loss(pair: GenerativePair, real: Tensor, latent: Tensor, mix: Tensor) -> Tensor:
    """Return E D(fake) - E D(real) + 10 E (|grad D(mixed)| - 1)^2 (Gulrajani et al. 2017, eq. 3).

    `real` (N,C,H,W), `latent` (N,Z) standard normal, `mix` (N,1,1,1) uniform in [0,1). The
    gradient reaches the critic's parameters only.
    """
    with torch.no_grad():
        fake = pair.generator(latent)
    gradient_norm = gradient_at(pair.critic, real + mix * (fake - real)).flatten(1).norm(dim=1)
    penalty = (gradient_norm - 1).square().mean()
    loss: Tensor = pair.critic(fake).mean() - pair.critic(real).mean() + PENALTY * penalty
    return loss


def generator_loss(pair: GenerativePair, latent: Tensor) -> Tensor:
    """Return -E D(G(latent)) for `latent` (N,Z) standard normal.

    The gradient reaches the generator's parameters only.
    """
    constants = {name: value.detach() for name, value in pair.critic.named_parameters()}
    scores = functional_call(pair.critic, constants, (pair.generator(latent),))
    loss: Tensor = -scores.mean()
    return loss


class DefenseGan(Inference):
    """Fit the code for `iterations` (L) from `restarts` (R) random codes, first at rate `rate`.

    The paper has L = 200, R = 10; its code has rate 10 per unit of the mean squared error.
    """

    network_kinds: ClassVar[tuple[str, ...]] = ("gan",)

    kind: Literal["defense_gan"]
    # The result is the image before the last step, so one iteration would not descend at all.
    iterations: Annotated[int, Field(ge=2)]
    restarts: Annotated[int, Field(ge=1)]
    rate: Annotated[float, Field(gt=0)]

    def stand_ins(self) -> tuple[StandIn, ...]:
        """Offer a descent of fewer iterations from one start."""
        return ("short",)

    def stochastic(self) -> bool:
        """Say that it starts from noise."""
        return True

    def wrap(self, network: nn.Module) -> Purifier:
        """Return the purifier; raise ValueError for a network that is not a gan."""
        if not isinstance(network, GenerativePair):
            raise ValueError("defense_gan needs a gan, which this model is not")
        return _DefenseGan(self, network)


class _DefenseGan(Purifier):
    """The default detector score is the error of the best start, as in the paper."""

    stochastic = True

    def __init__(self, config: DefenseGan, pair: GenerativePair) -> None:
        super().__init__()
        self.stand_ins = config.stand_ins()
        self.config, self.latent, self.generator = config, pair.latent, pair.generator

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        return self._reconstruct(x, stream, self.config.iterations, self.config.restarts)

    def stand_in(self, kind: StandIn, x: Tensor, stream: NoiseStream | None) -> Tensor:
        # A shorter descent from the first start; the rate still decays over its whole length.
        return self._reconstruct(x, stream, max(2, self.config.iterations // 10), 1)

    def _reconstruct(
        self, x: Tensor, stream: NoiseStream | None, iterations: int, restarts: int
    ) -> Tensor:
        """Return the best reconstruction of each image; all starts are one batch (N R,...)."""
        assert stream is not None
        starts = [stream.normal((self.latent,), f"start {restart}") for restart in range(restarts)]
        # As in the authors' code, the variance is 1/Z, although training used variance 1.
        codes = torch.stack(starts, 1).flatten(0, 1).to(x.dtype) / self.latent**0.5
        step = partial(self._step, iterations, restarts)
        # The authors' code returns the image of the last iteration before that iteration's step.
        codes, _ = descend(step, iterations - 1, (x,), (codes, torch.zeros_like(codes)))
        images: Tensor = self.generator(codes).unflatten(0, (len(x), restarts))
        best = (images - x[:, None]).square().flatten(2).mean(2).argmin(1)
        return images[torch.arange(len(x), device=x.device), best]

    def _step(
        self, iterations: int, restarts: int, index: int, constants: State, state: State
    ) -> State:
        """Take one step of all codes (N R,Z); the state is the codes and their velocities."""
        (x,), (codes, velocity) = constants, state
        wanted = x.repeat_interleave(restarts, 0)
        gradient = gradient_at(lambda at: mean_squared_error(self.generator(at), wanted), codes)
        velocity = MOMENTUM * velocity + gradient
        # The rate decays exponentially, to a tenth after ceil(0.8 L) steps.
        rate = self.config.rate * 0.1 ** (index / -(-4 * iterations // 5))
        return codes - rate * velocity, velocity
