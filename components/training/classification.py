"""Objectives of classifiers: plain and adversarial training."""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from components.config import Config
from components.data.draws import Draws
from components.models.defense import Defense
from components.training.contract import (
    Batch,
    Frozen,
    InLoop,
    Metrics,
    Objective,
    Weight,
    accuracy,
)


class Classification(Config):
    """Cross-entropy on clean images."""

    kind: Literal["classification"]

    def bind(self, frozen: Frozen) -> Objective:
        """Return the objective for a classifier."""

        def objective(
            model: nn.Module, batch: Batch, progress: float, draws: Draws
        ) -> tuple[Tensor, Metrics]:
            logits = model(batch.images)
            loss = F.cross_entropy(logits, batch.labels)
            return loss, {"loss": loss, "accuracy": accuracy(logits, batch.labels)}

        return objective


class AdversarialClassification(Config):
    """Adversarial training: cross-entropy on x' plus `w_clean` times that on x.

    Madry et al. 2018, where `w_clean` is 0.
    """

    kind: Literal["adversarial_classification"]
    attack: InLoop
    w_clean: Weight

    def bind(self, frozen: Frozen) -> Objective:
        """Return the objective for a classifier."""

        def objective(
            model: nn.Module, batch: Batch, progress: float, draws: Draws
        ) -> tuple[Tensor, Metrics]:
            defense = Defense(model, None)
            attacked = self.attack.perturb(model, defense, batch, frozen.threat, progress, draws)
            logits = model(attacked)
            loss = F.cross_entropy(logits, batch.labels)
            if self.w_clean:
                loss = loss + self.w_clean * F.cross_entropy(model(batch.images), batch.labels)
            return loss, {"loss": loss, "accuracy_attacked": accuracy(logits, batch.labels)}

        return objective
