"""A small denoising diffusion model (Ho et al. 2020), the network of DiffDefense (Silva et al.).

The U-Net is that of the authors' code for 28 x 28 (three levels of `width`, 2 and 4 `width`
channels), for other shapes by one rule: sides are padded with zeros to a multiple of 8 at the
entry, and the last convolution, unpadded, is as large as it takes to crop them back. Its time
table has sines in even and cosines in odd columns (Vaswani et al. 2017, section 3.5), where the
authors' code overwrites part of it.

Layout: everything inside is channels last, and so are the weights of the layer norms, (H,W,C):
the same numbers, in half the time on a CPU.

Also here: the schedule, the two steps back, and the way back made of them. What trains the
network is elsewhere. Shapes: N batch, C channels, H W, T trained steps. Indices t go from 0 (least
noise) to T-1; `bar` is the share of the signal's variance, alpha bar in Ho et al.
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

from components.config import Config
from components.data.image_set import Shape
from components.models.purifiers.descent import State, descend

# Columns of the time table, as in the authors' code.
TIMES = 100

Beta = Annotated[float, Field(gt=0, lt=1)]
Noise = Callable[[str], Tensor]  # a use -> standard normal noise for all rows (N,C,H,W)
# z, predicted noise, bar here, bar where the step leads, new noise -> z there
Move = Callable[[Tensor, Tensor, float, float, Tensor | None], Tensor]


class Ddpm(Config):
    """A U-Net of `width` for `steps` of noise, of variance `beta_start` to `beta_end`, linearly.

    The paper's: width 10, steps 100, 1e-5 to 0.02, images as they are, the input normalised.
    `centred` sees images as 2x - 1. `norm_input` normalises the noisy image before anything else,
    which hides how noisy it is: the index alone says so then.
    """

    kind: Literal["ddpm"]
    width: Annotated[int, Field(ge=1)]
    steps: Annotated[int, Field(ge=1)]
    beta_start: Beta
    beta_end: Beta
    centred: bool
    norm_input: bool

    def build(self, shape: Shape) -> "Diffusion":
        """Make the untrained network; any shape will do."""
        return Diffusion(self, shape)


class Diffusion(nn.Module):
    """The noise in an image: z (N,C,H,W) and indices t (N,) int64 to the noise (N,C,H,W) in z.

    A single index (1,) is that of all images.
    """

    alpha_bar: Tensor
    times: Tensor

    def __init__(self, config: Ddpm, shape: Shape) -> None:
        super().__init__()
        self.steps, self.centred = config.steps, config.centred
        bars = linear_alpha_bar(config.steps, config.beta_start, config.beta_end)
        self.register_buffer("alpha_bar", bars, persistent=False)
        self.register_buffer("times", _time_table(config.steps), persistent=False)
        channels, width = shape[0], config.width
        spare = [-side % 8 for side in shape[1:]]
        # As F.pad wants it: left, right, top, bottom.
        self.margin = [share for more in spare[::-1] for share in (more // 2, more - more // 2)]
        high, wide = (side + more for side, more in zip(shape[1:], spare, strict=True))
        sides = [(high // k, wide // k) for k in (1, 2, 4, 8)]
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
        self.last = nn.Conv2d(width, channels, (spare[0] + 1, spare[1] + 1))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """Return the noise predicted in `z`, which is in the space of `encode`."""
        time, skips = self.times[t], []
        feature = self.entry(F.pad(z, self.margin))
        for level, fall in zip(self.downs, self.falls, strict=True):
            feature = level(feature, time)
            skips.append(feature)
            feature = fall(feature)
        feature = self.middle(feature, time)
        for rise, level in zip(self.rises, self.ups, strict=True):
            feature = level(torch.cat([rise(feature), skips.pop()], 1), time)
        predicted: Tensor = self.last(feature)
        return predicted

    def encode(self, x: Tensor) -> Tensor:
        """Return pixels in [0,1] as the network sees images."""
        return 2 * x - 1 if self.centred else x

    def decode(self, z: Tensor) -> Tensor:
        """Return what the network sees as pixels; clipping them to [0,1] is for the caller."""
        return (z + 1) / 2 if self.centred else z


class _Level(nn.Module):
    """Three times layer norm, convolution and SiLU, after the time is added to the channels."""

    def __init__(
        self, channels: tuple[int, int, int, int], sides: tuple[int, int], norm_input: bool = True
    ) -> None:
        super().__init__()
        first = channels[0]
        self.time = nn.Sequential(nn.Linear(TIMES, first), nn.SiLU(), nn.Linear(first, first))
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
    """Layer norm over (C,H,W), computed over (H,W,C), as the features lie in memory."""

    def __init__(self, channels: int, sides: tuple[int, int]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm((*sides, channels))

    def forward(self, feature: Tensor) -> Tensor:
        normed: Tensor = self.norm(feature.permute(0, 2, 3, 1))
        return normed.permute(0, 3, 1, 2)


def linear_alpha_bar(steps: int, beta_start: float, beta_end: float) -> Tensor:
    """Return the products of 1 - beta (steps,) float64, beta linear in the index."""
    betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
    return (1 - betas).cumprod(0)


def respaced(count: int, steps: int) -> list[int]:
    """Return `steps` of the indices 0..count-1, evenly spaced, from count-1 down."""
    assert 1 <= steps <= count
    return [count * (index + 1) // steps - 1 for index in reversed(range(steps))]


def noised(start: Tensor, noise: Tensor, bar: float) -> Tensor:
    """Return `start` with `noise` in the proportion `bar` says (Ho et al. 2020, eq. 4)."""
    return math.sqrt(bar) * start + math.sqrt(1 - bar) * noise


def ancestral(z: Tensor, eps: Tensor, bar: float, before: float, noise: Tensor | None) -> Tensor:
    """Take one step back from level `bar` to `before` (Ho et al. 2020, algorithm 2).

    sigma^2 = beta; without `noise`, the mean. Equation 2 of DiffDefense has lost the product in
    alpha bar; here it is in its place. Respaced, beta is that of the whole step.
    """
    alpha = bar / before
    mean = (z - (1 - alpha) / math.sqrt(1 - bar) * eps) / math.sqrt(alpha)
    return mean if noise is None else mean + math.sqrt(1 - alpha) * noise


def ddim(z: Tensor, eps: Tensor, bar: float, before: float, noise: Tensor | None) -> Tensor:
    """Take one step back from level `bar` to `before` (Song et al. 2021, eq. 12).

    Without `noise` it is deterministic (eta = 0); with it, eta = 1, the step of DiffDefense's code.
    """
    variance = 0.0 if noise is None else (1 - before) / (1 - bar) * (1 - bar / before)
    start = (z - math.sqrt(1 - bar) * eps) / math.sqrt(bar)
    mean = math.sqrt(before) * start + math.sqrt(1 - before - variance) * eps
    return mean if noise is None else mean + math.sqrt(variance) * noise


@dataclass(frozen=True)
class Way:
    """A way back: the indices the network is shown, the levels it stands at, and the step.

    Both run from the most noise to the least; the last step leads to no noise (bar = 1).
    """

    indices: list[int]
    bars: list[float]
    move: Move

    def back(self, network: Diffusion, z: Tensor, noise: Noise | None, replayed: bool) -> Tensor:
        """Return where the way leads from `z` (N,C,H,W); `noise`, if any, enters every step.

        `replayed` keeps no graph of the network, but allows a first derivative only.
        """
        step = partial(self._step, network, noise)
        if replayed:
            return descend(step, len(self.bars), (), (z,))[0]
        for index in range(len(self.bars)):
            (z,) = step(index, (), (z,))
        return z

    def _step(
        self, network: Diffusion, noise: Noise | None, index: int, constants: State, state: State
    ) -> State:
        (z,) = state
        # Once for all rows: the time network's last bit hangs on where a row stands in the batch.
        t = torch.full((1,), self.indices[index], device=z.device)
        last = index == len(self.bars) - 1
        before = 1.0 if last else self.bars[index + 1]
        grain = None if noise is None or last else noise(f"step {index}")
        return (self.move(z, network(z, t), self.bars[index], before, grain),)


def trained_way(network: Diffusion, count: int, steps: int, move: Move) -> Way:
    """Return the way back in `steps` steps through the lowest `count` trained levels."""
    indices = respaced(count, steps)
    return Way(indices, network.alpha_bar[indices].tolist(), move)


def _time_table(steps: int) -> Tensor:
    """Return sines and cosines (T,TIMES) of the index, slower from column pair to column pair."""
    pace = 10_000 ** (-torch.arange(0, TIMES, 2, dtype=torch.float64) / TIMES)
    phase = torch.arange(steps, dtype=torch.float64)[:, None] * pace
    return torch.stack([phase.sin(), phase.cos()], 2).flatten(1).float()
