"""Purifiers: one file a family, one line a kind in `PurifierConfig`."""

from typing import Annotated

from pydantic import Field

from components.purifiers.autoencoder import ConvAutoencoder
from components.purifiers.contract import Purifier
from components.purifiers.controls import BitDepth, GaussianNoise, Identity, Median, Threshold
from components.purifiers.transforms import RandomTransform

PurifierConfig = Annotated[
    ConvAutoencoder | RandomTransform | Identity | GaussianNoise | BitDepth | Median | Threshold,
    Field(discriminator="kind"),
]
ControlConfig = Annotated[
    Identity | GaussianNoise | BitDepth | Median | Threshold, Field(discriminator="kind")
]

__all__ = ["ControlConfig", "Purifier", "PurifierConfig"]
