"""Checks that run attacks of their own, on a few dozen images.

`unbounded` always runs. The others run where `checks.thorough` is true.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from components.attacks import Attack, Linf
from components.attacks.apgd import ApgdCe
from components.attacks.gradient import Pgd
from components.attacks.search import Search
from components.models.defense import Defense, Mode, Target, bind
from components.probes.bench import EOT, Bench, Headed, worst
from components.probes.contract import SIGNIFICANT, Finding
from components.probes.statistics import holm, more_fooled

RADII = (0.25, 0.5, 1.0, 2.0, 4.0)
PLANTED = 24  # images
GUESSES = 100  # random points, around one image


def unbounded(bench: Bench, modes: Sequence[Mode]) -> list[Finding]:
    """Check 15: if any image is allowed, an attack must bring the accuracy (almost) to zero.

    It starts from the image itself, which succeeds if the gradient leads to another class, and from
    an image of another class, which succeeds if the defense depends on its input at all. A defense
    that is right on one class alone has no such image; its accuracy is the share of that class.
    """
    if not modes:
        return []
    x, labels = bench.x, bench.labels
    whole = Linf(norm="linf", eps_255=255.0)
    # A lucky draw may answer an image of another class as this one.
    allowed = max((0.1 if bench.defense.stochastic else 0.01) * len(x), 2)
    left = {"from itself": [], "from another class": []}  # type: dict[str, list[int]]
    for mode in modes:
        target = bind(bench.defense, mode, bench.draws, EOT)
        attack = Pgd(
            kind="pgd", steps=20, step=0.1, restarts=1, random_start=True, early_stop=True, eot=EOT
        )
        margins = attack.run(target, x, labels, whole, bench.draws).margin
        left["from itself"].append(int((margins > 0).sum()))
        others, known = of_another_class(target, x, labels)
        search = Search(target, x, labels, whole, early_stop=False)
        search.query(others)
        left["from another class"].append(int((known & (search.margin > 0)).sum()))
        # One mode that succeeds is enough, and the next may be expensive.
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


def of_another_class(target: Target, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return for every image the next one that is right as another class, and whether there is one.

    Where there is none, the image itself stands in.
    """
    right, others = target.margins(x, labels, 0) > 0, x.clone()
    known = torch.zeros_like(right)
    for row in range(len(x)):
        differing = ((labels != labels[row]) & right).nonzero().flatten()
        if len(differing):
            others[row], known[row] = x[differing[(differing > row).int().argmax()]], True
    return others, known


def radii(bench: Bench) -> Finding:
    """Check 14: a larger radius never protects. PGD-20 attacks each radius separately.

    No radius may fool significantly more images than the next larger one (paired tests, Holm).
    """
    curve = {0.0: bench.accuracies(bench.x)}
    for factor in RADII:
        images = bench.run(bench.pgd(20), "full", bench.threat.scaled(factor), bench.seed)
        curve[factor] = bench.accuracies(images)
    values = holm([more_fooled(curve[near], curve[far]) for near, far in pairwise(curve)])
    figures = {f"{factor:g}": float(right.mean()) for factor, right in curve.items()}
    return Finding(
        name="radius_pays",
        level="block",
        passed=min(values) >= SIGNIFICANT,
        detail="right at multiples of the radius: "
        + ", ".join(f"{factor}: {value:.1%}" for factor, value in figures.items()),
        figures={**figures, "n": float(len(bench.x))},
    )


def converged(bench: Bench, stored: Sequence[Tensor]) -> Finding:
    """Check 13: more steps fool no more images than the stored attacks on the full rung did.

    `stored` are the images (N,C,H,W) of each. APGD from new starts, with 100 and then 200 steps,
    may lower the accuracy under the worst of all by at most max(1 %, 2 images), and under noise by
    no more than chance; else the stored accuracy is an upper bound.
    """
    sets = [bench.rate(images) for images in (bench.x, *stored)]
    before = worst(sets)
    for steps in (100, 200):
        attack = ApgdCe(kind="apgd_ce", steps=steps, restarts=1, eot=EOT)
        sets.append(bench.rate(bench.run(attack, "full", bench.threat, bench.seed + steps)))
    after = worst(sets)
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


def fixed_noise(bench: Bench) -> Finding:
    """Check 23: how much accuracy is lost when the attacker knows the noise; warns above 10 points.

    Compares PGD-20 against fixed noise, scored under that noise, with PGD-20 with EOT, scored under
    fresh noise.
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
    """Check 21: twice as many draws per gradient fool no more images (exact paired test)."""
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
    """Check 27: the same seed gives the same bytes and leaves the global random stream untouched.

    The detail has mean and deviation of the accuracy over three seeds.
    """
    state = torch.random.get_rng_state()
    first, again = (bench.run(bench.pgd(10), "full", bench.threat, bench.seed) for _ in range(2))
    same = torch.equal(first, again) and torch.equal(state, torch.random.get_rng_state())
    seeds = [bench.accuracies(first)] + [
        bench.accuracies(bench.run(bench.pgd(10), "full", bench.threat, bench.seed + shift))
        for shift in (1, 2)
    ]
    means = np.array([right.mean() for right in seeds])
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

    For every image, a head on the logits of the defense gets a boundary that one known point of the
    ball crosses and no other of `GUESSES` random points does (after Zimmermann et al. 2022). A
    failure means that the attack cannot use the gradient of this defense. The noise is fixed.
    """
    found, count = 0, 0
    for row in range(min(len(bench.x), PLANTED)):
        one = bench.pick(torch.tensor([row], device=bench.x.device))
        head = _head(one)
        if head is None:
            continue
        count += 1
        defense = Defense(Headed(one.defense.classifier, head), one.defense.purifier)
        target = bind(defense.freeze(), "fixed_noise", one.draws, 1)
        zero = torch.zeros_like(one.labels)
        outcome = attack.run(target, one.x, zero, one.threat, one.draws)
        found += int(outcome.margin.item() <= 0)
    fraction = found / count if count else 0.0
    return Finding(
        name="planted",
        level="block",
        passed=count > 0 and fraction >= 0.95,
        detail=f"{attack.kind} finds {found} of {count} planted adversarial examples; random "
        "search finds none",
        figures={"share": fraction},
    )


class _Head(nn.Module):
    """Turns logits (1,K) into two: zero, and how far they lie beyond a boundary."""

    direction: Tensor
    boundary: Tensor

    def __init__(self, direction: Tensor, boundary: Tensor) -> None:
        super().__init__()
        self.register_buffer("direction", direction)
        self.register_buffer("boundary", boundary)

    def forward(self, logits: Tensor) -> Tensor:
        beyond = logits @ self.direction - self.boundary
        return torch.stack([torch.zeros_like(beyond), beyond], 1)


def _head(one: Bench) -> _Head | None:
    """Plant an example around a single image; return None if no random point stands out."""
    draws = one.draws.redraw(0)
    points = [one.threat.start(one.x, one.draws.redraw(k), "planted") for k in range(GUESSES)]
    with torch.no_grad():
        logits = torch.cat([one.defense(point, draws) for point in points])
        here = one.defense(one.x, draws)[0]
    far = (logits - here).norm(dim=1).argmax()
    direction = logits[far] - here
    reach = logits @ direction
    rest = torch.cat([reach[:far], reach[far + 1 :], (here @ direction)[None]]).max()
    if not bool(reach[far] > rest):
        return None
    return _Head(direction, (reach[far] + rest) / 2)
