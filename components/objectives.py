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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from components.attacks import L2, Linf
from components.attacks.gradient import ascend
from components.config import Config
from components.defense import Defense, aim
from components.draws import Draws
from components.purifiers import Purifier
from components.purifiers.diffusion import Diffusion
from components.purifiers.gan import GenerativePair, critic_loss, generator_loss
from components.purifiers.magnet import MagNetPurifier

# Draws of the noise under which x' and x are learnt from; the attack uses 0, 1, 2, ...
SEEN_ATTACKED, SEEN_CLEAN = -1, -2

Weight = Annotated[float, Field(ge=0)]
Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """Clean images (N,C,H,W) float32, labels (N,), the pool's x' for them (or None).

    `step` counts the batches of the training.
    """

    images: Tensor
    labels: Tensor
    attacked: Tensor | None
    step: int = 0


@dataclass(frozen=True)
class Frozen:
    """The networks an objective may look through but never change, and the threat it trains for.

    `teachers` is (adversarial teacher, normal teacher) for distillation, else empty.
    """

    classifier: nn.Module | None
    teachers: Sequence[Purifier]
    threat: Linf | L2


class Objective(Protocol):
    """A bound objective."""

    def __call__(
        self, model: nn.Module, batch: Batch, progress: float, draws: Draws
    ) -> tuple[Tensor, Metrics]:
        """Return the loss to minimise and what to log."""
        ...


class InLoop(Config):
    """An attack inside training: bare PGD whose radius grows to the threat's over `ramp`."""

    steps: Annotated[int, Field(ge=1)]
    step: Annotated[float, Field(gt=0)]
    random_start: bool
    ramp: Annotated[float, Field(ge=0, le=1)]

    def perturb(
        self,
        model: nn.Module,
        defense: Defense,
        batch: Batch,
        threat: Linf | L2,
        progress: float,
        draws: Draws,
    ) -> Tensor:
        """Return x' that attacks `defense`; `model`, in training, is in eval mode meanwhile.

        Eval mode keeps the attack's forward passes out of the BatchNorm statistics.
        """
        radius = threat.scaled(min(1.0, progress / self.ramp)) if self.ramp else threat
        images, labels = batch.images, batch.labels
        start = radius.start(images, draws, "start") if self.random_start else images
        target = aim(defense, "full", draws, 1)
        model.eval()
        attacked = ascend(target, start, images, labels, radius, self.steps, self.step)
        model.train()
        return attacked


class PoolAdversary(Config):
    """x' from the adversarial pool."""

    kind: Literal["pool"]


class ClassifierAdversary(InLoop):
    """x' attacks the frozen classifier, in the loop."""

    kind: Literal["classifier"]


class DefenseAdversary(InLoop):
    """x' attacks the purifier in training and the classifier behind it, in the loop."""

    kind: Literal["defense"]


Adversary = Annotated[
    PoolAdversary | ClassifierAdversary | DefenseAdversary, Field(discriminator="kind")
]


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
            return loss, {"loss": loss, "accuracy": _accuracy(logits, batch.labels)}

        return objective


class AdversarialClassification(Config):
    """Adversarial training (Madry et al. 2018): cross-entropy on x', plus a share on x."""

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
            return loss, {"loss": loss, "accuracy_attacked": _accuracy(logits, batch.labels)}

        return objective


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


class Reconstruction(Config):
    """Restore clean images from what the purifier's own random transform leaves of them.

    MSE over all pixels: AToP's original loss L_org for a masked autoencoder, and its pre-training.
    """

    kind: Literal["reconstruction"]

    def bind(self, frozen: Frozen) -> Objective:
        """Return the objective for a purifier."""
        return NormalTeacher(kind="normal_teacher").bind(frozen)


class Denoising(Config):
    """Remove Gaussian noise of a deviation drawn up to `sigma_max` for each image; MSE.

    Kalaria et al., section 3. The noisy image is not clipped.
    """

    kind: Literal["denoising"]
    sigma_max: Annotated[float, Field(gt=0)]

    def bind(self, frozen: Frozen) -> Objective:
        """Return the objective for a purifier."""

        def objective(
            model: nn.Module, batch: Batch, progress: float, draws: Draws
        ) -> tuple[Tensor, Metrics]:
            sigma = self.sigma_max * draws.uniform((1, 1, 1), "sigma")
            noise = draws.normal(tuple(batch.images.shape[1:]), "noise")
            loss = F.mse_loss(model(batch.images + sigma * noise), batch.images)
            return loss, {"loss": loss}

        return objective


