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

# L_org, over all pixels in [0,1]: the paper's autoencoder has the first, its GAN L1 of two outputs.
LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss}
Loss = Literal["mse", "l1"]


class Reconstruction(Config):
    """Restore a clean image after the purifier's own random transform.

    AToP pre-trains with it, and it is the loss L_org that fine-tuning keeps.
    """

    kind: Literal["reconstruction"]
    loss: Loss

    def bind(self, frozen: Frozen) -> Objective:
        """Return the objective for a purifier."""

        def objective(
            model: nn.Module, batch: Batch, progress: float, draws: Draws
        ) -> tuple[Tensor, Metrics]:
            loss = LOSSES[self.loss](model(batch.images, draws.stream()), batch.images)
            return loss, {"loss": loss}

        return objective


class Atop(Config):
    """AToP: L_org(g(t(x')), target) + lambda * CE(F(g(t(x'))), y), minimised over the purifier g.

    The `max` in the paper's eq. 9 is the attacker's, over x'. `loss` is L_org. `target` is the
    clean image (as here and in the authors' log) or x' (as in the paper). `w_clean` weighs the same
    cross-entropy on the clean image (0 in the paper). With `adversary: {kind: none}` x' is x:
    fine-tuning on clean images alone (Figure 4).
    """

    kind: Literal["atop"]
    adversary: Adversary
    weight: Annotated[float, Field(ge=0, alias="lambda")]
    loss: Loss
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
            target = batch.images if self.target == "clean" else attacked
            original = LOSSES[self.loss](purified, target)
            logits = classifier(purified)
            ce = F.cross_entropy(logits, batch.labels)
            loss = original + self.weight * ce
            if self.w_clean:
                clean = classifier(model(batch.images, draws.redraw(LOSS_CLEAN).stream()))
                loss = loss + self.w_clean * F.cross_entropy(clean, batch.labels)
            metrics = {"loss": loss, "original": original, "ce": ce}
            return loss, {**metrics, self.adversary.metric: accuracy(logits, batch.labels)}

        return objective
