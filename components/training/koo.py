"""Carved out of components/objectives.py."""

from typing import Literal

import torch
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
    _classified,
    _needed,
    _true_class,
)


class NormalTeacher(Config):
    """Koo's teacher for clean images: MSE(f(x), x)."""

    kind: Literal["normal_teacher"]

    def bind(self, frozen: Frozen) -> Objective:
        """Return the objective for a purifier."""

        def objective(
            model: nn.Module, batch: Batch, progress: float, draws: Draws
        ) -> tuple[Tensor, Metrics]:
            loss = F.mse_loss(model(batch.images, draws), batch.images)
            return loss, {"loss": loss}

        return objective


class AdversarialTeacher(Config):
    """Koo's teacher for attacked images: MSE(f(x'), x) + w_adv * -log sigmoid(p_out - adv_out).

    The formula needs one number per image; it is read as the log-probability of the true class of
    f(x') and of x', the latter constant. `w_classification` adds cross-entropy of f(x) and f(x')
    behind the classifier, which the paper does not have (0 there): with `adversary: defense` it is
    what makes the purifier hold against an attack through itself.
    """

    kind: Literal["adversarial_teacher"]
    adversary: Adversary
    w_adv: Weight
    w_classification: Weight

    def bind(self, frozen: Frozen) -> Objective:
        """Return the objective for a purifier."""
        classifier = _needed(frozen.classifier)

        def objective(
            model: nn.Module, batch: Batch, progress: float, draws: Draws
        ) -> tuple[Tensor, Metrics]:
            attacked = _attacked(self.adversary, model, batch, frozen, progress, draws)
            purified = model(attacked, draws.redraw(SEEN_ATTACKED))
            mse = F.mse_loss(purified, batch.images)
            logits = classifier(purified)
            adv = relativistic(logits, classifier(attacked), batch.labels)
            loss = mse + self.w_adv * adv
            if self.w_classification:
                clean = classifier(model(batch.images, draws.redraw(SEEN_CLEAN)))
                loss = loss + self.w_classification * _classified((logits, clean), batch.labels)
            metrics = {"loss": loss, "mse": mse, "adv": adv}
            return loss, {**metrics, "accuracy_attacked": _accuracy(logits, batch.labels)}

        return objective


class Distillation(Config):
    """Koo's student: beta * MSE(f(x'), x) + gamma * mean over teachers of (KL + MSE).

    KL is between the softmaxes of two images, flattened, teacher as reference, summed over pixels
    and averaged over the batch. `nt_input` says whether the normal teacher is shown the clean
    image (the paper's text and figure) or x' (its equation 5). `w_classification` as in the
    adversarial teacher, 0 in the paper.
    """

    kind: Literal["distillation"]
    adversary: Adversary
    beta: Weight
    gamma: Weight
    nt_input: Literal["clean", "attacked"]
    w_classification: Weight

    def bind(self, frozen: Frozen) -> Objective:
        """Return the objective for a purifier; needs the two teachers."""
        classifier = _needed(frozen.classifier)
        adversarial_teacher, normal_teacher = frozen.teachers

        def objective(
            model: nn.Module, batch: Batch, progress: float, draws: Draws
        ) -> tuple[Tensor, Metrics]:
            attacked = _attacked(self.adversary, model, batch, frozen, progress, draws)
            purified = model(attacked, draws.redraw(SEEN_ATTACKED))
            mse = F.mse_loss(purified, batch.images)
            with torch.no_grad():
                shown = batch.images if self.nt_input == "clean" else attacked
                taught = [adversarial_teacher(attacked), normal_teacher(shown)]
            kd = torch.stack([distance(images, purified) for images in taught]).mean()
            loss = self.beta * mse + self.gamma * kd
            logits = classifier(purified)
            if self.w_classification:
                clean = classifier(model(batch.images, draws.redraw(SEEN_CLEAN)))
                loss = loss + self.w_classification * _classified((logits, clean), batch.labels)
            metrics = {"loss": loss, "mse": mse, "kd": kd}
            return loss, {**metrics, "accuracy_attacked": _accuracy(logits, batch.labels)}

        return objective


def relativistic(purified: Tensor, attacked: Tensor, labels: Tensor) -> Tensor:
    """Return mean -log sigmoid(s(f(x')) - s(x')), s the log-probability of the true class.

    Takes logits (N,K); no gradient reaches those of x'. Koo et al. 2023, eq. 2.
    """
    score = _true_class(purified, labels) - _true_class(attacked, labels).detach()
    return F.softplus(-score).mean()


def distance(teacher: Tensor, student: Tensor) -> Tensor:
    """Return KL(softmax(teacher) || softmax(student)) + MSE of two batches of images (N,C,H,W).

    The softmax runs over the flattened image at temperature 1. Koo et al. 2023, eq. 5.
    """
    p = teacher.detach().flatten(1).log_softmax(1)
    q = student.flatten(1).log_softmax(1)
    kl = F.kl_div(q, p, reduction="batchmean", log_target=True)
    return kl + F.mse_loss(student, teacher.detach())
