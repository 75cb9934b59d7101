"""DiffDefense (Silva et al. 2023): the nearest image that a diffusion model makes of some noise.

The noise z from which the model draws an image is fitted to the image by L descents from R random
starts; the best of the R images is the purified one. Paper and code differ so much that there are
two modes:

released: what the code does. Its way back has a linear schedule of its own (1e-4 to 0.02 over T*
steps) and new noise in every step, ends in a sigmoid, and is differentiated as if the U-Net's
answers were constants; Adam's rate leaps from 0.02 to about `rate`. Little of the image then
hangs on the U-Net: see `untrained_diffusion`, the control.

faithful: what the paper says, with what it takes to work: T* respaced DDIM steps of the trained
schedule, the true gradient through all of them, Adam at the constant `rate`; the paper's bare
descent would move no pixel at its own settings.

Either way the purified image is differentiated exactly, all of the U-Net included; where a
derivative is wanted, only the best start is gone through again, the choice of it being locally
constant. Adam's first step is nearly a sign, so the derivative through it all but vanishes.

Deviations: the loss is the mean over one image of one start, where the code takes it over the
batch's starts; Adam's root holds its epsilon inside.

Shapes: N batch, R starts, M rows (N of one start each, or N R), C channels, H W.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from components.config import Config
from components.data.draws import Draws
from components.data.image_set import Shape
from components.models.purifiers.contract import Inference, Purifier, StandIn
from components.models.purifiers.descent import State, adam, descend, slope
from components.models.purifiers.diffusion.ddpm import (
    Ddpm,
    Diffusion,
    Noise,
    Way,
    ddim,
    linear_alpha_bar,
    trained_way,
)


class DiffDefense(Inference):
    """Fit the noise in `iterations` (L) from `restarts` (R) starts, `steps` (T*) from the image.

    The authors' code: released, 4, 5, 15 and rate 25.
    """

    network_kinds: ClassVar[tuple[str, ...]] = ("ddpm",)

    kind: Literal["diffdefense"]
    mode: Literal["released", "faithful"]
    iterations: Annotated[int, Field(ge=1)]
    restarts: Annotated[int, Field(ge=1)]
    steps: Annotated[int, Field(ge=1)]
    rate: Annotated[float, Field(gt=0)]

    @model_validator(mode="after")
    def _descends(self) -> "DiffDefense":
        if self.mode == "released" and self.iterations < 2:
            raise ValueError("iterations: 1 is no descent where the image precedes the last step")
        return self

    def stand_ins(self) -> tuple[StandIn, ...]:
        """Fewer iterations can stand in for all."""
        return ("short",)

    def require_fit(self, model: Config) -> None:
        """Raise ValueError where the ddpm has seen fewer steps than are to be taken."""
        super().require_fit(model)
        assert isinstance(model, Ddpm)
        _reached(self.steps, model.steps)

    def wrap(self, network: nn.Module) -> Purifier:
        """Return the purifier; raise ValueError for a network that is no ddpm, or has seen fewer
        steps than it is to take.
        """
        if not isinstance(network, Diffusion):
            raise ValueError("diffdefense fits the noise of a ddpm, which this model is not")
        _reached(self.steps, network.steps)
        return (_Released if self.mode == "released" else _Faithful)(self, network)


class UntrainedDiffusion(Config):
    """DiffDefense on a network nobody trained: its merit can not be that of the diffusion model.

    `random` has the weights it starts from, drawn with `seed`; `zero` predicts no noise at all.
    """

    kind: Literal["untrained_diffusion"]
    network: Ddpm
    inference: DiffDefense
    weights: Literal["random", "zero"]
    seed: int

    def build(self, shape: Shape) -> Purifier:
        """Make the purifier; raise ValueError where `inference` does not fit `network`."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            network = self.network.build(shape)
        if self.weights == "zero":
            for parameter in network.last.parameters():
                nn.init.zeros_(parameter)
        return self.inference.wrap(network)


