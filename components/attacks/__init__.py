"""Attacks: one module per family, the union of all kinds, and `craft`, which runs them.

`craft` takes a frozen `Defense` in eval mode and attacks it in fixed batches. Success, distance and
pixel range are measured on the images that come back: an attack never grades itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, cast

import torch
from pydantic import Field
from torch import Tensor

from components import plugins
from components.attacks.a3 import A3
from components.attacks.apgd import ApgdCe, ApgdDlr, ApgdMargin, ApgdT
from components.attacks.autoattack import AutoAttack
from components.attacks.contract import L2, Attack, Linf, Rung, Threat
from components.attacks.detector_aware import DetectorAware
from components.attacks.distance.cw import CwL2
from components.attacks.distance.deepfool import DeepFool
from components.attacks.distance.elastic_net import ElasticNet
from components.attacks.distance.fab import FabT
from components.attacks.flip import Flip
from components.attacks.gradient import Bim, Fgsm, Noise, Pgd, RFgsm
from components.attacks.library import MiFgsm
from components.attacks.square import Square
from components.attacks.stadv import StAdv
from components.data.draws import Draws
from components.data.image_set import ImageSet
from components.models.accuracy import is_right
from components.models.defense import Defense, Mode, bind, fold_batch_norm, margin
from components.models.one_pass import one_pass
from components.models.precision import full_precision

# The one place where an attack is added: a kind listed here can be used in params.yaml and by every
# stage. Only a kind that has a rank in the order of strength is named once more, with its tier, in
# `components/checks/scores.py`.
# Plugins add theirs (`components.plugins`).
_Attack = (
    Noise | Fgsm | RFgsm | Bim | Pgd | MiFgsm | CwL2 | DeepFool | ElasticNet | StAdv
    | ApgdCe | ApgdDlr | ApgdMargin | ApgdT | FabT | AutoAttack | A3 | Square | Flip
    | DetectorAware
)  # fmt: skip

if TYPE_CHECKING:
    AttackConfig = Annotated[_Attack, Field(discriminator="kind")]
else:
    __getattr__ = plugins.unions(__name__, "attacks", {"AttackConfig": (_Attack, Attack)})

# How often a random defense is asked about every finished image, as an attack would ask.
ASKED = 4

# Float32 cannot represent most radii exactly: an excess up to this is rounding, not a violation.
SLACK = 1e-6

__all__ = [
    "L2",
    "SLACK",
    "Attack",
    "AttackConfig",
    "Crafted",
    "Linf",
    "Threat",
    "craft",
    "violations",
]


@dataclass(frozen=True)
class Crafted:
    """An adversarial set: ids and labels (N,) int64, images (N,C,H,W) float32 in [0,1], and costs.

    `success` (N,) bool: the defense misclassifies the returned image under one draw of its noise
    (role `attack`). `iterations`, `forward` and `backward` (N,) int64 count the iterations and
    passes spent on each image; `spared` (N,) int64 are the forward passes that the attack left out
    because it knew their result, less those that it took for nothing.

    The rest is what the attack was answered, which the scoring is held to: `fooled` (N,) bool is
    its own view of the returned image; `answers` (N,) int64 are the right answers to `ASKED` more
    queries like those of the attack (one, if the defense is deterministic), and `margin` (N,)
    float32 their mean margin as a fraction of the length of the logits.
    """

    ids: Tensor
    labels: Tensor
    images: Tensor
    success: Tensor
    iterations: Tensor
    forward: Tensor
    backward: Tensor
    spared: Tensor
    fooled: Tensor
    answers: Tensor
    margin: Tensor

    def pick(self, rows: Tensor) -> "Crafted":
        """Return the set of some images."""
        return Crafted(*(getattr(self, field.name)[rows] for field in fields(self)))


@full_precision()
def craft(
    attack: Attack, defense: Defense, mode: Rung, data: ImageSet, threat: Linf | L2, seed: int,
    batch: int,
) -> Crafted:  # fmt: skip
    """Attack every image of `data` in batches of `batch`; noise is keyed by image, role `attack`.

    In full float32 (`full_precision`), like the scores.

    On the rung `network` the attack meets `one_pass` of the defense, and the images that it returns
    meet the defense.

    Raises ValueError if the attack does not apply to this defense or threat, and AssertionError if
    a bounded attack returns images outside the threat.
    """
    device = next(defense.parameters()).device
    folded, draws = fold_batch_norm(defense), Draws(seed, "attack", data.ids.to(device))
    clean, labels = data.pixels().to(device), data.labels.to(device)
    eot = getattr(attack, "eot", 1)
    if mode == "network":
        target = bind(one_pass(folded), "full", draws, eot)
    else:
        target = bind(folded, mode, draws, eot)
    outcome = attack.run_in_batches(target, clean, labels, threat, draws, batch)
    images = outcome.images.detach().float()
    if attack.bounded:
        broken = violations(images, clean, threat)
        assert not broken, f"{type(attack).__name__} left the threat: {broken}"
    batches = []
    for rows in torch.arange(len(data), device=device).split(batch):  # type: ignore[no-untyped-call]
        with torch.no_grad():
            logits = defense(images[rows], draws[rows])
        right = is_right(logits, labels[rows])
        batches.append((~right, *_ask(folded, mode, images[rows], labels[rows], draws[rows])))
    success, answers, margins = (torch.cat(column).cpu() for column in zip(*batches, strict=True))
    return Crafted(
        ids=data.ids,
        labels=data.labels,
        images=images.cpu(),
        success=success,
        iterations=outcome.iterations.cpu(),
        forward=target.passes.forward.cpu(),
        backward=target.passes.backward.cpu(),
        spared=target.passes.spared.cpu(),
        fooled=(outcome.margin <= 0).cpu(),
        answers=answers,
        margin=margins,
    )


def _ask(
    folded: Defense, mode: Rung, images: Tensor, labels: Tensor, draws: Draws
) -> tuple[Tensor, Tensor]:
    """Ask about finished images as attacks ask: with gradients on, in batches of several sizes.

    Returns the right answers (N,) and the mean relative margins (N,), under draws of role `attack`
    that no attack uses. On the rung `network` the attack never asked, and the pass that it attacked
    is differentiated here too.
    """
    asking: Mapping[Rung, Mode] = {"fixed_noise": "full", "network": "direct"}
    target = bind(folded, asking.get(mode, cast(Mode, mode)), draws, 1)
    right, margins = torch.zeros_like(labels), torch.zeros(len(images), device=images.device)
    asked = ASKED if target.stochastic else 1
    rows = torch.arange(len(images), device=images.device)
    groups = [some for some in rows.tensor_split((1, 1 + len(rows) // 3)) if len(some)]
    for draw in range(asked):
        for some in groups:
            with torch.enable_grad():
                logits = target[some](images[some].requires_grad_(), -1 - draw).detach()
            found = margin(logits, labels[some]) / logits.norm(dim=1).clamp_min(1e-30)
            # A tie counts for the label where it is the first, as in the scoring.
            right[some] += is_right(logits, labels[some])
            margins[some] += found.nan_to_num(0, 0, 0).float() / asked
    return right, margins


def violations(images: Tensor, clean: Tensor, threat: Linf | L2) -> list[str]:
    """Return in words how `images` (N,C,H,W) break the threat around `clean`; empty if they do not.

    Images must be float32, finite, in [0,1], and at most the radius plus `SLACK` away from `clean`,
    measured in float64.
    """
    found = []
    if images.dtype != torch.float32:
        found.append(f"stored as {images.dtype}, not float32")
    if not bool(images.isfinite().all()):
        found.append("pixels that are not finite")
    elif len(images) and (images.min() < 0 or images.max() > 1):
        found.append(f"pixels from {images.min():.4f} to {images.max():.4f}, outside [0,1]")
    if len(images):
        largest = threat.distance(images, clean).max().item()
        if not largest <= threat.eps + SLACK:
            found.append(f"{threat.norm} distance {largest:.6f} above {threat.eps:.6f}")
    return found
