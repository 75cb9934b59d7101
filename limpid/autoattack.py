"""AutoAttack by the signature of its authors' class, over the attacks that the pipeline runs."""

import time
from copy import deepcopy

import torch
from torch import Tensor, nn

from components.attacks import L2, Linf
from components.attacks.autoattack import AutoAttack as Ensemble
from components.data.draws import Draws
from components.models.accuracy import count_correct
from components.models.defense import Defense, bind, fold_batch_norm
from components.models.foreign import ForeignClassifier
from components.models.precision import full_precision

NORMS = ("Linf", "L2")
VERSIONS = ("standard", "rand")


class AutoAttack:
    """AutoAttack (Croce and Hein 2020) on a classifier of pixels in [0,1], in full float32.

    `eps` is the radius in [0,1] units: 8 / 255, not 8. `version` is `standard`, or `rand` for a
    classifier that draws noise of its own. A frozen copy of the model is attacked, in eval mode, on
    `device` or where the model is; the model itself stays as it is. The same `seed` gives the same
    images, whatever their batches; of a random model, in the same batches. Raises ValueError for
    another norm or version, or no radius.
    """

    def __init__(
        self, model: nn.Module, norm: str = "Linf", eps: float = 0.3, seed: int | None = None,
        verbose: bool = True, version: str = "standard",
        device: str | torch.device | None = None,
    ) -> None:  # fmt: skip
        if norm not in NORMS:
            raise ValueError(f"norm is {norm!r}; it may be {' or '.join(NORMS)}")
        if version not in VERSIONS:
            raise ValueError(f"version is {version!r}; it may be {' or '.join(VERSIONS)}")
        if not eps > 0:
            raise ValueError(f"eps is {eps}; a radius is above 0, in units of pixels in [0,1]")
        self.threat: Linf | L2 = (
            Linf(norm="linf", eps_255=255 * eps) if norm == "Linf" else L2(norm="l2", eps_l2=eps)
        )
        held = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
        self.device = held if device is None else torch.device(device)
        classifier = ForeignClassifier(deepcopy(model), version == "rand").to(self.device)
        self.defense = Defense(classifier, None).freeze()
        self.ensemble = Ensemble.model_validate({"kind": "autoattack", "version": version})
        self.seed, self.verbose = seed or 0, verbose

    @full_precision()
    def run_standard_evaluation(self, x: Tensor, y: Tensor, bs: int = 250) -> Tensor:
        """Return an image for each of `x` (N,C,H,W) in [0,1] with labels `y` (N,), `bs` at a time.

        It is the adversarial example that was found, or else the image itself. Raises ValueError
        for images that are no float32 in [0,1].
        """
        _check(x, y)
        images, labels = x.to(self.device), y.to(self.device)
        draws = Draws(self.seed, "attack", torch.arange(len(x), device=self.device))
        target = bind(fold_batch_norm(self.defense), "full", draws, self.ensemble.eot)
        began, best = time.monotonic(), images
        for name, found in self.ensemble.parts(target, images, labels, self.threat, draws, bs):
            fooled = found.margin <= 0
            best = torch.where(fooled[:, None, None, None], found.images, images)
            if self.verbose:
                left, seconds = float((~fooled).float().mean()), time.monotonic() - began
                print(f"{left:7.2%} right after {name} ({seconds:.1f} s)", flush=True)
        if self.verbose:
            # Of the model itself: attacks ran on a folded copy.
            right = count_correct(self.defense, best, labels, draws.ids, self.seed, "attack", 1, bs)
            share = right.sum() / max(len(x), 1)
            print(f"robust accuracy (worst of all attacks): {share:.2%} of {len(x)} images")
        return best.to(x.device)


def _check(x: Tensor, y: Tensor) -> None:
    if x.dtype != torch.float32 or x.ndim != 4:
        raise ValueError(
            f"images are {x.dtype} of shape {tuple(x.shape)}; they must be float32 (N,C,H,W)"
        )
    if len(x) and not bool((x >= 0).all() & (x <= 1).all()):
        raise ValueError(
            f"pixels lie in [{x.min():.3g}, {x.max():.3g}]; they must lie in [0,1], so normalise "
            "inside the model"
        )
    if y.shape != x.shape[:1]:
        raise ValueError(f"there are {len(x)} images and labels of shape {tuple(y.shape)}")
