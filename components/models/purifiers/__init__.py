"""Purifiers: one module per family, and here the unions of all their kinds.

This is the one place where a new purifier is registered: import its section and add it to a union.
`PurifierConfig` lists the networks that can be built and trained; all except `ddpm` and `gan` are
purifiers by themselves. `InferenceConfig` lists the ways to use a trained network as a purifier.
`ControlConfig` lists the purifiers that need no training; `PurifierConfig` has them too. The
networks of plugins (`components.plugins`) are in both: a control shows what they are untrained.
"""

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from components import plugins
from components.models.purifiers.apudae import Apudae
from components.models.purifiers.autoencoder import ConvAutoencoder
from components.models.purifiers.contract import Inference, Purifier, PurifierSection
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

_Control = (
    Identity | GaussianNoise | BitDepth | Median | Threshold | Jpeg | RandomNetwork
    | UntrainedDiffusion
)  # fmt: skip
_Purifier = (
    ConvAutoencoder | RandomTransform | Denoiser | RedNet | MagNet | Ddpm | Gan | _Control
)  # fmt: skip
_Inference = Apudae | DiffDefense | DiffPure | DefenseGan

if TYPE_CHECKING:
    PurifierConfig = Annotated[_Purifier, Field(discriminator="kind")]
    ControlConfig = Annotated[_Control, Field(discriminator="kind")]
    InferenceConfig = Annotated[_Inference, Field(discriminator="kind")]
else:
    __getattr__ = plugins.unions(__name__, "purifiers", {
        "PurifierConfig": (_Purifier, PurifierSection),
        "ControlConfig": (_Control, PurifierSection),
        "InferenceConfig": (_Inference, Inference),
    })  # fmt: skip


def stochastic(model: PurifierSection, inference: Inference | None) -> bool:
    """Say whether a purifier draws noise (`Purifier.stochastic`), from its sections alone."""
    return model.stochastic() if inference is None else inference.stochastic()


__all__ = [
    "ControlConfig",
    "Inference",
    "InferenceConfig",
    "Purifier",
    "PurifierConfig",
    "PurifierSection",
    "stochastic",
]
