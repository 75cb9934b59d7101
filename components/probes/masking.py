"""Checks that do not believe gradients.

Stored examples stand beside a fresh attack, attacks run without gradients, and images are attacked
that nobody scored.
"""

from dataclasses import replace
from math import comb

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from components.attacks.apgd import ApgdDlr
from components.attacks.gradient import Pgd
from components.attacks.square import Square
from components.data.image_set import ImageSet
from components.models.defense import Defense, margin
from components.probes.bench import GRADIENT, WAY, Bench, Headed, spread, worst
from components.probes.contract import Finding, not_asked
from components.probes.statistics import more_fooled

# Square gets so many queries for each pixel of a side: a patch needs more tries on larger images.
QUERIES = 50
# What a further attack may fool: 5 points, and three images.
GAIN, AT_LEAST = 0.05, 3
# Images of each side that the search for a memory takes, and the least that say anything: on each
# side, and of those moved by a pixel.
ASKED, LEAST, LEAST_MOVED = 300, 60, 20
MEMORY = 0.001  # p-value
STEPS = 10  # of PGD, which need not be strong: two sides are compared


def unseen_gain(n: float) -> float:
    """Return the fraction of `n` images that a further attack may fool before it is noticed."""
    return max(GAIN, AT_LEAST / n)


def stored_attacks(bench: Bench) -> Finding:
    """Check 40: the stored examples are no weaker than a short attack of the probe itself.

    APGD of `WAY` may further fool 5 points, and three images, of what the worst stored examples
    leave right. Where it fools more, the sets were crafted with another gradient than the probes
    met, or by too weak attacks.
    """
    if bench.stored is None:
        before = after = bench.rate(bench.x)[1]
    else:
        rated = [bench.rate(images) for images in (bench.x, bench.stored)]
        before, after = worst(rated), worst([*rated, bench.rated_way])
    gain = float((before - after).mean())
    return Finding(
        name="stored_attacks",
        level="block",
        passed=gain <= unseen_gain(len(bench.x)),
        detail=f"of {len(bench.x)} images {before.mean():.1%} are right under the stored examples, "
        f"{after.mean():.1%} under {WAY.steps} steps of APGD too"
        if bench.stored is not None
        else "no examples are stored",
        figures={"gain": gain},
    )


