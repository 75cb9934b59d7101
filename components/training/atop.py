"""Objectives of AToP (Lin et al. 2024): its pre-training, and the fine-tuning of its eq. 9."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from components.config import Config
from components.data.draws import Draws
from components.training.contract import (
    LOSS_ATTACKED,
    LOSS_CLEAN,
    Adversary,
    Batch,
    Frozen,
    Metrics,
    Objective,
    Weight,
    accuracy,
)
from components.training.koo import NormalTeacher


class Reconstruction(Config):
    """Restore a clean image after the purifier's own random transform: MSE over all pixels.

    AToP pre-trains with it, and it is the loss L_org that fine-tuning keeps for autoencoders.
    """

    kind: Literal["reconstruction"]

    def bind(self, frozen: Frozen) -> Objective:
        """Return the objective for a purifier."""
        return NormalTeacher(kind="normal_teacher").bind(frozen)


class Atop(Config):
    """AToP: L_org(g(t(x')), target) + lambda * CE(F(g(t(x'))), y), minimised over the purifier g.

    The `max` in the paper's eq. 9 is the attacker's, over x'. L_org is MSE over all pixels, its
    form for autoencoders. `target` is the clean image (as here and in the authors' log) or x' (as
    in the paper). `w_clean` weighs the same cross-entropy on the clean image (0 in the paper).
    """

    kind: Literal["atop"]
    adversary: Adversary
    weight: Annotated[float, Field(ge=0, alias="lambda")]
    target: Literal["clean", "attacked"]
    w_clean: Weight

    def bind(self, frozen: Frozen) -> Objective:
        """Return the objective for a purifier behind a random transform."""
        classifier = frozen.required_classifier()

        def objective(
            model: nn.Module, batch: Batch, progress: float, draws: Draws
        ) -> tuple[Tensor, Metrics]:
            attacked = self.adversary.examples(model, batch, frozen, progress, draws)
            purified = model(attacked, draws.redraw(LOSS_ATTACKED).stream())
            original = F.mse_loss(purified, batch.images if self.target == "clean" else attacked)
            logits = classifier(purified)
            ce = F.cross_entropy(logits, batch.labels)
            loss = original + self.weight * ce
            if self.w_clean:
                clean = classifier(model(batch.images, draws.redraw(LOSS_CLEAN).stream()))
                loss = loss + self.w_clean * F.cross_entropy(clean, batch.labels)
            metrics = {"loss": loss, "original": original, "ce": ce}
            return loss, {**metrics, "accuracy_attacked": accuracy(logits, batch.labels)}

        return objective
