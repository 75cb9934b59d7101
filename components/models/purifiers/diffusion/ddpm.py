"""A small denoising diffusion model (Ho et al. 2020): U-Net, noise schedule, reverse process.

The U-Net is that of DiffDefense's code (Silva et al. 2023) for 28 x 28 images: three levels of
`width`, 2 and 4 `width` channels. For other shapes, the entry pads the sides with zeros to a
multiple of 8, and the last, unpadded convolution is large enough to crop them back. The time
embedding has sines in even and cosines in odd columns (Vaswani et al. 2017, section 3.5); the
authors' code overwrites part of it.

Inside, the memory layout is channels last, and the weights of the layer norms are (H,W,C). On a CPU
this computes the same numbers in half the time.

Shapes: N batch, C channels, H W, T trained steps. The index t goes from 0 (least noise) to T-1;
alpha bar (Ho et al.) is the fraction of the variance that is signal.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from components.data.image_set import Shape
from components.models.purifiers.contract import PurifierSection
from components.models.purifiers.descent import State, descend

# Columns of the time embedding, as in the authors' code.
TIME_FEATURES = 100

Beta = Annotated[float, Field(gt=0, lt=1)]
Noise = Callable[[str], Tensor]  # what the noise is for -> standard normal noise (N,C,H,W)
# z, predicted noise, alpha bar before and after the step, new noise -> z after the step
ReverseStep = Callable[[Tensor, Tensor, float, float, Tensor | None], Tensor]


class Ddpm(PurifierSection):
    """A U-Net of `width` for `steps` steps of noise, beta linear from `beta_start` to `beta_end`.

    DiffDefense has width 10, steps 100, betas 1e-5 to 0.02, images as they are, and a normalised
    input. `centred` maps images to 2x - 1. `norm_input` normalises the noisy image before the first
    convolution; this hides the level of noise, which the network then knows from the index alone.
    """

    kind: Literal["ddpm"]
    width: Annotated[int, Field(ge=1)]
    steps: Annotated[int, Field(ge=1)]
    beta_start: Beta
    beta_end: Beta
    centred: bool
    norm_input: bool

    def build(self, shape: Shape) -> "Diffusion":
        """Make the untrained network, for any shape."""
        return Diffusion(self, shape)


class Diffusion(nn.Module):
    """The U-Net: z (N,C,H,W) and indices t (N,) int64 to the predicted noise (N,C,H,W) in z.

    A single index (1,) holds for all images.
    """

    alpha_bar: Tensor
    time_embedding: Tensor

    def __init__(self, config: Ddpm, shape: Shape) -> None:
        super().__init__()
        self.steps, self.centred = config.steps, config.centred
        alpha_bar = linear_alpha_bar(config.steps, config.beta_start, config.beta_end)
        self.register_buffer("alpha_bar", alpha_bar, persistent=False)
        self.register_buffer("time_embedding", _time_embedding(config.steps), persistent=False)
        channels, width = shape[0], config.width
        extra = [-side % 8 for side in shape[1:]]
        # In the order of F.pad: left, right, top, bottom.
        self.padding = [pad for more in extra[::-1] for pad in (more // 2, more - more // 2)]
        padded_height, padded_width = (s + more for s, more in zip(shape[1:], extra, strict=True))
        sides = [(padded_height // k, padded_width // k) for k in (1, 2, 4, 8)]
        ins, outs = (channels, width, 2 * width), (width, 2 * width, 4 * width)
        self.entry = nn.Conv2d(channels, channels, 1)
        self.downs = nn.ModuleList(
            _Level((ins[k], outs[k], outs[k], outs[k]), sides[k], k > 0 or config.norm_input)
            for k in range(3)
        )
        self.falls = nn.ModuleList(nn.Conv2d(c, c, 4, 2, 1) for c in outs)
        self.middle = _Level((4 * width, 2 * width, 2 * width, 4 * width), sides[3])
        self.rises = nn.ModuleList(nn.ConvTranspose2d(c, c, 4, 2, 1) for c in outs[::-1])
        self.ups = nn.ModuleList(
            _Level((2 * outs[k], outs[k], max(width, outs[k] // 2), max(width, outs[k] // 2)),
                   sides[k])
            for k in (2, 1, 0)
        )  # fmt: skip
        self.last = nn.Conv2d(width, channels, (extra[0] + 1, extra[1] + 1))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """Return the predicted noise in `z`, which is scaled as by `encode`."""
        time, skips = self.time_embedding[t], []
        feature = self.entry(F.pad(z, self.padding))
        for level, downsample in zip(self.downs, self.falls, strict=True):
            feature = level(feature, time)
            skips.append(feature)
            feature = downsample(feature)
        feature = self.middle(feature, time)
        for upsample, level in zip(self.rises, self.ups, strict=True):
            feature = level(torch.cat([upsample(feature), skips.pop()], 1), time)
        predicted: Tensor = self.last(feature)
        return predicted

    def encode(self, x: Tensor) -> Tensor:
        """Scale pixels in [0,1] to the input range of the network."""
        return 2 * x - 1 if self.centred else x

    def decode(self, z: Tensor) -> Tensor:
        """Undo `encode`; the caller clips to [0,1]."""
        return (z + 1) / 2 if self.centred else z


class _Level(nn.Module):
    """Adds the time embedding to the channels; then three times layer norm, convolution, SiLU."""

    def __init__(
        self, channels: tuple[int, int, int, int], sides: tuple[int, int], norm_input: bool = True
    ) -> None:
        super().__init__()
        first = channels[0]
        self.time = nn.Sequential(
            nn.Linear(TIME_FEATURES, first), nn.SiLU(), nn.Linear(first, first)
        )
        layers: list[nn.Module] = []
        for index in range(3):
            if index or norm_input:
                layers.append(_Norm(channels[index], sides))
            layers += [nn.Conv2d(channels[index], channels[index + 1], 3, 1, 1), nn.SiLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, feature: Tensor, time: Tensor) -> Tensor:
        out: Tensor = self.layers(feature + self.time(time)[:, :, None, None])
        return out


class _Norm(nn.Module):
    """Layer norm over (C,H,W), computed over (H,W,C), which is the memory layout."""

    def __init__(self, channels: int, sides: tuple[int, int]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm((*sides, channels))

    def forward(self, feature: Tensor) -> Tensor:
        normed: Tensor = self.norm(feature.permute(0, 2, 3, 1))
        return normed.permute(0, 3, 1, 2)


def linear_alpha_bar(steps: int, beta_start: float, beta_end: float) -> Tensor:
    """Return alpha bar (steps,) float64: the products of 1 - beta, beta linear in the index."""
    betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
    return (1 - betas).cumprod(0)


def respaced_indices(count: int, steps: int) -> list[int]:
    """Return `steps` of the indices 0..count-1, evenly spaced, in descending order from count-1."""
    assert 1 <= steps <= count
    return [count * (index + 1) // steps - 1 for index in reversed(range(steps))]


def add_noise(start: Tensor, noise: Tensor, alpha_bar: float) -> Tensor:
    """Return `start` with `noise` at level `alpha_bar` (Ho et al. 2020, eq. 4)."""
    return math.sqrt(alpha_bar) * start + math.sqrt(1 - alpha_bar) * noise


def ddpm_step(
    z: Tensor, predicted: Tensor, alpha_bar: float, next_alpha_bar: float, noise: Tensor | None
) -> Tensor:
    """Take one ancestral step from level `alpha_bar` to `next_alpha_bar` (Ho et al. 2020, alg. 2).

    sigma^2 = beta; without `noise`, the result is the mean. A respaced step has the beta of the
    whole step. Equation 2 of DiffDefense lacks the product in alpha bar; it is correct here.
    """
    alpha = alpha_bar / next_alpha_bar
    mean = (z - (1 - alpha) / math.sqrt(1 - alpha_bar) * predicted) / math.sqrt(alpha)
    return mean if noise is None else mean + math.sqrt(1 - alpha) * noise


def ddim_step(
    z: Tensor, predicted: Tensor, alpha_bar: float, next_alpha_bar: float, noise: Tensor | None
) -> Tensor:
    """Take one DDIM step from level `alpha_bar` to `next_alpha_bar` (Song et al. 2021, eq. 12).

    Without `noise` it is deterministic (eta = 0). With it, eta = 1, as in DiffDefense's code.
    """
    variance = 0.0
    if noise is not None:
        variance = (1 - next_alpha_bar) / (1 - alpha_bar) * (1 - alpha_bar / next_alpha_bar)
    start = (z - math.sqrt(1 - alpha_bar) * predicted) / math.sqrt(alpha_bar)
    mean = math.sqrt(next_alpha_bar) * start + math.sqrt(1 - next_alpha_bar - variance) * predicted
    return mean if noise is None else mean + math.sqrt(variance) * noise


@dataclass(frozen=True)
class ReverseProcess:
    """A reverse process: the indices that the network is given, the levels of z, and the step.

    `indices` and `alpha_bars` run from the most noise to the least. The last step leads to an image
    without noise (alpha bar = 1).
    """

    indices: list[int]
    alpha_bars: list[float]
    step: ReverseStep

    def run(self, network: Diffusion, z: Tensor, noise: Noise | None, checkpointed: bool) -> Tensor:
        """Return the end of the process from `z` (N,C,H,W); `noise`, if any, enters every step.

        `checkpointed` keeps no graph of the network, but allows first derivatives only.
        """
        step = partial(self._step, network, noise)
        if checkpointed:
            return descend(step, len(self.alpha_bars), (), (z,))[0]
        for index in range(len(self.alpha_bars)):
            (z,) = step(index, (), (z,))
        return z

    def _step(
        self, network: Diffusion, noise: Noise | None, index: int, constants: State, state: State
    ) -> State:
        (z,) = state
        # One index for all rows: the last bit of an embedding depends on its row in the batch.
        t = torch.full((1,), self.indices[index], device=z.device)
        last = index == len(self.alpha_bars) - 1
        next_alpha_bar = 1.0 if last else self.alpha_bars[index + 1]
        new_noise = None if noise is None or last else noise(f"step {index}")
        return (self.step(z, network(z, t), self.alpha_bars[index], next_alpha_bar, new_noise),)


def respaced_process(
    network: Diffusion, count: int, steps: int, step: ReverseStep
) -> ReverseProcess:
    """Return a reverse process of `steps` steps through the lowest `count` trained levels."""
    indices = respaced_indices(count, steps)
    return ReverseProcess(indices, network.alpha_bar[indices].tolist(), step)


def _time_embedding(steps: int) -> Tensor:
    """Return the embedding (T,TIME_FEATURES): sines and cosines of the index, ever slower."""
    rate = 10_000 ** (-torch.arange(0, TIME_FEATURES, 2, dtype=torch.float64) / TIME_FEATURES)
    phase = torch.arange(steps, dtype=torch.float64)[:, None] * rate
    return torch.stack([phase.sin(), phase.cos()], 2).flatten(1).float()
