"""Doubts that take an attack to settle: whether effort pays, radius pays, and chance defends.

Each runs on a few dozen images. `unbounded` always runs; the others are what `thorough` adds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from components.attacks import L2, Attack, Linf
from components.attacks.apgd import ApgdCe
from components.attacks.contract import Search
from components.attacks.gradient import Pgd
from components.data.draws import Draws, Role
from components.models.accuracy import count_correct
from components.models.defense import Defense, Mode, Target, bind, fold
from components.probes.contract import SIGNIFICANT, Accuracies, Finding
from components.probes.statistics import holm, more_fooled

UNBOUNDED = 64
EOT = 4
RADII = (0.25, 0.5, 1.0, 2.0, 4.0)
ANSWERS = 20
PLANTED = 24
GUESSES = 100


@dataclass(frozen=True)
class Bench:
    """What a trial runs on: a defense, pixels (N,C,H,W) with labels and ids (N,), a threat."""

    defense: Defense
    x: Tensor
    labels: Tensor
    ids: Tensor
    threat: Linf | L2
    seed: int

    @property
    def draws(self) -> Draws:
        """Noise of role `attack` for these images."""
        return Draws(self.seed, "attack", self.ids)

    def pick(self, rows: Tensor) -> "Bench":
        """Return the bench with some of its images."""
        return replace(self, x=self.x[rows], labels=self.labels[rows], ids=self.ids[rows])

    def run(self, attack: Attack, mode: Mode, threat: Linf | L2, seed: int) -> Tensor:
        """Return what `attack` makes of the images."""
        draws = Draws(seed, "attack", self.ids)
        target = bind(fold(self.defense), mode, draws, getattr(attack, "eot", 1))
        return attack.run(target, self.x, self.labels, threat, draws).images

    def accuracies(self, images: Tensor, role: Role = "select") -> Accuracies:
        """Return the shares of right answers under noise that no attack has seen (N,)."""
        counts = count_correct(
            self.defense, images, self.labels, self.ids, self.seed, role, ANSWERS, len(images)
        )
        return counts / ANSWERS

    def pgd(self, steps: int, eot: int = EOT) -> Pgd:
        """Return PGD with a travel of 2.5 radii, whatever the number of steps."""
        return Pgd(
            kind="pgd", steps=steps, step=2.5 / steps, restarts=1, random_start=True,
            early_stop=True, eot=eot,
        )  # fmt: skip


def unbounded(bench: Bench, modes: Sequence[Mode]) -> list[Finding]:
    """Check 15: with the whole image space allowed, an attack must reach (almost) zero.

    From the image itself by gradient alone, and from an image of another class: the second must
    succeed for any defense that looks at its input, the first for any whose gradient leads there.
    """
    if not modes:
        return []
    x, labels = bench.x, bench.labels
    whole = Linf(norm="linf", eps_255=255.0)
    allowed = max(0.01 * len(x), 2)
    left = {"from itself": [], "from another class": []}  # type: dict[str, list[int]]
    for mode in modes:
        target = bind(bench.defense, mode, bench.draws, EOT)
        attack = Pgd(
            kind="pgd", steps=20, step=0.1, restarts=1, random_start=True, early_stop=True, eot=EOT
        )
        margins = attack.run(target, x, labels, whole, bench.draws).margin
        left["from itself"].append(int((margins > 0).sum()))
        search = Search(target, x, labels, drop=True)
        search.rows = torch.arange(len(x), device=x.device)
        search.query(_of_another_class(target, x, labels))
        left["from another class"].append(int((search.margin > 0).sum()))
        # One mode that gets there is enough, and the next may be dear.
        if all(min(counts) <= allowed for counts in left.values()):
            break
    names = {"from itself": "unbounded_by_gradient", "from another class": "unbounded"}
    return [
        Finding(
            name=names[start],
            level="block" if start == "from another class" else "warn",
            passed=min(counts) <= allowed,
            detail=f"at eps 1, started {start}, {min(counts)} of {len(x)} images stay right",
        )
        for start, counts in left.items()
    ]


def _of_another_class(target: Target, x: Tensor, labels: Tensor) -> Tensor:
    """Return for every image the next one in the batch that is known for another class.

    Known are those the defense answers right; where there is no other, an image's negative.
    """
    known, others = target.margins(x, labels, 0) > 0, 1 - x
    for row in range(len(x)):
        differing = ((labels != labels[row]) & known).nonzero().flatten()
        if len(differing):
            others[row] = x[differing[(differing > row).int().argmax()]]
    return others


def radii(bench: Bench) -> Finding:
    """Check 14: a larger ball never protects; PGD-20 at growing radii, each by itself.

    Compared pairwise by exact tests after Holm: no radius fools what twice as much leaves.
    """
    curve = {0.0: bench.accuracies(bench.x)}
    for factor in RADII:
        images = bench.run(bench.pgd(20), "full", bench.threat.scaled(factor), bench.seed)
        curve[factor] = bench.accuracies(images)
    values = holm([more_fooled(curve[near], curve[far]) for near, far in pairwise(curve)])
    figures = {f"{factor:g}": float(shares.mean()) for factor, shares in curve.items()}
    return Finding(
        name="radius_pays",
        level="block",
        passed=min(values) >= SIGNIFICANT,
        detail="right at multiples of the radius: "
        + ", ".join(f"{factor}: {value:.1%}" for factor, value in figures.items()),
        figures={**figures, "n": float(len(bench.x))},
    )


def converged(bench: Bench, stored: Sequence[Tensor]) -> Finding:
    """Check 13: what all stored attacks on the full rung left right, more steps leave right too.

    `stored` are their images (N,C,H,W) each. APGD from new starts, with 100 and then 200 steps, may
    lower the accuracy under the worst of all by at most max(1 %, 2 images), and under noise by no
    more than chance does; else the stored accuracy is an upper bound.
    """
    sets = [bench.x, *stored]
    before = _worst(bench, sets)
    for steps in (100, 200):
        attack = ApgdCe(kind="apgd_ce", steps=steps, restarts=1, eot=EOT)
        sets.append(bench.run(attack, "full", bench.threat, bench.seed + steps))
    after = _worst(bench, sets)
    lost = float(before.mean() - after.mean())
    chance = bench.defense.stochastic and more_fooled(after, before) >= SIGNIFICANT
    return Finding(
        name="converged",
        level="block",
        passed=lost <= max(0.01, 2 / len(bench.x)) or chance,
        detail=f"{before.mean():.1%} of {len(bench.x)} images are right under the worst of "
        f"{len(stored)} stored attacks, {after.mean():.1%} after 100 and 200 more steps of APGD",
        figures={"before": float(before.mean()), "after": float(after.mean())},
    )


def _worst(bench: Bench, sets: Sequence[Tensor]) -> Accuracies:
    """Return the shares right (N,) on the worst of `sets`, chosen by one noise, scored by other."""
    chosen = np.stack([bench.accuracies(images, "select") for images in sets]).argmin(0)
    scored = np.stack([bench.accuracies(images, "score") for images in sets])
    worst: Accuracies = scored[chosen, np.arange(len(chosen))]
    return worst


def fixed_noise(bench: Bench) -> Finding:
    """Check 23: how much of the accuracy is owed to chance: the attacker knows the very noise.

    PGD-20 against noise that stays the same, scored under that same noise, beside PGD-20 with EOT
    scored under fresh noise. It is no claim, and warns above ten points.
    """
    known = bench.run(bench.pgd(20), "fixed_noise", bench.threat, bench.seed)
    with torch.no_grad():
        right = bench.defense(known, bench.draws.redraw(0)).argmax(1) == bench.labels
    fresh = bench.accuracies(bench.run(bench.pgd(20), "full", bench.threat, bench.seed))
    gap = float(fresh.mean()) - float(right.double().mean())
    return Finding(
        name="chance",
        level="warn",
        passed=gap <= 0.1,
        detail=f"{float(right.double().mean()):.1%} right when the attacker knows the noise, "
        f"{fresh.mean():.1%} when it is drawn anew: {100 * gap:.1f} points are owed to chance",
        figures={"gap": gap},
    )


def eot_enough(bench: Bench, eot: int) -> Finding:
    """Check 21: twice the draws per gradient fool no more images (exact paired test)."""
    some, twice = (
        bench.accuracies(bench.run(bench.pgd(20, size), "full", bench.threat, bench.seed))
        for size in (eot, 2 * eot)
    )
    p = more_fooled(twice, some)
    return Finding(
        name="eot_enough",
        level="warn",
        passed=p >= SIGNIFICANT,
        detail=f"{some.mean():.1%} right under PGD-20 with {eot} draws per gradient, "
        f"{twice.mean():.1%} with {2 * eot} (p = {p:.3g})",
    )


def repeatable(bench: Bench) -> Finding:
    """Check 27: the same seed gives the same bytes and touches no global stream; seeds agree."""
    state = torch.random.get_rng_state()
    first, again = (bench.run(bench.pgd(10), "full", bench.threat, bench.seed) for _ in range(2))
    same = torch.equal(first, again) and torch.equal(state, torch.random.get_rng_state())
    seeds = [bench.accuracies(first)] + [
        bench.accuracies(bench.run(bench.pgd(10), "full", bench.threat, bench.seed + shift))
        for shift in (1, 2)
    ]
    means = np.array([shares.mean() for shares in seeds])
    return Finding(
        name="repeatable",
        level="warn",
        passed=same,
        detail=f"PGD-10 twice: {'equal' if same else 'other'} bytes; over 3 seeds "
        f"{means.mean():.1%} right, standard deviation {100 * means.std(ddof=1):.2f} points",
        figures={"mean": float(means.mean()), "deviation": float(means.std(ddof=1))},
    )


def planted(bench: Bench, attack: Attack) -> Finding:
    """Check 24: the attack finds adversarial examples that are known to exist.

    For every image a head on the defense's own logits is given a boundary that one known point of
    the ball crosses and none of many random ones does (after Zimmermann et al. 2022). Judges the
    attack against this defense's gradient; noise is held fixed.
    """
    found, sound = 0, 0
    for row in range(min(len(bench.x), PLANTED)):
        one = bench.pick(torch.tensor([row], device=bench.x.device))
        head = _head(one)
        if head is None:
            continue
        sound += 1
        defense = Defense(nn.Sequential(one.defense.classifier, head), one.defense.purifier)
        target = bind(defense.freeze(), "fixed_noise", one.draws, 1)
        zero = torch.zeros_like(one.labels)
        outcome = attack.run(target, one.x, zero, one.threat, one.draws)
        found += int(outcome.margin.item() <= 0)
    share = found / sound if sound else 0.0
    return Finding(
        name="planted",
        level="block",
        passed=sound > 0 and share >= 0.95,
        detail=f"{attack.kind} finds {found} of {sound} planted adversarial examples; random "
        "search finds none",
        figures={"share": share},
    )


class _Head(nn.Module):
    """Two logits of logits (1,K): zero, and how far they lie beyond a boundary."""

    way: Tensor
    boundary: Tensor

    def __init__(self, way: Tensor, boundary: Tensor) -> None:
        super().__init__()
        self.register_buffer("way", way)
        self.register_buffer("boundary", boundary)

    def forward(self, logits: Tensor) -> Tensor:
        beyond = logits @ self.way - self.boundary
        return torch.stack([torch.zeros_like(beyond), beyond], 1)


def _head(one: Bench) -> _Head | None:
    """Plant an example around a single image, or None where no random point stands out."""
    draws = one.draws.redraw(0)
    points = [one.threat.start(one.x, one.draws.redraw(k), "planted") for k in range(GUESSES)]
    with torch.no_grad():
        logits = torch.cat([one.defense(point, draws) for point in points])
        here = one.defense(one.x, draws)[0]
    far = (logits - here).norm(dim=1).argmax()
    way = logits[far] - here
    reach = logits @ way
    rest = torch.cat([reach[:far], reach[far + 1 :], (here @ way)[None]]).max()
    if not bool(reach[far] > rest):
        return None
    return _Head(way, (reach[far] + rest) / 2)
