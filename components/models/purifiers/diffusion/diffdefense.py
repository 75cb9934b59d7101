"""DiffDefense (Silva et al. 2023): fit the noise from which a diffusion model makes the image.

The model makes an image from noise z. A descent of L iterations from each of R random starts fits z
to the image; the best of the R reconstructions is the purified image. Paper and code differ so much
that there are three modes.

`released` is the authors' code. Its reverse process has its own linear schedule (1e-4 to 0.02 over
T* steps), draws new noise in every step and ends in a sigmoid. The descent treats the output of the
U-Net as a constant. Adam's rate jumps from 0.02 to about `rate`. The U-Net then has little
influence on the result: see the control `untrained_diffusion`.

`algorithm_1` is the paper's Algorithm 1: ancestral steps with new noise through the trained levels
T* to 1, the bare gradient through all of them, and a rate that decays from `rate`, to a tenth after
ceil(0.8 L) steps. The paper never prints the rate at the start. Our readings: equation 2 is Ho's
step (see `ddpm_step`), which draws no noise in the last step; t ends at 1, because the step from 0
would make z_(-1), and the algorithm takes z_0; the result is the image of iteration L, which no
step follows; pixels are clipped to [0,1].

`ddim` is neither paper nor code: T* DDIM steps without noise, spread over all trained levels, the
true gradient through all of them, and Adam at the constant `rate`. So z starts at the highest
level, where a network trained down to pure noise expects it.

In all modes the gradient of the purified image is exact and includes the U-Net. If a gradient is
needed, only the best start is computed again with a graph, because the choice of the start is
locally constant. Adam's first step is nearly a sign, so the gradient through it almost vanishes;
`algorithm_1` has no Adam.

Deviations: the loss is a mean over one image and one start, where the code takes the mean over all
starts of the batch; Adam's epsilon is inside the root.

Shapes: N batch, R starts, M rows (N with one start each, or N R), C channels, H W.
"""

from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from components.config import Config
from components.data.draws import NoiseStream
from components.data.image_set import Shape
from components.models.purifiers.contract import (
    Inference,
    Purifier,
    PurifierSection,
    StandIn,
    mean_squared_error,
)
from components.models.purifiers.descent import State, adam_direction, descend, gradient_at
from components.models.purifiers.diffusion.ddpm import (
    Ddpm,
    Diffusion,
    Noise,
    ReverseProcess,
    ddim_step,
    ddpm_step,
    linear_alpha_bar,
    respaced_process,
)


class DiffDefense(Inference):
    """Fit the noise in `iterations` (L) from `restarts` (R) starts, `steps` (T*) from the image.

    The authors' code has mode released, L = 4, R = 5, T* = 15 and rate 25. In mode algorithm_1,
    `steps` is also the trained level at which the process starts.
    """

    network_kinds: ClassVar[tuple[str, ...]] = ("ddpm",)

    kind: Literal["diffdefense"]
    mode: Literal["released", "algorithm_1", "ddim"]
    iterations: Annotated[int, Field(ge=1)]
    restarts: Annotated[int, Field(ge=1)]
    steps: Annotated[int, Field(ge=1)]
    rate: Annotated[float, Field(gt=0)]

    @model_validator(mode="after")
    def _descends(self) -> "DiffDefense":
        if self.mode != "ddim" and self.iterations < 2:
            raise ValueError(
                f"iterations: 1 is no descent in mode {self.mode}, which returns the image before "
                "the last step"
            )
        return self

    def stand_ins(self) -> tuple[StandIn, ...]:
        """Offer a descent of fewer iterations."""
        return ("short",)

    def stochastic(self) -> bool:
        """Say that it starts from noise."""
        return True

    def require_fit(self, model: Config) -> None:
        """Raise ValueError if `model` is not a ddpm or was trained on fewer than `steps` steps."""
        super().require_fit(model)
        assert isinstance(model, Ddpm)
        _require_steps(self.steps, model.steps)

    def wrap(self, network: nn.Module) -> "DiffDefensePurifier":
        """Return the purifier.

        Raises ValueError for a network that is not a ddpm or was trained on fewer than `steps`.
        """
        if not isinstance(network, Diffusion):
            raise ValueError("diffdefense needs a ddpm, which this model is not")
        _require_steps(self.steps, network.steps)
        modes = {"released": _Released, "algorithm_1": _Algorithm1, "ddim": _Ddim}
        return modes[self.mode](self, network)


