"""Carved out of components/objectives.py."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from components.config import Config
from components.data.draws import Draws
from components.training.contract import (
    SEEN_ATTACKED,
    SEEN_CLEAN,
    Adversary,
    Batch,
    Frozen,
    Metrics,
    Objective,
    Weight,
    _accuracy,
    _attacked,
    _needed,
)
from components.training.koo import NormalTeacher


class Reconstruction(Config):
    """Restore clean images from what the purifier's own random transform leaves of them.

    MSE over all pixels: AToP's original loss L_org for a masked autoencoder, and its pre-training.
    """

    kind: Literal["reconstruction"]

    def bind(self, frozen: Frozen) -> Objective:
        """Return the objective for a purifier."""
        return NormalTeacher(kind="normal_teacher").bind(frozen)


class Atop(Config):
    """AToP: L_org(g(t(x')), target) + lambda * CE(F(g(t(x'))), y), minimised over the purifier.

    The `max` of the paper's eq. 9 is the inner one over x'. L_org is MSE over all pixels, the form
    for autoencoders. `target` is the clean image (ours, and the authors' own log) or x' (paper).
    `w_clean` adds the same cross-entropy on the clean image, 0 in the paper.
    """

    kind: Literal["atop"]
    adversary: Adversary
    weight: Annotated[float, Field(ge=0, alias="lambda")]
    target: Literal["clean", "attacked"]
    w_clean: Weight

    def bind(self, frozen: Frozen) -> Objective:
        """Return the objective for a purifier behind a random transform."""
        classifier = _needed(frozen.classifier)

        def objective(
            model: nn.Module, batch: Batch, progress: float, draws: Draws
        ) -> tuple[Tensor, Metrics]:
            attacked = _attacked(self.adversary, model, batch, frozen, progress, draws)
            purified = model(attacked, draws.redraw(SEEN_ATTACKED))
            original = F.mse_loss(purified, batch.images if self.target == "clean" else attacked)
            logits = classifier(purified)
            ce = F.cross_entropy(logits, batch.labels)
            loss = original + self.weight * ce
            if self.w_clean:
                clean = classifier(model(batch.images, draws.redraw(SEEN_CLEAN)))
                loss = loss + self.w_clean * F.cross_entropy(clean, batch.labels)
            metrics = {"loss": loss, "original": original, "ce": ce}
            return loss, {**metrics, "accuracy_attacked": _accuracy(logits, batch.labels)}

        return objective
