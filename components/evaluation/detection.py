"""Purifiers as detectors: how well detector scores separate attacked images from clean ones.

Positive means attacked: an image is rejected if its detector score exceeds a threshold. Thresholds
are set on clean validation images, everything else is counted on test images. The control is a
detector without a purifier: the distance of an image from black and white, which any change of grey
levels raises.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from components.data.draws import Draws, Role
from components.evaluation.counting import CLEAN, Score
from components.models.accuracy import Values
from components.models.defense import Defense, draws_noise
from components.models.precision import full_precision
from components.probes.contract import Accuracies
from components.probes.statistics import summarise

# Fractions of clean images that may be rejected: those of the tables, of `roc` and of the curve.
RATES = {"1": 0.01, "5": 0.05}
ROC = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
CURVE = (0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True)
class DetectorScores:
    """Detector scores of sets by name, CLEAN among them: (N,) each, and (M,) of `validation`.

    An attacker who chooses among the sets sees `select`, and `score` is counted. Of a stochastic
    purifier the two are under different noise, else they are the same. `control` holds the scores
    of the control.
    """

    score: Mapping[str, Values]
    select: Mapping[str, Values]
    control: Mapping[str, Values]
    validation: Values

    def inside(self, within: Mapping[str, npt.NDArray[np.bool_]]) -> "DetectorScores":
        """Return the scores that the headline counts: outside the ball, that of the clean image."""
        score, select = (
            {name: np.where(within[name], values, sets[CLEAN]) for name, values in sets.items()}
            for sets in (self.score, self.select)
        )
        return replace(self, score=score, select=select)


@full_precision()
def detector_scores(
    defense: Defense, sets: Mapping[str, Tensor], ids: Tensor, val: Tensor, val_ids: Tensor,
    seed: int, batch: int, known: Mapping[str, Values],
) -> DetectorScores | None:  # fmt: skip
    """Return the scores of sets of images (N,C,H,W) and of clean validation images (M,C,H,W).

    `known` are scores by set that a deterministic defense gave when its answers were counted
    (`count_with_detector`): these sets are not purified again. M may be 0. A bare classifier has no
    scores: it gives None. In full float32 (`full_precision`).
    """
    if defense.purifier is None:
        return None

    def values(x: Tensor, x_ids: Tensor, role: Role) -> Values:
        return _detector_score(defense, x, x_ids, seed, role, batch)

    assert not (known and defense.stochastic)
    score = {
        name: known[name] if name in known else values(x, ids, "score") for name, x in sets.items()
    }
    select = score
    if draws_noise(defense.purifier):
        select = {name: values(x, ids, "select") for name, x in sets.items()}
    control = {name: black_and_white(x) for name, x in sets.items()}
    return DetectorScores(score, select, control, values(val, val_ids, "clean"))


def merge(shards: Sequence[DetectorScores | None]) -> DetectorScores | None:
    """Join the scores of several shards of the images, in their order; None if one is None.

    Nor is a purifier a detector if it changes no image of any shard, and so scores all 0.
    """
    known = [shard for shard in shards if shard is not None]
    changed = any(values.any() for shard in known for values in shard.score.values())
    if len(known) < len(shards) or not changed:
        return None

    def joined(of: str) -> dict[str, Values]:
        return {
            name: np.concatenate([getattr(shard, of)[name] for shard in known])
            for name in getattr(known[0], of)
        }

    validation = np.concatenate([shard.validation for shard in known])
    return DetectorScores(joined("score"), joined("select"), joined("control"), validation)


def detection(
    scores: DetectorScores,
    within: Mapping[str, npt.NDArray[np.bool_]],
    counted: Mapping[str, Score],
) -> dict[str, Any]:
    """Sum up a detector: on every set, then on the worst of all sets.

    `within` says which examples are inside the ball, `counted` are the scores that the headline
    counts. Of the result, `attacks` compares each set, as it was stored, with the clean images.
    `detect_or_correct` is the fraction of images on which no set both fools the defense and passes
    the detector. `curve` has points (fraction of clean images rejected, fraction of wrong answers
    that pass) at the thresholds for `CURVE`; the attacker chooses the worst set anew at each.
    """
    limits = {name: threshold(scores.validation, rate) for name, rate in RATES.items()}
    bounded, clean = scores.inside(within), scores.score[CLEAN]
    thresholds = [threshold(scores.validation, rate) for rate in CURVE]
    return {
        "validation": len(scores.validation),
        "clean_rejected": {
            name: summarise(rejected(clean, limit).astype(np.float64))
            for name, limit in limits.items()
        },
        "attacks": {
            name: {
                "auc": auc(clean, attacked),
                "control_auc": auc(scores.control[CLEAN], scores.control[name]),
                **{
                    f"tpr_{rate}": float(rejected(attacked, limit).mean())
                    for rate, limit in limits.items()
                },
                "roc": roc(clean, attacked),
            }
            for name, attacked in scores.score.items()
            if name != CLEAN
        },
        "detect_or_correct": {
            name: summarise(withstood(bounded, counted, limit)) for name, limit in limits.items()
        },
        "curve": [
            (
                float(rejected(clean, limit).mean()),
                float(1 - withstood(bounded, counted, limit).mean()),
            )
            for limit in thresholds
        ],
    }


def auc(clean: Values, attacked: Values) -> float:
    """Return the area under the ROC curve: the chance that an attacked image scores higher.

    Ties count half (Mann and Whitney 1947). NaN counts as infinity.
    """
    ordered, attacked = np.sort(_numbers(clean)), _numbers(attacked)
    below = np.searchsorted(ordered, attacked, "left")
    upto = np.searchsorted(ordered, attacked, "right")
    return float((below + upto).mean() / (2 * len(ordered)))


def roc(clean: Values, attacked: Values) -> list[tuple[float, float]]:
    """Return points of the ROC curve: fractions of clean and of attacked images rejected.

    Thresholds are set on these clean images for the fractions in `ROC`, from the highest down.
    """
    limits = [threshold(clean, rate) for rate in ROC]
    found = [(rejected(clean, x).mean(), rejected(attacked, x).mean()) for x in limits]
    return [*((float(false), float(true)) for false, true in found), (1.0, 1.0)]


def threshold(clean: Values, rate: float) -> float:
    """Return the detector score that at most the fraction `rate` of these clean images exceed."""
    ordered = np.sort(_numbers(clean))
    return float(ordered[max(0, len(ordered) - 1 - int(rate * len(ordered)))])


def rejected(scores: Values, limit: float) -> npt.NDArray[np.bool_]:
    """Return which images (N,) are rejected."""
    return np.asarray(_numbers(scores) > limit)


def withstood(scores: DetectorScores, counted: Mapping[str, Score], limit: float) -> Accuracies:
    """Return per image (N,) how often the attacker's best set is classified right or rejected.

    For every image the attacker takes the set that fools most often without being rejected, by
    noise of role `select`; the result is counted under other noise. The clean image is a set, too.
    """
    names = list(counted)

    def right(values: Mapping[str, Values], of: str) -> npt.NDArray[np.float64]:
        accuracies = {name: getattr(counted[name], of) / counted[name].draws for name in names}
        return np.stack([np.where(rejected(values[n], limit), 1.0, accuracies[n]) for n in names])

    select, score = right(scores.select, "select"), right(scores.score, "score")
    found: Accuracies = score[select.argmin(0), np.arange(score.shape[1])]
    return found


def black_and_white(x: Tensor) -> Values:
    """Return the control score of images (N,C,H,W): |x - 1[x > 0.5]|^2 (N,)."""
    nearest = (x > 0.5).to(x.dtype)
    return np.asarray((x - nearest).square().flatten(1).sum(1).double().numpy())


def _detector_score(
    defense: Defense, x: Tensor, ids: Tensor, seed: int, role: Role, batch: int
) -> Values:
    assert defense.purifier is not None
    device = next(defense.classifier.parameters()).device
    parts = [torch.empty(0)]
    with torch.no_grad():
        for start in range(0, len(x), batch):
            rows = slice(start, start + batch)
            # No answer is counted under draw -1.
            draws = Draws(seed, role, ids[rows].to(device), draw=-1)
            parts.append(defense.detector_score(x[rows].to(device), draws).cpu())
    return np.asarray(torch.cat(parts).double().numpy())


def _numbers(scores: Values) -> Values:
    return np.where(np.isnan(scores), np.inf, scores)
