"""Purifiers: one file a family, one line a kind in `PurifierConfig`."""

from typing import Annotated

from pydantic import Field

from components.purifiers.autoencoder import ConvAutoencoder
from components.purifiers.contract import Purifier
from components.purifiers.controls import (
    BitDepth,
    GaussianNoise,
    Identity,
    Jpeg,
    Median,
    RandomNetwork,
    Threshold,
)
from components.purifiers.transforms import RandomTransform

PurifierConfig = Annotated[
    ConvAutoencoder | RandomTransform
    | Identity | GaussianNoise | BitDepth | Median | Threshold | Jpeg | RandomNetwork,
    Field(discriminator="kind"),
]  # fmt: skip
ControlConfig = Annotated[
    Identity | GaussianNoise | BitDepth | Median | Threshold | Jpeg | RandomNetwork,
    Field(discriminator="kind"),
]

__all__ = ["ControlConfig", "Purifier", "PurifierConfig"]