class ReformerDetectors(Config):
    """MagNet's two autoencoders (Meng and Chen 2017): each restores images from Gaussian noise.

    The noise has deviation `volume` and the noisy image is clipped, as in the authors' code; it is
    drawn anew in every epoch, where the code draws it once. The code's penalty on activations
    (1e-9) is left out.
    """

    kind: Literal["reformer_detectors"]
    volume: Annotated[float, Field(ge=0)]

    def bind(self, frozen: Frozen) -> Objective:
        """Return the objective for a MagNet."""

        def objective(
            model: nn.Module, batch: Batch, progress: float, draws: Draws
        ) -> tuple[Tensor, Metrics]:
            assert isinstance(model, MagNetPurifier)
            noise = draws.normal(tuple(batch.images.shape[1:]), "noise")
            noisy = (batch.images + self.volume * noise).clamp(0, 1)
            reformed, detected = (F.mse_loss(x, batch.images) for x in model.autoencode(noisy))
            loss = reformed + detected
            return loss, {"loss": loss, "reformer": reformed, "detector": detected}

        return objective


class NoisePrediction(Config):
    """A DDPM's loss: the mean squared error of the predicted noise, at uniform times.

    Ho et al. 2020, equation 14.
    """

    kind: Literal["noise_prediction"]

    def bind(self, frozen: Frozen) -> Objective:
        """Return the objective for a diffusion network."""

        def objective(
            model: nn.Module, batch: Batch, progress: float, draws: Draws
        ) -> tuple[Tensor, Metrics]:
            assert isinstance(model, Diffusion)
            times = (draws.uniform((), "time") * len(model.alpha_bar)).long()
            kept = model.alpha_bar[times].to(batch.images.dtype)[:, None, None, None]
            noise = draws.normal(tuple(batch.images.shape[1:]), "noise")
            noisy = kept.sqrt() * model.encode(batch.images) + (1 - kept).sqrt() * noise
            loss = F.mse_loss(model(noisy, times), noise)
            return loss, {"loss": loss}

        return objective


class WganGp(Config):
    """A generator against a critic (Gulrajani et al. 2017): `critic_steps` for one of the other.

    Both learn by one optimiser, which leaves alone what has no gradient.
    """

    kind: Literal["wgan_gp"]
    critic_steps: Annotated[int, Field(ge=1)]

    def bind(self, frozen: Frozen) -> Objective:
        """Return the objective for a pair of networks."""

        def objective(
            model: nn.Module, batch: Batch, progress: float, draws: Draws
        ) -> tuple[Tensor, Metrics]:
            assert isinstance(model, GenerativePair)
            latent = draws.normal((model.latent,), "latent")
            mix = draws.uniform((1, 1, 1), "mix")
            turn = batch.step % (self.critic_steps + 1) == self.critic_steps
            # Both are logged in every step, since a log has the same columns throughout.
            with torch.set_grad_enabled(not turn):
                critic = critic_loss(model, batch.images, latent, mix)
            with torch.set_grad_enabled(turn):
                generator = generator_loss(model, latent)
            loss = generator if turn else critic
            return loss, {"loss": loss, "critic": critic, "generator": generator}

        return objective


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


def _attacked(
    adversary: PoolAdversary | ClassifierAdversary | DefenseAdversary,
    model: nn.Module,
    batch: Batch,
    frozen: Frozen,
    progress: float,
    draws: Draws,
) -> Tensor:
    classifier = _needed(frozen.classifier)
    if isinstance(adversary, PoolAdversary):
        assert batch.attacked is not None, "the stage did not load the pool"
        return batch.attacked
    assert isinstance(model, Purifier)
    purifier = model if isinstance(adversary, DefenseAdversary) else None
    defense = Defense(classifier, purifier)
    return adversary.perturb(model, defense, batch, frozen.threat, progress, draws)


def _needed(classifier: nn.Module | None) -> nn.Module:
    assert classifier is not None, "this objective looks through the frozen classifier"
    return classifier


def _true_class(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(1).gather(1, labels[:, None]).squeeze(1)


def _classified(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    return torch.stack([F.cross_entropy(one, labels) for one in logits]).sum()


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.detach().argmax(1) == labels).float().mean()
