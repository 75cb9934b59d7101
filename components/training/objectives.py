"""The objectives that params.yaml can name: the one place where an objective is added.

An objective is a `Config` with a `kind` and `bind(frozen)` (components/training/contract.py) in the
file of its family, and its name in one of the two unions here. The two stages that train one kind
only name it by themselves: `Distillation` (students) and `Atop`, in pipelines/config.
"""

from typing import Annotated

from pydantic import Field

from components.training.atop import Reconstruction
from components.training.classification import AdversarialClassification, Classification
from components.training.generative import Denoising, NoisePrediction, ReformerDetectors, WganGp
from components.training.koo import AdversarialTeacher, NormalTeacher

ClassifierObjective = Annotated[
    Classification | AdversarialClassification, Field(discriminator="kind")
]
PurifierObjective = Annotated[
    NormalTeacher
    | AdversarialTeacher
    | Reconstruction
    | Denoising
    | ReformerDetectors
    | NoisePrediction
    | WganGp,
    Field(discriminator="kind"),
]
