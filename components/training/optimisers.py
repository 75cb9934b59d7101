"""The optimisers that a training can name: SGD, Adam and AdamW.

A section says all of its settings, as in `{kind: sgd, momentum: 0.9, nesterov: false}`. A bare name
stands for the settings in `NAMED`.
"""

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BeforeValidator, Field, PlainSerializer, model_validator
from torch import nn

from components.config import Config

Fraction = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[list[Fraction], Field(min_length=2, max_length=2)]
NAMED: dict[str, dict[str, Any]] = {
    "adam": {"kind": "adam", "betas": [0.9, 0.999]},
    "adamw": {"kind": "adamw", "betas": [0.9, 0.999]},
    "sgd": {"kind": "sgd", "momentum": 0.9, "nesterov": True},
}


class Sgd(Config):
    """SGD with momentum, Nesterov's or the classical one."""

    kind: Literal["sgd"]
    momentum: Fraction
    nesterov: bool

    @model_validator(mode="after")
    def _needs_momentum(self) -> Self:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: true needs a momentum above 0")
        return self

    def build(self, parameters: Iterable[nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
        """Make the optimiser with the settings that all kinds share."""
        return torch.optim.SGD(
            parameters, momentum=self.momentum, nesterov=self.nesterov, **settings
        )


class Adam(Config):
    """Adam (Kingma and Ba 2015); `betas` are the decays of its two moments."""

    kind: Literal["adam"]
    betas: Betas

    def build(self, parameters: Iterable[nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
        """Make the optimiser with the settings that all kinds share."""
        return torch.optim.Adam(parameters, betas=(self.betas[0], self.betas[1]), **settings)


class AdamW(Config):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    kind: Literal["adamw"]
    betas: Betas

    def build(self, parameters: Iterable[nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
        """Make the optimiser with the settings that all kinds share."""
        return torch.optim.AdamW(parameters, betas=(self.betas[0], self.betas[1]), **settings)


def _settings_of(given: Any) -> Any:
    return NAMED.get(given, {"kind": given}) if isinstance(given, str) else given


def _shortest(section: Config) -> Any:
    """Return the name of a section that has one, so that what is written is what was read."""
    settings = section.model_dump()
    return next((name for name, named in NAMED.items() if named == settings), settings)


Optimiser = Annotated[
    Sgd | Adam | AdamW,
    Field(discriminator="kind"),
    BeforeValidator(_settings_of),
    PlainSerializer(_shortest),
]
