"""Diffuse and denoise, in the manner of DiffPure (Nie et al. 2022): noise the image, go back.

Our small stand-in: a discrete DDPM, a few respaced steps back and a U-Net of DiffDefense's size,
where DiffPure integrates a stochastic differential equation in some hundred steps through a network
of 10^8 parameters. What is measured here says nothing of DiffPure's figures, nor they of it. The
gradient is exact, each step being replayed, where DiffPure's adjoint approximates it.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from components.config import Config
from components.data.draws import Draws
from components.models.purifiers.contract import Inference, Purifier, StandIn
from components.models.purifiers.diffusion.ddpm import (
    Ddpm,
    Diffusion,
    Way,
    ancestral,
    ddim,
    noised,
    trained_way,
)


class DiffPure(Inference):
    """Noise the image to the trained index `t_star` and go back in `substeps` steps.

    `ddpm` draws new noise in every step but the last, `ddim` draws none.
    """

    network_kinds: ClassVar[tuple[str, ...]] = ("ddpm",)

    kind: Literal["diffpure"]
    t_star: Annotated[int, Field(ge=0)]
    sampler: Literal["ddpm", "ddim"]
    substeps: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _fits(self) -> "DiffPure":
        if self.substeps > self.t_star + 1:
            raise ValueError(
                f"substeps: {self.substeps}, but from index {self.t_star} there are at most "
                f"{self.t_star + 1}"
            )
        return self

    def stand_ins(self) -> tuple[StandIn, ...]:
        """Fewer steps can stand in for all."""
        return ("short",)

    def require_fit(self, model: Config) -> None:
        """Raise ValueError where the ddpm has seen less noise than `t_star` asks for."""
        super().require_fit(model)
        assert isinstance(model, Ddpm)
        _reached(self.t_star, model.steps)

    def wrap(self, network: nn.Module) -> Purifier:
        """Return the purifier; raise ValueError for a network that is no ddpm, or has seen less
        noise than `t_star` asks for.
        """
        if not isinstance(network, Diffusion):
            raise ValueError("diffpure goes back by a ddpm, which this model is not")
        _reached(self.t_star, network.steps)
        return _DiffPure(self, network)


class _DiffPure(Purifier):
    stochastic = True

    def __init__(self, config: DiffPure, network: Diffusion) -> None:
        super().__init__()
        self.network, self.stand_ins = network, config.stand_ins()
        self.random = config.sampler == "ddpm"
        move = ancestral if self.random else ddim
        count = config.t_star + 1
        self.way = trained_way(network, count, config.substeps, move)
        self.short = trained_way(network, count, max(1, config.substeps // 3), move)

    def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
        return self._there_and_back(x, draws, self.way)

    def stand_in(self, kind: StandIn, x: Tensor, draws: Draws | None) -> Tensor:
        return self._there_and_back(x, draws, self.short)

    def _there_and_back(self, x: Tensor, draws: Draws | None, way: Way) -> Tensor:
        assert draws is not None

        def noise(use: str) -> Tensor:
            return draws.normal(tuple(x.shape[1:]), use).to(x.dtype)

        z = noised(self.network.encode(x), noise("start"), way.bars[0])
        end = way.back(self.network, z, noise if self.random else None, replayed=True)
        return self.network.decode(end).clamp(0, 1)


def _reached(t_star: int, steps: int) -> None:
    if t_star >= steps:
        raise ValueError(f"t_star: {t_star}, but the ddpm knows indices 0 to {steps - 1}")
