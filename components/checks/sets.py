"""Checks of stored adversarial sets: their bytes, their provenance, and the effort behind them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from components.attacks import ASKED, L2, SLACK, Attack, Crafted, Linf, violations
from components.data.image_set import ImageSet
from components.models.accuracy import Counts
from components.probes.contract import Accuracies, Finding
from components.probes.statistics import shares_differ

# A margin below this fraction of the length of the logits may change its sign by rounding.
KNIFE_EDGE = 1e-3
# The fraction of images, and the number of them, on which answers may differ that close. Logits
# that are long for no reason put every margin there.
EXCUSED, EXCUSED_IMAGES = 0.02, 2
# The fraction of images, and the number of them, that rounding to 8 bits may fool further.
ROUNDED, ROUNDED_IMAGES = 0.02, 3
# Square's fresh colour is the one that a window has already with a probability of at most a half,
# whatever came before. So of n questions an attack leaves out at most n / 2 + `CHANCE` sqrt(n), but
# for a probability of 1e-13 (Hoeffding 1963).
CHANCE = 4
# The p-value under which two rates of right answers are different. It is small, because every set
# of every random defense is compared.
DIFFERENT = 1e-4
# Some images of a set as they are stored: (N,C,H,W), their ids and labels, and the test images of
# the same rows.
Part = tuple[Tensor, Tensor, Tensor, ImageSet]


def stored_set(
    name: str, parts: Iterable[Part], count: int, threat: Linf | L2 | None
) -> list[Finding]:
    """Checks 1, 2 and 7 on a stored set: the ball, the range, every one of `count` images once.

    It comes in parts, of which only one need be in memory. For attacks without a ball `threat` is
    None, and only the range is checked.
    """
    stored, complete, broken = 0, True, list[str]()
    for images, ids, labels, data in parts:
        stored += len(ids)
        complete &= torch.equal(ids, data.ids) and torch.equal(labels, data.labels)
        if complete and not broken:
            whole = Linf(norm="linf", eps_255=255.0)
            broken = violations(images, data.pixels(), threat or whole)
    complete &= stored == count
    findings = [
        Finding(
            name=f"accounting/{name}",
            level="block",
            passed=complete,
            detail=f"{stored} stored images against {count} test images"
            + ("" if complete else ": not the same images in the same order"),
        )
    ]
    if complete:
        ball = "inside the ball, " if threat else "without a ball: "
        findings.append(
            Finding(
                name=f"threat_model/{name}",
                level="block",
                passed=not broken,
                detail="; ".join(broken) or f"{ball}in [0,1], finite, float32",
            )
        )
    return findings


def agreement(name: str, digests: Mapping[str, tuple[str, str]]) -> Finding:
    """Check 30: the set was crafted against exactly the models on which it is scored.

    `digests` maps what it was crafted with to (digest at crafting, digest now).
    """
    changed = _changed(digests)
    detail = "crafted against the models that are scored"
    if changed:
        detail = f"crafted against another {' and '.join(changed)}: a transfer, not robust accuracy"
    return Finding(name=f"provenance/{name}", level="block", passed=not changed, detail=detail)


def stored_probes(
    required: Sequence[str], found: Sequence[str], digests: Mapping[str, tuple[str, str]]
) -> list[Finding]:
    """Checks 30 and 38 on stored findings: all are there, and they are about what is scored.

    `required` and `found` are names of findings, `digests` is as in `agreement`.
    """
    missing = [name for name in required if name not in found]
    changed = _changed(digests)
    return [
        Finding(
            name="probes_complete",
            level="block",
            passed=not missing,
            detail=f"of {len(required)} findings, {len(missing)} are missing"
            + (f": {', '.join(missing)}" if missing else ""),
        ),
        Finding(
            name="provenance/probes",
            level="block",
            passed=not changed,
            detail="probed was something else than is scored: it differs in " + ", ".join(changed)
            if changed
            else "probed was what is scored",
        ),
    ]


def _changed(digests: Mapping[str, tuple[str, str]]) -> list[str]:
    return [name for name, (then, now) in digests.items() if then != now]


@dataclass(frozen=True)
class Answers:
    """What an attack was answered about the images that it stored, as in `Crafted`: (N,) each.

    `asked` is the number of queries that `right` counts.
    """

    asked: int
    fooled: npt.NDArray[np.bool_]
    right: Counts
    margin: npt.NDArray[np.float32]

    @classmethod
    def of(cls, crafted: Crafted, stochastic: bool) -> "Answers":
        """Return the answers in a set that was crafted against the defense itself."""
        return cls(
            ASKED if stochastic else 1,
            crafted.fooled.numpy(),
            crafted.answers.numpy(),
            crafted.margin.numpy(),
        )

    @classmethod
    def joined(cls, parts: "Sequence[Answers]") -> "Answers":
        """Return the answers about several parts of one set."""
        return cls(
            parts[0].asked,
            np.concatenate([part.fooled for part in parts]),
            np.concatenate([part.right for part in parts]),
            np.concatenate([part.margin for part in parts]),
        )


def same_answer(name: str, crafting: Answers, scoring: Counts, draws: int, rough: bool) -> Finding:
    """Check 31: on the stored bytes, the scoring is answered as the attack was.

    `scoring` (N,) counts right answers of `draws` queries. A deterministic defense gives the same
    answer, except where the margin is within rounding, on at most max(2 %, 2) of the images;
    `rough` ones, which descend or round, may differ on 2 % of the images anywhere. The answers of a
    random one are compared by an exact test of their rates. A defense that knows when it is
    attacked differs, by whatever means it knows.
    """
    if crafting.asked > 1:
        p = shares_differ(crafting.right, crafting.asked, scoring, draws)
        passed = p >= DIFFERENT
        then, now = crafting.right.mean() / crafting.asked, scoring.mean() / draws
        detail = f"{then:.1%} right when crafted, {now:.1%} when scored (p = {p:.3g})"
    else:
        right = scoring > 0
        differ = (right != (crafting.right > 0)) | (right & crafting.fooled)
        clear = differ & (np.abs(crafting.margin) > KNIFE_EDGE)
        excused = int(differ.sum()) - int(clear.sum())
        passed = int(clear.sum()) <= (0.02 * len(scoring) if rough else 0)
        passed &= excused <= max(EXCUSED * len(scoring), EXCUSED_IMAGES)
        detail = (
            f"of {len(scoring)} answers {int(differ.sum())} differ between crafting and scoring, "
            f"{int(clear.sum())} of them by more than rounding, {excused} within it"
        )
    return Finding(name=f"same_answer/{name}", level="block", passed=passed, detail=detail)


def effort(
    name: str, attack: Attack, crafted: Crafted, classes: int, stochastic: bool
) -> Finding:  # fmt: skip
    """Check 26: every image that withstood cost the passes that the attack's settings promise.

    Forward and backward passes of all its parts, with the real number of `classes`; `stochastic`
    says whether the defense was, in the mode of the set. Forward passes that the attack left out
    because it knew their result (`spared`) count, but hardly more than half may be left out.
    Against a random defense no attack stops, so every image cost the whole. Else one that the
    attack took for fooled may have cost fewer: `same_answer` holds what it saw to the scoring.
    """
    withstood = crafted.fooled.logical_not() | stochastic
    promised = attack.effort(classes, stochastic)
    forward, backward = crafted.forward[withstood], crafted.backward[withstood]
    spared = crafted.spared[withstood]
    counted = forward + spared
    missing = (counted < promised.forward) | (backward < promised.backward)
    short = int((missing | (spared > counted / 2 + CHANCE * counted.sqrt())).sum())
    detail = f"{int(withstood.sum())} images {'of a random defense' if stochastic else 'withstood'}"
    if len(forward):
        detail += (
            f" cost at least {int(forward.min())} forward and {int(backward.min())} backward passes"
            f", and spared at most {int(spared.max())}"
        )
    return Finding(
        name=f"effort/{name}",
        level="block",
        passed=not short,
        detail=f"{detail}; {attack.kind} promises {promised.forward} and {promised.backward}",
    )


def in_levels(images: Tensor, origin: Tensor, threat: Linf | L2) -> Tensor:
    """Return images (N,C,H,W) at levels k/255, rounded without leaving the ball around `origin`.

    Pixels go to the nearest level. Where an image would leave the ball by that, those that moved
    away from `origin`, which is at such levels itself, go to the next level towards it.
    """
    nearest = (images * 255).round()
    start = (origin * 255).round()
    moved = nearest - start
    beyond = moved.abs() > (images.double() - origin.double()).abs() * 255
    inner = start + torch.where(beyond, moved - moved.sign(), moved)
    out = threat.distance(nearest / 255, origin) > threat.eps + SLACK
    return torch.where(out[:, None, None, None], inner, nearest) / 255


def rounding(exact: Accuracies, rounded: Accuracies) -> Finding:
    """Check 3: the worst examples fool about as many images after rounding to 8 bits.

    `exact` and `rounded` are the accuracies (N,) on each image before and after. Rounding is no
    attack. If it fools images that withstood, on over 2 % of them (over three), the stored examples
    are not the worst case, and the check blocks, however many images are right again: a defense may
    be another function at levels k/255 than between them.
    """
    n, right, after = len(exact), round(float(exact.sum())), round(float(rounded.sum()))
    further = int((exact - rounded > 0.5).sum())
    blocks = further > max(ROUNDED * n, ROUNDED_IMAGES)
    return Finding(
        name="quantisation",
        level="block" if blocks else "warn",
        passed=not blocks and abs(right - after) <= max(0.01 * n, 2),
        detail=f"of {n} images {right} are right on the stored examples, {after} once these are "
        f"rounded to 8 bits; {further} are fooled only then",
    )
