"""Probes: checks that need the defense itself, its gradients or attacks on it.

`probe` runs them where adversarial sets are crafted. Checks of stored sets and of scores are in
components/checks. The table in docs/evaluation.md says of every check when it fails, what that
means and what to do next; the numbers of checks are those of the table.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from components.attacks import L2, Linf
from components.attacks.apgd import ApgdCe
from components.data.image_set import ImageSet
from components.models.defense import Defense, Mode
from components.models.precision import full_precision
from components.probes import attacks, gradients, models
from components.probes.attacks import UNBOUNDED, Bench
from components.probes.contract import Finding

__all__ = ["Finding", "probe"]


@full_precision()
def probe(
    defense: Defense, modes: Sequence[Mode], data: ImageSet, threat: Linf | L2, seed: int,
    images: int, eot: int, stored: Sequence[Tensor] | None,
) -> list[Finding]:  # fmt: skip
    """Probe a defense on the first `images` images of `data`, in the gradient modes of its ladder.

    `eot` is the number of draws that its attacks average over. `stored` are the images (N,C,H,W)
    that the bounded attacks of the full rung made of `data`. With them the thorough probes run as
    well, which cost attacks of their own. In full float32 (`full_precision`), like the scores.
    """
    device = next(defense.classifier.parameters()).device
    rows = torch.arange(min(len(data), images))
    x, labels, ids = (
        part.to(device) for part in (data[rows].pixels(), data.labels[rows], data.ids[rows])
    )
    bench = Bench(defense, x, labels, ids, threat, seed)
    findings = [
        models.convention(data.pixels()),
        *models.check_logits(defense, x, bench.draws),
    ]
    for mode in modes:
        findings.append(gradients.gradient_present(defense, mode, x, labels, bench.draws))
        findings.append(gradients.loss_alive(defense, mode, x, labels, bench.draws))
    if "full" in modes:
        findings.append(gradients.gradient_correct(defense, x, labels, bench.draws))
        if defense.stochastic:
            findings.append(gradients.eot_agreement(defense, x, labels, bench.draws, eot))
    findings += attacks.unbounded(bench.pick(rows[:UNBOUNDED].to(device)), modes)
    if stored is not None and "full" in modes:
        findings += _thorough(bench, [part[: len(x)].to(device) for part in stored], eot)
    return findings


def _thorough(bench: Bench, stored: Sequence[Tensor], eot: int) -> list[Finding]:
    attack = ApgdCe(kind="apgd_ce", steps=100, restarts=1, eot=1)
    findings = [
        attacks.radii(bench),
        attacks.converged(bench, stored),
        attacks.planted(bench, attack),
        attacks.repeatable(bench),
    ]
    if bench.defense.stochastic:
        findings += [attacks.fixed_noise(bench), attacks.eot_enough(bench, eot)]
    return findings
