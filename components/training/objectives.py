"""What training minimises.

An objective section is bound to the frozen networks it needs and then called as
`(model, batch, progress, draws) -> loss, metrics`: `progress` in [0,1] is how far training has
come, so that ramps need no state; `draws` is keyed noise of role `train`, new in every epoch.

Sources: Koo et al. 2023 (teachers, eq. 2-3; student, eq. 4-6), Lin et al. 2024 (AToP, eq. 9),
Madry et al. 2018 (adversarial training).

Whom the adversarial examples x' attack is said by `adversary`: `pool` takes the stored examples
that attack the frozen classifier (Koo; crafted once, reused); `classifier` attacks it in the loop
(AToP's FGSM); `defense` attacks purifier and classifier together in the loop, with the full
gradient. Only the last knows the purifier.
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
