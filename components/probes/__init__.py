"""Doubts about a score, and the probes behind them.

A check says what it looked at, whether it passed, and how grave a failure is. Probes need gradients
and are taken where attacks are crafted (`probe`); the rest judges stored sets (`sets`) and counts
(`scores`). `docs/evaluation.md` says of every name when it is raised, what that means and what to
do next.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from components.attacks import L2, Linf
from components.attacks.apgd import ApgdCe
from components.data.image_set import ImageSet
from components.models.defense import Defense, Mode
from components.probes import gradients, models, trials
from components.probes.contract import Finding
from components.probes.trials import UNBOUNDED, Bench

__all__ = ["Finding", "probe"]


def probe(
    defense: Defense, modes: Sequence[Mode], data: ImageSet, threat: Linf | L2, seed: int,
    images: int, eot: int, stored: Sequence[Tensor] | None,
) -> list[Finding]:  # fmt: skip
    """Probe a defense on the first `images` images of `data`: models, gradients, eps = 1.

    `eot` is the number of draws its attacks average over. With `stored`, what the attacks of the
    full rung that stay in the ball made of all images (N,C,H,W), the trials that cost attacks of
    their own are run too.
    """
    device = next(defense.classifier.parameters()).device
    rows = torch.arange(min(len(data), images))
    x, labels, ids = (
        part.to(device) for part in (data[rows].pixels(), data.labels[rows], data.ids[rows])
    )
    bench = Bench(defense, x, labels, ids, threat, seed)
    findings = [
        models.convention(data.pixels()),
        *models.answers(defense, x, labels, bench.draws),
    ]
    for mode in modes:
        findings.append(gradients.gradient_present(defense, mode, x, labels, bench.draws))
        findings.append(gradients.loss_alive(defense, mode, x, labels, bench.draws))
    if "full" in modes:
        findings.append(gradients.gradient_correct(defense, x, labels, bench.draws))
        if defense.stochastic:
            findings.append(gradients.eot_agreement(defense, x, labels, bench.draws, eot))
    findings += trials.unbounded(bench.pick(rows[:UNBOUNDED].to(device)), modes)
    if stored is not None and "full" in modes:
        findings += _thorough(bench, [part[: len(x)].to(device) for part in stored], eot)
    return findings


def _thorough(bench: Bench, stored: Sequence[Tensor], eot: int) -> list[Finding]:
    attack = ApgdCe(kind="apgd_ce", steps=100, restarts=1, eot=1)
    findings = [
        trials.radii(bench),
        trials.converged(bench, stored),
        trials.planted(bench, attack),
        trials.repeatable(bench),
    ]
    if bench.defense.stochastic:
        findings += [trials.fixed_noise(bench), trials.eot_enough(bench, eot)]
    return findings