class UntrainedDiffusion(PurifierSection):
    """DiffDefense on an untrained network: its accuracy is no merit of the diffusion model.

    `random` has the initial weights drawn from `seed`; `zero` predicts no noise at all.
    """

    kind: Literal["untrained_diffusion"]
    network: Ddpm
    inference: DiffDefense
    weights: Literal["random", "zero"]
    seed: int

    def stochastic(self) -> bool:
        """Say that the purifier draws noise."""
        return True

    def build(self, shape: Shape) -> Purifier:
        """Make the purifier; raise ValueError where `inference` does not fit `network`."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            network = self.network.build(shape)
        if self.weights == "zero":
            for parameter in network.last.parameters():
                nn.init.zeros_(parameter)
        return self.inference.wrap(network)


class DiffDefensePurifier(Purifier):
    """The starts and the choice of the best one, which all modes share.

    The stand-in takes `short` iterations from the start that is best after `selection` iterations.
    """

    stochastic = True

    def __init__(self, config: DiffDefense, network: Diffusion, short: int, selection: int) -> None:
        super().__init__()
        self.config, self.network = config, network
        self.short = min(short, config.iterations)
        self.selection = min(selection, config.iterations)
        self.stand_ins = config.stand_ins()

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        """Return the reconstruction from the best start."""
        return self._best(x, stream, self.config.iterations, self.config.iterations)

    def stand_in(self, kind: StandIn, x: Tensor, stream: NoiseStream | None) -> Tensor:
        """Return the best start's reconstruction after fewer iterations, at the same rates.

        The derivative from another start would say nothing about the best one.
        """
        return self._best(x, stream, self.selection, self.short)

    def compute_detector_score(
        self, x: Tensor, stream: NoiseStream | None, purified: Tensor | None
    ) -> Tensor:
        """Return the mean squared reconstruction error, averaged over the starts (N,)."""
        assert stream is not None
        errors = []
        # One start at a time: a graph of all starts needs R times the memory.
        for restart in range(self.config.restarts):
            starts = torch.full((len(x),), restart, device=x.device)
            images = self.reconstruct(x, stream, starts, self.config.iterations)
            errors.append(mean_squared_error(images, x))
        return torch.stack(errors).mean(0)

    def reconstruct(
        self, x: Tensor, stream: NoiseStream, starts: Tensor, iterations: int
    ) -> Tensor:
        """Return the reconstructions of `x` (M,C,H,W), each from its own start (M,) int64."""
        return self._fit(x, _noise_per_start(stream, starts, x), iterations)

    def _best(
        self, x: Tensor, stream: NoiseStream | None, selection: int, iterations: int
    ) -> Tensor:
        """Choose the best start after `selection` iterations; return its image after `iterations`.

        The graph, if any, holds the chosen start only.
        """
        assert stream is not None
        rows = torch.arange(len(x), device=x.device)
        repeated = rows.repeat_interleave(self.config.restarts)
        starts = torch.arange(self.config.restarts, device=x.device).repeat(len(x))
        with torch.no_grad():
            images = self.reconstruct(x[repeated], stream[repeated], starts, selection)
            images = images.view(len(x), -1, *x.shape[1:])
            best = (images - x[:, None]).square().flatten(2).mean(2).argmin(1)
        if selection != iterations or (torch.is_grad_enabled() and x.requires_grad):
            return self.reconstruct(x, stream, best, iterations)
        chosen: Tensor = images[rows, best]
        return chosen

    def _fit(self, x: Tensor, noise: Noise, iterations: int) -> Tensor:
        """Return the reconstruction in [0,1] of each row of `x` (M,C,H,W)."""
        raise NotImplementedError


class _Released(DiffDefensePurifier):
    def __init__(self, config: DiffDefense, network: Diffusion) -> None:
        # Three iterations take two steps. One step would be Adam's first, whose derivative almost
        # vanishes. The start that is best by then is the best in the end.
        super().__init__(config, network, short=3, selection=3)
        # The network is given index t of its own schedule, although the level of z is another.
        indices = list(range(config.steps))[::-1]
        alpha_bars: list[float] = linear_alpha_bar(config.steps, 1e-4, 0.02)[indices].tolist()
        # The last step is DDIM's, where the code has an ancestral one: both return the same image.
        self.process = ReverseProcess(indices, alpha_bars, ddim_step)

    def _fit(self, x: Tensor, noise: Noise, iterations: int) -> Tensor:
        z = noise("start")
        moments: State = (torch.zeros_like(z),) * 2
        size = z[0].numel()
        for index in range(iterations - 1):
            image = self._generate(z, noise, index)
            # With the U-Net's output as a constant, the process is linear in z, and the factors of
            # its steps multiply to 1 / sqrt(alpha bar) of the first.
            root = self.process.alpha_bars[0] ** 0.5
            gradient = 2 / size * (image - x) * image * (1 - image) / root
            direction, moments = adam_direction(gradient, moments, index, (0.5, 0.999))
            rate = released_learning_rate(index, self.config.iterations, self.config.rate)
            z = z - rate * direction
        # The code returns the image from before the last step of the descent.
        return self._generate(z, noise, iterations - 1)

    def _generate(self, z: Tensor, noise: Noise, iteration: int) -> Tensor:
        own = _noise_of_iteration(noise, iteration)
        # The sigmoid is in the code, but not in the paper.
        return torch.sigmoid(self.process.run(self.network, z, own, True))


class _Algorithm1(DiffDefensePurifier):
    def __init__(self, config: DiffDefense, network: Diffusion) -> None:
        short = max(2, config.iterations // 3)
        super().__init__(config, network, short=short, selection=config.iterations)
        self.process = respaced_process(network, config.steps, config.steps, ddpm_step)

    def _fit(self, x: Tensor, noise: Noise, iterations: int) -> Tensor:
        last = iterations - 1
        (z,) = descend(partial(self._step, noise), last, (x,), (noise("start"),))
        return self._generate(z, noise, last, checkpointed=True).clamp(0, 1)

    def _step(self, noise: Noise, index: int, constants: State, state: State) -> State:
        (x,), (z,) = constants, state
        checkpointed = not torch.is_grad_enabled()  # see `_Ddim`

        def error(at: Tensor) -> Tensor:
            return mean_squared_error(self._generate(at, noise, index, checkpointed), x)

        rate = _decayed(self.config.rate, index + 1, self.config.iterations)
        return (z - rate * gradient_at(error, z),)

    def _generate(self, z: Tensor, noise: Noise, iteration: int, checkpointed: bool) -> Tensor:
        own = _noise_of_iteration(noise, iteration)
        return self.network.decode(self.process.run(self.network, z, own, checkpointed))


class _Ddim(DiffDefensePurifier):
    def __init__(self, config: DiffDefense, network: Diffusion) -> None:
        # Here the best start is not known before the end of the descent.
        short = max(2, config.iterations // 3)
        super().__init__(config, network, short=short, selection=config.iterations)
        self.process = respaced_process(network, network.steps, config.steps, ddim_step)

    def _fit(self, x: Tensor, noise: Noise, iterations: int) -> Tensor:
        start = noise("start")
        state = (start, torch.zeros_like(start), torch.zeros_like(start))
        z, *_ = descend(self._step, iterations, (x,), state)
        return self._generate(z, checkpointed=True).clamp(0, 1)

    def _step(self, index: int, constants: State, state: State) -> State:
        (x,), (z, *moments) = constants, state
        # With gradients enabled, the gradient of this step is itself differentiated, which a
        # checkpointed process does not allow.
        checkpointed = not torch.is_grad_enabled()

        def error(at: Tensor) -> Tensor:
            return mean_squared_error(self._generate(at, checkpointed), x)

        direction, moments_after = adam_direction(
            gradient_at(error, z), tuple(moments), index, (0.9, 0.999)
        )
        return z - self.config.rate * direction, *moments_after

    def _generate(self, z: Tensor, checkpointed: bool) -> Tensor:
        return self.network.decode(self.process.run(self.network, z, None, checkpointed))


def _require_steps(steps: int, trained: int) -> None:
    if steps > trained:
        raise ValueError(f"diffdefense takes {steps} steps of a ddpm that was trained on {trained}")


def released_learning_rate(index: int, iterations: int, rate: float) -> float:
    """Return the learning rate of the authors' code for step `index` (from 0) of L `iterations`.

    It is 0.02 first, and then `rate` with exponential decay, to a tenth after ceil(0.8 L) steps.
    """
    return 0.02 if index == 0 else _decayed(rate, index, iterations)


def _decayed(rate: float, steps: int, iterations: int) -> float:
    """Return `rate` after `steps` steps of its decay, which divides it by ten in ceil(0.8 L)."""
    decayed: float = rate * 0.1 ** (steps / -(-4 * iterations // 5))
    return decayed


def _noise_of_iteration(noise: Noise, iteration: int) -> Noise:
    """Return the part of `noise` that one iteration of a descent draws."""
    return lambda use: noise(f"iteration {iteration} {use}")


def _noise_per_start(stream: NoiseStream, starts: Tensor, like: Tensor) -> Noise:
    """Return the noise of rows `like` (M,C,H,W), keyed by the start (M,) of each and by its use."""
    shape = tuple(like.shape[1:])
    groups = [(start, (starts == start).nonzero()[:, 0]) for start in sorted(set(starts.tolist()))]

    def noise(use: str) -> Tensor:
        made = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        for start, rows in groups:
            made[rows] = stream[rows].normal(shape, f"start {start} {use}").to(like.dtype)
        return made

    return noise
