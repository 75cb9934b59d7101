"""Objectives of Koo et al. 2023: the two teachers (eq. 2-3) and the student (eq. 4-6)."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from components.config import Config
from components.data.draws import Draws
from components.training.contract import (
    LOSS_ATTACKED,
    LOSS_CLEAN,
    Adversary,
    Batch,
    FixedAdversary,
    Frozen,
    Metrics,
    Objective,
    Taught,
    Weight,
    accuracy,
)


class NormalTeacher(Config):
    """Koo's teacher for clean images: MSE(f(x), x)."""

    kind: Literal["normal_teacher"]

    def bind(self, frozen: Frozen) -> Objective:
        """Return the objective for a purifier."""

        def objective(
            model: nn.Module, batch: Batch, progress: float, draws: Draws
        ) -> tuple[Tensor, Metrics]:
            loss = F.mse_loss(model(batch.images, draws.stream()), batch.images)
            return loss, {"loss": loss}

        return objective


class AdversarialTeacher(Config):
    """Koo's teacher for attacked images: MSE(f(x'), x) + w_adv * -log sigmoid(p_out - adv_out).

    The formula needs one number per image. We take the log-probability of the true class, of f(x')
    and of x'; that of x' is a constant. `w_classification` adds the classifier's cross-entropy on
    f(x) and f(x'), which the paper does not have (0 there). With `adversary: defense` this term
    makes the purifier robust against attacks through itself.
    """

    kind: Literal["adversarial_teacher"]
    adversary: Adversary
    w_adv: Weight
    w_classification: Weight

    def bind(self, frozen: Frozen) -> Objective:
        """Return the objective for a purifier."""
        classifier = frozen.required_classifier()

        def objective(
            model: nn.Module, batch: Batch, progress: float, draws: Draws
        ) -> tuple[Tensor, Metrics]:
            attacked = self.adversary.examples(model, batch, frozen, progress, draws)
            purified = model(attacked, draws.redraw(LOSS_ATTACKED).stream())
            mse = F.mse_loss(purified, batch.images)
            logits = classifier(purified)
            adv = relativistic(logits, classifier(attacked), batch.labels)
            loss = mse + self.w_adv * adv
            if self.w_classification:
                clean = classifier(model(batch.images, draws.redraw(LOSS_CLEAN).stream()))
                loss = loss + self.w_classification * _cross_entropies(
                    (logits, clean), batch.labels
                )
            metrics = {"loss": loss, "mse": mse, "adv": adv}
            return loss, {**metrics, self.adversary.metric: accuracy(logits, batch.labels)}

        return objective


class Distillation(Config):
    """Koo's student: beta * MSE(f(x'), x) + gamma * mean over teachers of (KL + MSE).

    KL is between the softmaxes of two flattened images, the teacher's being the reference; it is
    summed over pixels and averaged over the batch. The paper has an adversarial and a normal
    teacher, M = 2 in equation 5. With one of them (its Table 2) the mean is that teacher's term.
    `nt_input` says whether normal teachers get the clean image (as in the paper's text and figure)
    or x' (as in its equation 5). With `adversary: {kind: none}` x' is x, for all networks.
    `w_classification` is as in the adversarial teacher, 0 in the paper.
    """

    kind: Literal["distillation"]
    adversary: Adversary
    beta: Weight
    gamma: Weight
    nt_input: Literal["clean", "attacked"]
    w_classification: Weight

    def bind(self, frozen: Frozen) -> Objective:
        """Return the objective for a purifier; needs a teacher."""
        classifier = frozen.required_classifier()
        assert frozen.teachers, "a student needs a teacher"
        adversary = self.adversary

        @torch.no_grad()
        def teach(images: Tensor, attacked: Tensor) -> list[Tensor]:
            given = images if self.nt_input == "clean" else attacked
            return [t.purifier(given if t.normal else attacked) for t in frozen.teachers]

        def objective(
            model: nn.Module, batch: Batch, progress: float, draws: Draws
        ) -> tuple[Tensor, Metrics]:
            attacked = adversary.examples(model, batch, frozen, progress, draws)
            purified = model(attacked, draws.redraw(LOSS_ATTACKED).stream())
            mse = F.mse_loss(purified, batch.images)
            taught = batch.taught or teach(batch.images, attacked)
            kd = torch.stack([distance(images, purified) for images in taught]).mean()
            loss = self.beta * mse + self.gamma * kd
            logits = classifier(purified)
            if self.w_classification:
                clean = classifier(model(batch.images, draws.redraw(LOSS_CLEAN).stream()))
                loss = loss + self.w_classification * _cross_entropies(
                    (logits, clean), batch.labels
                )
            metrics = {"loss": loss, "mse": mse, "kd": kd}
            return loss, {**metrics, adversary.metric: accuracy(logits, batch.labels)}

        # A random teacher answers anew in every step.
        random = any(teacher.purifier.stochastic for teacher in frozen.teachers)
        if random or not isinstance(adversary, FixedAdversary):
            return objective
        return Taught(objective, lambda batch: teach(batch.images, adversary.of(batch)))


def relativistic(purified: Tensor, attacked: Tensor, labels: Tensor) -> Tensor:
    """Return mean -log sigmoid(s(f(x')) - s(x')), where s is the log-probability of the true class.

    Takes logits (N,K) of f(x') and of x'; no gradient reaches those of x'. Koo et al. 2023, eq. 2.
    """
    score = _log_probability(purified, labels) - _log_probability(attacked, labels).detach()
    return F.softplus(-score).mean()


def distance(teacher: Tensor, student: Tensor) -> Tensor:
    """Return KL(softmax(teacher) || softmax(student)) + MSE of two batches of images (N,C,H,W).

    The softmax runs over the flattened image at temperature 1. Koo et al. 2023, eq. 5.
    """
    p = teacher.detach().flatten(1).log_softmax(1)
    q = student.flatten(1).log_softmax(1)
    kl = F.kl_div(q, p, reduction="batchmean", log_target=True)
    return kl + F.mse_loss(student, teacher.detach())


def _log_probability(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(1).gather(1, labels[:, None]).squeeze(1)


def _cross_entropies(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    return torch.stack([F.cross_entropy(one, labels) for one in logits]).sum()