def blind_attack(bench: Bench) -> Finding:
    """Check 35: attacks that do not see through fool next to nothing more than those that do.

    Examples of APGD against the classifier alone are tried, and examples of APGD that heeds only
    the classes that some image of the set has. Square runs on the images that attacks with
    gradients leave right: APGD on the log odds, and the stored examples or, without any, APGD on
    the DLR. Where answers are dear, images and queries are what the budget holds (`Bench.answers`).
    """
    random = bench.defense.stochastic
    # Against noise Square asks twice under two draws; it gets half of the queries.
    eot, queries = (2, QUERIES // 2) if random else (1, QUERIES)
    queries *= max(bench.x.shape[2:])
    affordable = bench.answers / (2 * eot if random else 1)
    rated = [bench.rated_way, *(bench.rate(images) for images in _white(bench))]
    before = worst(rated)
    rated += [bench.rate(images) for images in (*_grey(bench), *_of_classes(bench))]
    replayed = worst(rated)
    left = torch.from_numpy((replayed > 0.5).nonzero()[0]).to(bench.x.device)
    queries = max(min(queries, int(affordable / max(len(left), 1))), 100)
    tried = left[: max(int(affordable / queries), 8)]
    found = bench.x.clone()
    if len(tried):
        attack = Square(kind="square", queries=queries, eot=eot)
        found[tried] = bench.pick(tried).run(attack, bench.mode, bench.threat, bench.seed)
    after = worst([*rated, bench.rate(found)])
    # Where Square did not try all that was left, what it found stands for the rest.
    part = len(tried) / len(left) if len(left) else 1.0
    gain = float((before - replayed).mean() + (replayed - after).mean() / part)
    allowed = unseen_gain(len(bench.x) * part)
    return Finding(
        name="blind_attack",
        level="block",
        passed=gain <= allowed,
        detail=f"of {len(bench.x)} images {before.mean():.1%} are right under gradients, "
        f"{replayed.mean():.1%} under attacks on a part of it too, and {after.mean():.1%} once "
        f"Square has tried {len(tried)} of them {queries} times; a gap of {allowed:.1%} would show",
        figures={"gain": gain, "queries": queries, "tried": len(tried)},
    )


def _grey(bench: Bench) -> list[Tensor]:
    """Return what the gradient of the classifier alone makes of the images, behind a purifier."""
    if bench.defense.purifier is None:
        return []
    alone = replace(bench, defense=Defense(bench.defense.classifier, None).freeze(), mode="full")
    return [alone.run(WAY, "full", bench.threat, bench.seed)]


class _Some(nn.Module):
    """Leaves of logits (N,K) those of some classes."""

    classes: Tensor

    def __init__(self, classes: Tensor) -> None:
        super().__init__()
        self.register_buffer("classes", classes)

    def forward(self, logits: Tensor) -> Tensor:
        return logits[:, self.classes]


def _of_classes(bench: Bench) -> list[Tensor]:
    """Return what the gradient of the classes that occur makes of the images, if some do not.

    Classes that no image has, and that always come next to the first one, lead attacks astray.
    """
    classes = bench.classes
    if classes is None or len(classes) in (1, _classes(bench)):
        return []
    some = Defense(
        Headed(bench.defense.classifier, _Some(classes)), bench.defense.purifier
    ).freeze()
    labels = torch.searchsorted(classes, bench.labels)
    few = replace(bench, defense=some, labels=labels)
    return [few.run(WAY, bench.mode, bench.threat, bench.seed)]


def _white(bench: Bench) -> list[Tensor]:
    """Return the images, and what other gradients than those of `WAY` make of them."""
    if bench.stored is not None:
        return [bench.x, bench.stored]
    if _classes(bench) <= 2:
        return [bench.x]
    dlr = ApgdDlr(kind="apgd_dlr", steps=WAY.steps, restarts=1, eot=WAY.eot)
    return [bench.x, bench.run(dlr, bench.mode, bench.threat, bench.seed)]


def _classes(bench: Bench) -> int:
    """Return the number of classes that the defense knows."""
    with torch.no_grad():
        logits: Tensor = bench.defense(bench.x[:1], bench.draws[torch.arange(1)])
    return logits.shape[1]


def remembered(bench: Bench, test: ImageSet, val: ImageSet | None) -> Finding:
    """Check 36: the defense withstands no more on the test images than on images nobody scored.

    PGD attacks test and validation images, which must be right as often (Fisher's exact test, one
    side, p < 0.001), and the test images once more, moved by one pixel: of those that are answered
    as surely after the move, no more may fall (exact paired test). A defense that remembers the
    test images fails one or both.
    """
    count = min(ASKED, max(int(bench.answers / (GRADIENT * STEPS)) // 3, 1))
    mine = _sample(bench, test, count)
    theirs = None if val is None else _sample(bench, val, count)
    if theirs is None or min(len(mine.x), len(theirs.x)) < LEAST:
        n = 0 if theirs is None else len(theirs.x)
        return not_asked(
            "remembered",
            f"it takes {LEAST} test and validation images, and here are {len(mine.x)} and {n} "
            "within the budget",
        )
    here, there = _attacked(mine), _attacked(theirs)
    p = fisher(here.sum(), len(here), there.sum(), len(there))
    moved, kept = _moved(mine)
    shifted = _attacked(moved)
    pair = 1.0
    if len(kept) >= LEAST_MOVED:
        before = here[kept.cpu().numpy()]
        pair = more_fooled(shifted.astype(np.float64), before.astype(np.float64))
    smallest = _smallest(len(here), there.sum(), len(there))
    return Finding(
        name="remembered",
        level="block",
        passed=p >= MEMORY and pair >= MEMORY,
        detail=f"right under PGD: test {here.sum()} of {len(here)}, validation {there.sum()} of "
        f"{len(there)} (p = {p:.2g}); moved by a pixel {shifted.sum()} of {len(kept)} "
        f"(p = {pair:.2g}); a memory worth {smallest:.0%} of the images would show",
        figures={"p": p, "p_moved": pair, "smallest": smallest},
    )


def _sample(bench: Bench, data: ImageSet, count: int) -> Bench:
    """Return the bench with `count` images drawn from `data`."""
    rows = spread(data.ids, bench.secret, bench.seed, count)
    some = data[rows]
    device = bench.x.device
    return replace(
        bench, x=some.pixels().to(device), labels=some.labels.to(device), ids=some.ids.to(device),
        stored=None,
    )  # fmt: skip


def _attacked(bench: Bench) -> npt.NDArray[np.bool_]:
    """Return which images (N,) are right under PGD, most of the time if answers are random.

    Most are right always or never; a test on the fractions would count any tremor.
    """
    if not len(bench.x):
        return np.empty(0, np.bool_)
    attack = Pgd(
        kind="pgd", steps=STEPS, step=0.25, restarts=1, random_start=True, early_stop=True, eot=1
    )
    rows = torch.arange(len(bench.x), device=bench.x.device)
    found = [
        bench.pick(part).run(attack, bench.mode, bench.threat, bench.seed)
        for part in rows.split(bench.batch)  # type: ignore[no-untyped-call]
    ]
    right: npt.NDArray[np.bool_] = bench.accuracies(torch.cat(found)) > 0.5
    return right


def _moved(bench: Bench) -> tuple[Bench, Tensor]:
    """Move every image by one pixel, the best of four ways; return those that lose no margin.

    These are the images whose clean margin is at least nine tenths of what it was; also returns
    their rows. To small pictures a pixel is much, and an honest defense loses their margin first.
    """
    padded = nn.functional.pad(bench.x, (1, 1, 1, 1), mode="replicate")
    height, width = bench.x.shape[2:]
    ways = [
        padded[:, :, down : down + height, right : right + width]
        for down, right in ((0, 1), (2, 1), (1, 0), (1, 2))
    ]
    with torch.no_grad():
        margins = torch.stack(
            [margin(bench.defense(x, bench.draws), bench.labels) for x in (bench.x, *ways)]
        )
    best = margins[1:].argmax(0)
    rows = torch.arange(len(bench.x), device=bench.x.device)
    kept = rows[(margins[0] > 0) & (margins[1:].amax(0) >= 0.9 * margins[0])]
    moved = torch.stack(ways)[best, rows]
    some = bench.pick(kept)
    return replace(some, x=moved[kept]), kept


def fisher(a: int, n: int, b: int, m: int) -> float:
    """Return the one-sided p-value that a of n is not more than b of m (Fisher's exact test)."""
    total = a + b
    ways = sum(comb(n, k) * comb(m, total - k) for k in range(a, min(n, total) + 1))
    return ways / comb(n + m, total)


def _smallest(n: int, b: int, m: int) -> float:
    """Return the least gain in accuracy on n images that is found with 80 % power beside b of m."""
    critical = next((a for a in range(n + 1) if fisher(a, n, b, m) < MEMORY), n + 1)
    for percent in range(101):
        rate = percent / 100
        below = sum(comb(n, k) * rate**k * (1 - rate) ** (n - k) for k in range(critical))
        if below <= 0.2:
            return max(rate - b / m, 0.0)
    return 1.0
