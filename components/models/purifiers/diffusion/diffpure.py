"""DiffPure-style purification (Nie et al. 2022): add noise to the image, then denoise it.

This is a small substitute for DiffPure: a discrete DDPM, a few respaced reverse steps and a U-Net
of DiffDefense's size. DiffPure integrates a stochastic differential equation in some hundred steps
through a network of 10^8 parameters, so results here say nothing about DiffPure's, or vice versa.
The gradient is exact, because every step is recomputed; DiffPure's adjoint approximates it.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from components.config import Config
from components.data.draws import NoiseStream
from components.models.purifiers.contract import Inference, Purifier, StandIn
from components.models.purifiers.diffusion.ddpm import (
    Ddpm,
    Diffusion,
    ReverseProcess,
    add_noise,
    ddim_step,
    ddpm_step,
    respaced_process,
)


class DiffPure(Inference):
    """Add the noise of the trained index `t_star`, then denoise in `substeps` steps.

    `ddpm` draws new noise in every step except the last, `ddim` draws none.
    """

    network_kinds: ClassVar[tuple[str, ...]] = ("ddpm",)

    kind: Literal["diffpure"]
    t_star: Annotated[int, Field(ge=0)]
    sampler: Literal["ddpm", "ddim"]
    substeps: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _at_most_one_step_per_index(self) -> "DiffPure":
        if self.substeps > self.t_star + 1:
            raise ValueError(
                f"substeps: {self.substeps}, but from index {self.t_star} there are at most "
                f"{self.t_star + 1}"
            )
        return self

    def stand_ins(self) -> tuple[StandIn, ...]:
        """Offer a process of fewer steps."""
        return ("short",)

    def stochastic(self) -> bool:
        """Say that it starts from noise."""
        return True

    def require_fit(self, model: Config) -> None:
        """Raise ValueError if `model` is not a ddpm or was not trained up to `t_star`."""
        super().require_fit(model)
        assert isinstance(model, Ddpm)
        _require_trained_index(self.t_star, model.steps)

    def wrap(self, network: nn.Module) -> Purifier:
        """Return the purifier.

        Raises ValueError for a network that is not a ddpm or was not trained up to `t_star`.
        """
        if not isinstance(network, Diffusion):
            raise ValueError("diffpure needs a ddpm, which this model is not")
        _require_trained_index(self.t_star, network.steps)
        return _DiffPure(self, network)


class _DiffPure(Purifier):
    stochastic = True

    def __init__(self, config: DiffPure, network: Diffusion) -> None:
        super().__init__()
        self.network, self.stand_ins = network, config.stand_ins()
        self.noise_in_steps = config.sampler == "ddpm"
        step = ddpm_step if self.noise_in_steps else ddim_step
        count = config.t_star + 1
        self.process = respaced_process(network, count, config.substeps, step)
        self.short = respaced_process(network, count, max(1, config.substeps // 3), step)

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        return self._diffuse_and_denoise(x, stream, self.process)

    def stand_in(self, kind: StandIn, x: Tensor, stream: NoiseStream | None) -> Tensor:
        return self._diffuse_and_denoise(x, stream, self.short)

    def _diffuse_and_denoise(
        self, x: Tensor, stream: NoiseStream | None, process: ReverseProcess
    ) -> Tensor:
        assert stream is not None

        def noise(use: str) -> Tensor:
            return stream.normal(tuple(x.shape[1:]), use).to(x.dtype)

        z = add_noise(self.network.encode(x), noise("start"), process.alpha_bars[0])
        end = process.run(self.network, z, noise if self.noise_in_steps else None, True)
        return self.network.decode(end).clamp(0, 1)


def _require_trained_index(t_star: int, steps: int) -> None:
    if t_star >= steps:
        raise ValueError(f"t_star: {t_star}, but the ddpm was trained on indices 0 to {steps - 1}")
