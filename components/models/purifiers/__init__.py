"""Purifiers: one file a family, one line a kind in `PurifierConfig`.

`PurifierConfig` is what can be trained or built; `InferenceConfig` is how a trained network that
is no purifier by itself, or that can be used in several ways, becomes one.
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
    Jpeg,
    Median,
    RandomNetwork,
    Threshold,
)
from components.models.purifiers.denoiser import Denoiser, RedNet
from components.models.purifiers.diffusion.ddpm import Ddpm
from components.models.purifiers.diffusion.diffdefense import DiffDefense, UntrainedDiffusion
from components.models.purifiers.diffusion.diffpure import DiffPure
from components.models.purifiers.gan import DefenseGan, Gan
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

__all__ = ["ControlConfig", "Inference", "InferenceConfig", "Purifier", "PurifierConfig"]
