"""A purifier as a detector: how well its detector score tells attacked images from clean ones.

Positive means attacked; an image is rejected when its detector score exceeds a threshold. Thresholds
are fixed on clean validation images, all else is counted on test images. Beside the purifier
stands a control that knows nothing: how far an image is from black and white, which any change of
grey levels raises.
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
from components.models.defense import Defense
from components.probes.statistics import summarise

DetectorScores = npt.NDArray[np.float64]
# Clean images that may be rejected, as shares.
RATES = {"1": 0.01, "5": 0.05}
ROC = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
CURVE = (0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True)
class Watched:
    """Suspicions (N,) of every set by name, CLEAN among them, and those of validation images.

    `foreseen` are those an attacker sees who chooses among the sets: of a random purifier, under
    other noise. `control` are those of the detector that knows nothing.
    """

    detector_score: Mapping[str, DetectorScores]
    foreseen: Mapping[str, DetectorScores]
    control: Mapping[str, DetectorScores]
    validation: DetectorScores

    def inside(self, within: Mapping[str, npt.NDArray[np.bool_]]) -> "Watched":
        """Return it as the headline sees it: outside the ball an example counts as clean."""
        seen, foreseen = (
            {name: np.where(within[name], values, each[CLEAN]) for name, values in each.items()}
            for each in (self.detector_score, self.foreseen)
        )
        return replace(self, detector_score=seen, foreseen=foreseen)


def watch(
    defense: Defense, sets: Mapping[str, Tensor], ids: Tensor, val: Tensor, val_ids: Tensor,
    seed: int, batch: int,
) -> Watched | None:  # fmt: skip
    """Watch sets of images (N,C,H,W) with their ids, and clean validation images (M,C,H,W).

    None for a bare classifier, and for a purifier that suspects nothing since it changes nothing.
    """
    if defense.purifier is None:
        return None
    detector_score = {
        n: _detector_score(defense, x, ids, seed, "score", batch) for n, x in sets.items()
    }
    if not any(values.any() for values in detector_score.values()):
        return None
    foreseen = detector_score
    if defense.stochastic:
        foreseen = {
            n: _detector_score(defense, x, ids, seed, "select", batch) for n, x in sets.items()
        }
    control = {name: black_and_white(x) for name, x in sets.items()}
    return Watched(
        detector_score,
        foreseen,
        control,
        _detector_score(defense, val, val_ids, seed, "clean", batch),
    )


def merge(parts: Sequence[Watched | None]) -> Watched | None:
    """Put what was seen of parts of the images together."""
    seen = [part for part in parts if part is not None]
    if len(seen) < len(parts):
        return None
    return Watched(
        {
            n: np.concatenate([part.detector_score[n] for part in seen])
            for n in seen[0].detector_score
        },
        {n: np.concatenate([part.foreseen[n] for part in seen]) for n in seen[0].foreseen},
        {n: np.concatenate([part.control[n] for part in seen]) for n in seen[0].control},
        np.concatenate([part.validation for part in seen]),
    )


def detection(
    watched: Watched, within: Mapping[str, npt.NDArray[np.bool_]], counted: Mapping[str, Score]
) -> dict[str, Any]:
    """Sum up a detector: what it makes of every set, then of the worst of all.

    `within` says which examples are inside the ball, `counted` are scores as the headline sees
    them. `attacks` tell each set as it was stored from the clean images; `detect_or_correct` is the
    share of images on which no set both fools and passes; `curve` pairs clean images rejected with
    wrong answers let through, at thresholds for the shares of `CURVE`: at each of them the attacker
    chooses the set anew.
    """
    limits = {name: threshold(watched.validation, rate) for name, rate in RATES.items()}
    ours, clean = watched.inside(within), watched.detector_score[CLEAN]
    thresholds = [threshold(watched.validation, rate) for rate in CURVE]
    return {
        "validation": len(watched.validation),
        "clean_rejected": {
            name: summarise(rejected(clean, limit).astype(np.float64))
            for name, limit in limits.items()
        },
        "attacks": {
            name: {
                "auc": auc(clean, seen),
                "control_auc": auc(watched.control[CLEAN], watched.control[name]),
                **{f"tpr_{rate}": float(rejected(seen, x).mean()) for rate, x in limits.items()},
                "roc": roc(clean, seen),
            }
            for name, seen in watched.detector_score.items()
            if name != CLEAN
        },
        "detect_or_correct": {
            name: summarise(withstood(ours, counted, limit)) for name, limit in limits.items()
        },
        "curve": [
            (float(rejected(clean, x).mean()), float(1 - withstood(ours, counted, x).mean()))
            for x in thresholds
        ],
    }


def auc(clean: DetectorScores, attacked: DetectorScores) -> float:
    """Return the area under the ROC curve: the chance that an attacked image looks odder.

    Ties count half (Mann and Whitney 1947). What is not a number is the oddest.
    """
    ordered, attacked = np.sort(_numbers(clean)), _numbers(attacked)
    below = np.searchsorted(ordered, attacked, "left")
    upto = np.searchsorted(ordered, attacked, "right")
    return float((below + upto).mean() / (2 * len(ordered)))


def roc(clean: DetectorScores, attacked: DetectorScores) -> list[tuple[float, float]]:
    """Return points of the ROC curve: shares of clean and of attacked images rejected.

    At thresholds on these clean images for the shares of `ROC`, strictest first.
    """
    limits = [threshold(clean, rate) for rate in ROC]
    found = [(rejected(clean, x).mean(), rejected(attacked, x).mean()) for x in limits]
    return [*((float(false), float(true)) for false, true in found), (1.0, 1.0)]


def threshold(clean: DetectorScores, rate: float) -> float:
    """Return the detector score that at most a share `rate` of these clean images exceed."""
    ordered = np.sort(_numbers(clean))
    return float(ordered[max(0, len(ordered) - 1 - int(rate * len(ordered)))])


def rejected(detector_score: DetectorScores, limit: float) -> npt.NDArray[np.bool_]:
    """Return which images (N,) are rejected."""
    return np.asarray(_numbers(detector_score) > limit)


def withstood(
    watched: Watched, counted: Mapping[str, Score], limit: float
) -> npt.NDArray[np.float64]:
    """Return per image (N,) how often the best of all sets is answered right, or rejected.

    The attacker takes for every image the set that fools most often among those let through, both
    by noise of role `select`; counted is other noise. The clean image is among the sets.
    """
    names = list(counted)

    def right(seen: Mapping[str, DetectorScores], of: str) -> npt.NDArray[np.float64]:
        shares = {name: getattr(counted[name], of) / counted[name].draws for name in names}
        return np.stack([np.where(rejected(seen[n], limit), 1.0, shares[n]) for n in names])

    select, score = right(watched.foreseen, "select"), right(watched.detector_score, "score")
    found: npt.NDArray[np.float64] = score[select.argmin(0), np.arange(score.shape[1])]
    return found


def black_and_white(x: Tensor) -> DetectorScores:
    """Return the control score of images (N,C,H,W): |x - 1[x > 0.5]|^2 (N,)."""
    nearest = (x > 0.5).to(x.dtype)
    return np.asarray((x - nearest).square().flatten(1).sum(1).double().numpy())


def _detector_score(
    defense: Defense, x: Tensor, ids: Tensor, seed: int, role: Role, batch: int
) -> DetectorScores:
    assert defense.purifier is not None
    device = next(defense.classifier.parameters()).device
    parts = [torch.empty(0)]
    with torch.no_grad():
        for rows in torch.arange(len(x)).split(batch):  # type: ignore[no-untyped-call]
            # Under a draw on which no answer is counted.
            draws = Draws(seed, role, ids[rows].to(device), draw=-1)
            parts.append(defense.purifier.detector_score(x[rows].to(device), draws).cpu())
    return np.asarray(torch.cat(parts).double().numpy())


def _numbers(detector_score: DetectorScores) -> DetectorScores:
    return np.where(np.isnan(detector_score), np.inf, detector_score)
