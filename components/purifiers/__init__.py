"""Purifiers: one file a family, one line a kind in `PurifierConfig`.

`PurifierConfig` is what can be trained or built; `InferenceConfig` is how a trained network that
is no purifier by itself, or that can be used in several ways, becomes one.
"""

from typing import Annotated

from pydantic import Field

from components.purifiers.apudae import Apudae
from components.purifiers.autoencoder import ConvAutoencoder
from components.purifiers.contract import Inference, Purifier
from components.purifiers.controls import (
    BitDepth,
    GaussianNoise,
    Identity,
    Jpeg,
    Median,
    RandomNetwork,
    Threshold,
)
from components.purifiers.denoiser import Denoiser, RedNet
from components.purifiers.diffdefense import DiffDefense, UntrainedDiffusion
from components.purifiers.diffpure import DiffPure
from components.purifiers.diffusion import Ddpm
from components.purifiers.gan import DefenseGan, Gan
from components.purifiers.magnet import MagNet
from components.purifiers.transforms import RandomTransform

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

__all__ = ["ControlConfig", "Inference", "InferenceConfig", "Purifier", "PurifierConfig"]
