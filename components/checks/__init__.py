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
from components.checks import gradients, models, trials
from components.checks.contract import Finding
from components.checks.trials import UNBOUNDED, Bench
from components.data import ImageSet
from components.defense import Defense, Mode

__all__ = ["Finding", "probe"]


def probe(
    defense: Defense, modes: Sequence[Mode], data: ImageSet, threat: Linf | L2, seed: int,
    images: int, eot: int, fooled: Tensor | None,
) -> list[Finding]:  # fmt: skip
    """Probe a defense on the first `images` images of `data`: models, gradients, eps = 1.

    `eot` is the number of draws its attacks average over. With `fooled` (N,) bool, which of all
    images the stored attacks of the full rung fool, the trials that cost attacks are run too.
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
    if fooled is not None and "full" in modes:
        findings += _thorough(bench, fooled[: len(x)].to(device), eot)
    return findings


def _thorough(bench: Bench, fooled: Tensor, eot: int) -> list[Finding]:
    attack = ApgdCe(kind="apgd_ce", steps=100, restarts=1, eot=1)
    findings = [
        trials.radii(bench),
        trials.converged(bench, fooled),
        trials.planted(bench, attack),
        trials.repeatable(bench),
    ]
    if bench.defense.stochastic:
        findings += [trials.fixed_noise(bench), trials.eot_enough(bench, eot)]
    return findings
