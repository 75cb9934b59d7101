"""Purifiers: one module per family, and here the unions of all their kinds.

This is the one place where a new purifier is registered: import its section and add it to a union.
`PurifierConfig` lists the networks that can be built and trained; all except `ddpm` and `gan` are
purifiers by themselves. `InferenceConfig` lists the ways to use a trained network as a purifier.
`ControlConfig` lists the purifiers that need no training; `PurifierConfig` has them too.
"""

from typing import Annotated

from pydantic import Field

from components.models.purifiers.apudae import Apudae
from components.models.purifiers.autoencoder import ConvAutoencoder
from components.models.purifiers.contract import Inference, Purifier
from components.models.purifiers.controls import (
    BitDepth,
    GaussianNoise,
    Identity,
    Median,
    RandomNetwork,
    Threshold,
)
from components.models.purifiers.denoiser import Denoiser, RedNet
from components.models.purifiers.diffusion.ddpm import Ddpm
from components.models.purifiers.diffusion.diffdefense import DiffDefense, UntrainedDiffusion
from components.models.purifiers.diffusion.diffpure import DiffPure
from components.models.purifiers.gan import DefenseGan, Gan
from components.models.purifiers.jpeg import Jpeg
from components.models.purifiers.magnet import MagNet
from components.models.purifiers.transforms import RandomTransform

PurifierConfig = Annotated[
    ConvAutoencoder | RandomTransform | Denoiser | RedNet | MagNet | Ddpm | Gan
    | Identity | GaussianNoise | BitDepth | Median | Threshold | Jpeg | RandomNetwork
    | UntrainedDiffusion,
    Field(discriminator="kind"),
]  # fmt: skip
ControlConfig = Annotated[
    Identity | GaussianNoise | BitDepth | Median | Threshold | Jpeg | RandomNetwork
    | UntrainedDiffusion,
    Field(discriminator="kind"),
]  # fmt: skip
InferenceConfig = Annotated[
    Apudae | DiffDefense | DiffPure | DefenseGan, Field(discriminator="kind")
]


def stochastic(model: PurifierConfig, inference: InferenceConfig | None) -> bool:
    """Say whether a purifier draws noise (`Purifier.stochastic`), from its sections alone."""
    if inference is not None:
        return inference.stochastic()
    return isinstance(model, RandomTransform | GaussianNoise | UntrainedDiffusion)


__all__ = [
    "ControlConfig",
    "Inference",
    "InferenceConfig",
    "Purifier",
    "PurifierConfig",
    "stochastic",
]
