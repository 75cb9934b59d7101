"""Objectives of denoisers, MagNet, diffusion networks and GANs: none needs a classifier."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from components.config import Config
from components.data.draws import Draws
from components.models.purifiers.diffusion.ddpm import Diffusion
from components.models.purifiers.gan import GenerativePair, critic_loss, generator_loss
from components.models.purifiers.magnet import MagNetPurifier
from components.training.contract import Batch, Frozen, Metrics, Objective


class Denoising(Config):
    """Remove Gaussian noise; MSE. Each image draws its deviation from [0, `sigma_max`).

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

    As in the authors' code, the noise has deviation `volume` and the noisy image is clipped. Unlike
    there, noise is new in every epoch, and the penalty on activations (1e-9) is left out.
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
    """The loss of a DDPM: mean squared error of the predicted noise, at uniformly drawn times.

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
    """A generator against a critic: `critic_steps` steps of the critic for one of the generator.

    Gulrajani et al. 2017. One optimiser trains both: it skips parameters that have no gradient.
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
            generator_turn = batch.step % (self.critic_steps + 1) == self.critic_steps
            # Every step logs both losses, because all rows of a log have the same columns.
            with torch.set_grad_enabled(not generator_turn):
                critic = critic_loss(model, batch.images, latent, mix)
            with torch.set_grad_enabled(generator_turn):
                generator = generator_loss(model, latent)
            loss = generator if generator_turn else critic
            return loss, {"loss": loss, "critic": critic, "generator": generator}

        return objective