class _DiffDefense(Purifier):
    """What both modes share: the starts and the choice among them."""

    stochastic = True

    def __init__(self, config: DiffDefense, network: Diffusion, short: int, judged: int) -> None:
        super().__init__()
        self.config, self.network = config, network
        self.short, self.judged = min(short, config.iterations), min(judged, config.iterations)
        self.stand_ins = config.stand_ins()

    def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
        return self._best(x, draws, self.config.iterations, self.config.iterations)

    def stand_in(self, kind: StandIn, x: Tensor, draws: Draws | None) -> Tensor:
        # At the same rates, and from the best start: another's derivative says nothing of it.
        return self._best(x, draws, self.judged, self.short)

    def compute_detector_score(self, x: Tensor, draws: Draws | None, purified: Tensor | None) -> Tensor:
        """Return the mean squared error of what is made, averaged over the starts (N,)."""
        assert draws is not None
        errors = []
        # One start at a time: a graph of all starts at once takes R times the memory.
        for restart in range(self.config.restarts):
            starts = torch.full_like(draws.ids, restart)
            made = self._from(x, draws, starts, self.config.iterations)
            errors.append((made - x).square().flatten(1).mean(1))
        return torch.stack(errors).mean(0)

    def _best(self, x: Tensor, draws: Draws | None, judged: int, iterations: int) -> Tensor:
        """Return the image of the start that is best after `judged` iterations, after `iterations`.

        There is a graph from that start alone.
        """
        assert draws is not None
        rows = torch.arange(len(x), device=x.device)
        every = rows.repeat_interleave(self.config.restarts)
        starts = torch.arange(self.config.restarts, device=x.device).repeat(len(x))
        with torch.no_grad():
            made = self._from(x[every], draws[every], starts, judged)
            made = made.view(len(x), -1, *x.shape[1:])
            best = (made - x[:, None]).square().flatten(2).mean(2).argmin(1)
        if judged != iterations or (torch.is_grad_enabled() and x.requires_grad):
            return self._from(x, draws, best, iterations)
        chosen: Tensor = made[rows, best]
        return chosen

    def _from(self, x: Tensor, draws: Draws, starts: Tensor, iterations: int) -> Tensor:
        """Return what is made of rows (M,C,H,W), each of which has its own start (M,)."""
        return self._fitted(x, _noise(draws, starts, x), iterations)

    def _fitted(self, x: Tensor, noise: Noise, iterations: int) -> Tensor:
        """Return the image in [0,1] fitted to each row of `x`."""
        raise NotImplementedError


class _Released(_DiffDefense):
    def __init__(self, config: DiffDefense, network: Diffusion) -> None:
        # One descent is Adam's first, whose derivative all but vanishes. The best of the starts is
        # the best so early already.
        super().__init__(config, network, short=3, judged=3)
        # The network is shown index t of its own schedule, yet stands at another level.
        indices = list(range(config.steps))[::-1]
        bars: list[float] = linear_alpha_bar(config.steps, 1e-4, 0.02)[indices].tolist()
        # Its last step, an ancestral one in the code, is DDIM's: both leave what z is made of.
        self.way = Way(indices, bars, ddim)

    def _fitted(self, x: Tensor, noise: Noise, iterations: int) -> Tensor:
        z = noise("start")
        moments: State = (torch.zeros_like(z),) * 2
        size = z[0].numel()
        for index in range(iterations - 1):
            made = self._made(z, noise, index)
            # With the U-Net's answers for constants the way is linear in z, and the factors of its
            # steps multiply to 1 / sqrt(bar) of the first.
            gradient = 2 / size * (made - x) * made * (1 - made) / self.way.bars[0] ** 0.5
            way, moments = adam(gradient, moments, index, (0.5, 0.999))
            z = z - released_rate(index, self.config.iterations, self.config.rate) * way
        # The code hands out what it made before the last step of the descent.
        return self._made(z, noise, iterations - 1)

    def _made(self, z: Tensor, noise: Noise, iteration: int) -> Tensor:
        end = self.way.back(
            self.network, z, lambda use: noise(f"iteration {iteration} {use}"), replayed=True
        )
        # The paper knows no sigmoid.
        return torch.sigmoid(end)


class _Faithful(_DiffDefense):
    def __init__(self, config: DiffDefense, network: Diffusion) -> None:
        # Which start ends best does not show early here.
        short = max(2, config.iterations // 3)
        super().__init__(config, network, short=short, judged=config.iterations)
        self.way = trained_way(network, network.steps, config.steps, ddim)

    def _fitted(self, x: Tensor, noise: Noise, iterations: int) -> Tensor:
        start = noise("start")
        state = (start, torch.zeros_like(start), torch.zeros_like(start))
        z, *_ = descend(self._step, iterations, (x,), state)
        return self._made(z, replayed=True).clamp(0, 1)

    def _step(self, index: int, constants: State, state: State) -> State:
        (x,), (z, *moments) = constants, state
        # With gradients on this step will be differentiated as well, its slope a second time.
        replayed = not torch.is_grad_enabled()
        gradient = slope(lambda at: (self._made(at, replayed) - x).square().flatten(1).mean(1), z)
        way, after = adam(gradient, tuple(moments), index, (0.9, 0.999))
        return z - self.config.rate * way, *after

    def _made(self, z: Tensor, replayed: bool) -> Tensor:
        return self.network.decode(self.way.back(self.network, z, None, replayed))


def _reached(steps: int, trained: int) -> None:
    if steps > trained:
        raise ValueError(f"diffdefense goes back {steps} steps of a ddpm that has {trained}")


def released_rate(index: int, iterations: int, rate: float) -> float:
    """Return the rate of step `index` (from 0) of the code: 0.02, then a decay of its own."""
    # A tenth after ceil(0.8 L) steps, and on.
    return 0.02 if index == 0 else rate * 0.1 ** (index / -(-4 * iterations // 5))


def _noise(draws: Draws, starts: Tensor, like: Tensor) -> Noise:
    """Return the noise of rows `like` (M,C,H,W), named by the start (M,) of each and by its use."""
    shape = tuple(like.shape[1:])
    groups = [(start, (starts == start).nonzero()[:, 0]) for start in sorted(set(starts.tolist()))]

    def noise(use: str) -> Tensor:
        made = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        for start, rows in groups:
            made[rows] = draws[rows].normal(shape, f"start {start} {use}").to(like.dtype)
        return made

    return noise
