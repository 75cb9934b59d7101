"""Detectors: areas and thresholds by hand, and an attacker who chooses the set that passes."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from components.data.draws import NoiseStream
from components.evaluation.counting import Score, count_score, count_sets, count_with_detector
from components.evaluation.detection import (
    DetectorScores,
    auc,
    black_and_white,
    detection,
    detector_scores,
    merge,
    rejected,
    roc,
    threshold,
    withstood,
)
from components.models.accuracy import UNREADABLE, predict_and_detect
from components.models.defense import Defense
from components.models.purifiers.contract import Purifier


def floats(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def score_of(*right: int, draws: int = 1) -> Score:
    return Score(draws, np.array(right), np.array(right))


def test_the_area_is_the_probability_that_the_attacked_image_scores_higher() -> None:
    assert auc(floats(1, 2, 3), floats(4, 5)) == 1.0
    assert auc(floats(4, 5), floats(1, 2, 3)) == 0.0
    assert auc(floats(1, 2), floats(1, 2)) == 0.5
    # Six pairs: (0,1)+ (0,2)+ (1,1)= (1,2)+ (3,1)- (3,2)- are 3.5 of 6.
    assert auc(floats(0, 1, 3), floats(1, 2)) == pytest.approx(3.5 / 6)
    assert auc(floats(1, 2), floats(np.nan, 9)) == 1.0, "NaN counts as infinity"


def test_the_area_equals_an_integral_of_the_curve() -> None:
    generator = np.random.default_rng(0)
    clean, attacked = generator.normal(size=300), generator.normal(0.7, 1.3, size=200)
    cuts = np.concatenate([[np.inf], np.sort(np.concatenate([clean, attacked]))[::-1], [-np.inf]])
    fpr = np.array([(clean > cut).mean() for cut in cuts])
    tpr = np.array([(attacked > cut).mean() for cut in cuts])
    assert auc(clean, attacked) == pytest.approx(np.trapezoid(tpr, fpr), abs=1e-9)


@pytest.mark.parametrize(("rate", "limit"), [(0.0, 10), (0.1, 9), (0.15, 9), (0.2, 8), (1.0, 1)])
def test_at_most_the_given_fraction_exceeds_a_threshold(rate: float, limit: float) -> None:
    clean = floats(3, 1, 2, 4, 10, 9, 8, 7, 6, 5)
    assert threshold(clean, rate) == limit
    assert rejected(clean, limit).mean() <= rate


def test_a_roc_curve_equals_a_count() -> None:
    clean, attacked = floats(*range(10)), floats(4.5, 8.5, 9.5, 20)
    points = roc(clean, attacked)
    # Nine of ten clean images are below 9, five below 5, and so on.
    assert points[0] == (0.0, 0.5) and points[-1] == (1.0, 1.0)
    assert (0.1, 0.75) in [(round(false, 9), true) for false, true in points]
    assert (0.5, 1.0) in points
    for (false, true), (next_false, next_true) in pairwise(points):
        assert next_false >= false and next_true >= true
    # The area lies between the sums below and above the steps.
    steps = list(pairwise([(0.0, 0.0), *points]))
    below, above = (sum((b[0] - a[0]) * side(a, b)[1] for a, b in steps) for side in (min, max))
    assert below <= auc(clean, attacked) <= above < below + 0.1
    assert roc(clean, clean)[3][0] == roc(clean, clean)[3][1]


def test_the_attacker_chooses_a_set_that_fools_and_passes() -> None:
    """Image 0: the set that fools is rejected, the other is right. 1: a set that fools passes. 2:
    both are rejected. 3: the clean image is itself wrong, and passes.
    """
    seen = {
        "clean": floats(0, 0, 0, 0),
        "full/a": floats(9, 0, 9, 9),
        "bpda/b": floats(0, 9, 9, 9),
    }
    scores = DetectorScores(seen, seen, {}, floats(1, 1, 1, 1))
    counted = {
        "clean": score_of(1, 1, 1, 0),
        "full/a": score_of(0, 0, 0, 0),
        "bpda/b": score_of(1, 0, 0, 0),
    }
    assert withstood(scores, counted, 1.0).tolist() == [1, 0, 1, 0]
    assert withstood(scores, counted, np.inf).tolist() == [0, 0, 0, 0]


def test_selection_and_scoring_share_no_draws() -> None:
    seen = {"clean": floats(0), "full/a": floats(0)}
    scores = DetectorScores(seen, seen, {}, floats(1))
    clean = Score(4, np.array([3]), np.array([1]))
    attacked = Score(4, np.array([2]), np.array([4]))
    assert withstood(scores, {"clean": clean, "full/a": attacked}, 1.0).tolist() == [1.0]
    # Chosen because it passes under the noise that selects; rejected under the noise that scores.
    caught = DetectorScores({"clean": floats(0), "full/a": floats(9)}, seen, {}, floats(1))
    half = Score(4, np.array([1]), np.array([1]))
    assert withstood(caught, {"clean": clean, "full/a": half}, 1.0).tolist() == [1.0]


def test_an_example_outside_the_ball_has_the_score_of_the_clean_image() -> None:
    seen = {"clean": floats(1, 2), "full/cw": floats(8, 9)}
    scores = DetectorScores(seen, {"clean": floats(3, 4), "full/cw": floats(6, 7)}, {}, floats(0))
    within = {"clean": np.array([True, True]), "full/cw": np.array([True, False])}
    assert scores.inside(within).score["full/cw"].tolist() == [8, 2]
    assert scores.inside(within).select["full/cw"].tolist() == [6, 4]


class Halve(Purifier):
    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        return x / 2


class Shifted(Purifier):
    stochastic = True

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        assert stream is not None
        return x + stream.normal(tuple(x.shape[1:]), "noise")


class Nothing(Purifier):
    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        return x


def test_detector_scores_of_defenses_with_and_without_a_detector() -> None:
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).requires_grad_(False)
    x, ids = torch.rand(5, 1, 2, 2), torch.arange(5)
    sets = {"clean": x, "full/pgd": (x + 0.3).clamp(0, 1)}

    def scores_of(purifier: Purifier | None, batch: int) -> DetectorScores | None:
        return detector_scores(
            Defense(classifier, purifier), sets, ids, x[:3], ids[:3], 0, batch, {}
        )

    whole = scores_of(Halve(), 5)
    assert whole is not None
    assert np.allclose(whole.score["clean"], (x / 2).square().flatten(1).mean(1))
    assert np.allclose(whole.validation, whole.score["clean"][:3])
    batched = scores_of(Halve(), 2)
    assert batched is not None and np.allclose(batched.score["full/pgd"], whole.score["full/pgd"])
    assert scores_of(None, 5) is None and merge([scores_of(Nothing(), 5)] * 2) is None
    assert merge([whole, None]) is None
    # It is a detector if it changes an image of any shard.
    assert merge([whole, scores_of(Nothing(), 5)]) is not None
    assert whole.select is whole.score
    noisy = scores_of(Shifted(), 5)
    assert noisy is not None and not np.allclose(noisy.select["clean"], noisy.score["clean"])
    known = {"clean": whole.score["clean"] + 1}
    defense = Defense(classifier, Halve())
    given = detector_scores(defense, sets, ids, x[:3], ids[:3], 0, 5, known)
    assert given is not None and given.score["clean"] is given.select["clean"] is known["clean"]
    assert np.array_equal(given.score["full/pgd"], whole.score["full/pgd"])
    both = merge([whole, whole])
    assert both is not None and len(both.validation) == 6 and len(both.control["clean"]) == 10


class Listening(Halve):
    """Keeps what it purifies."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Tensor] = []

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        self.asked.append(x)
        return super().purify(x, stream)


def test_an_image_is_purified_once_for_its_answer_and_its_detector_score() -> None:
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).requires_grad_(False)
    x, ids, labels = torch.rand(7, 1, 2, 2), torch.arange(7), torch.arange(7) % 2
    sets = {"full/a": x, "full/b": (x + 0.3).clamp(0, 1), "full/c": x.flip(3)}
    defense = Defense(classifier, Listening()).freeze()
    counted = count_sets(defense, sets, ids, labels, ids, 0, 2, 2, 3)
    clean = count_with_detector(defense, 1 - x, labels, ids, 0, "clean", 2, 2, 3)
    assert isinstance(defense.purifier, Listening)
    assert len(torch.cat(defense.purifier.asked)) == 4 * len(x)
    every = {"clean": 1 - x, **sets}
    apart = detector_scores(Defense(classifier, Halve()), every, ids, x[:0], ids[:0], 0, 3, {})
    assert apart is not None and list(counted) == list(sets)
    for name, each in {"clean": clean, **counted}.items():
        one = each.score
        assert each.detected is not None
        np.testing.assert_allclose(each.detected, apart.score[name], rtol=1e-6)
        other = count_score(
            Defense(classifier, Halve()), every[name], labels, ids, 0, "score", 2, 2, 7
        )
        assert one.draws == other.draws and np.array_equal(one.score, other.score)
        assert np.array_equal(one.select, other.select)


@pytest.mark.parametrize("purifier", [None, Shifted()])
def test_without_a_deterministic_purifier_no_detector_score_comes_with_an_answer(
    purifier: Purifier | None,
) -> None:
    """The noise of a detector is never that of an answer."""
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).requires_grad_(False)
    x, ids, labels = torch.rand(7, 1, 2, 2), torch.arange(7), torch.arange(7) % 2
    defense = Defense(classifier, purifier).freeze()
    one = count_sets(defense, {"full/a": x}, ids, labels, ids, 0, 2, 4, 3)["full/a"]
    alone = count_with_detector(defense, x, labels, ids, 0, "score", 2, 4, 3)
    assert one.detected is None and alone.detected is None
    assert np.array_equal(one.score.score, alone.score.score)
    if defense.stochastic:
        with pytest.raises(ValueError, match="random defense"):
            predict_and_detect(defense, x, 3)


def test_an_answer_that_is_no_number_is_wrong_beside_a_detector_score() -> None:
    class Broken(Halve):
        def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
            return torch.where(x > 0.5, torch.nan, x)

    x = torch.tensor([0.25, 0.75]).reshape(2, 1, 1, 1)
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(1, 2)).requires_grad_(False)
    answer = int(classifier(x).argmax(1)[0])
    predicted, values = predict_and_detect(Defense(classifier, Broken()).freeze(), x, 5)
    assert predicted.tolist() == [[answer, UNREADABLE]]
    assert values[0] == 0 and np.isnan(values[1])


def test_the_control_is_the_squared_distance_from_black_and_white() -> None:
    x = torch.tensor([[[[0.0, 1.0], [0.5, 0.75]]]])
    assert black_and_white(x) == pytest.approx(0.5**2 + 0.25**2)


def test_the_summary_of_a_detector() -> None:
    values = {"clean": floats(0, 1, 2, 3), "full/pgd": floats(5, 6, 0, 7)}
    scores = DetectorScores(values, values, values, floats(*range(100)))
    within = {name: np.ones(4, dtype=bool) for name in values}
    counted = {"clean": score_of(1, 1, 1, 1), "full/pgd": score_of(0, 0, 0, 1)}
    found = detection(scores, within, counted)
    row = found["attacks"]["full/pgd"]
    assert row["auc"] == row["control_auc"] == pytest.approx(12.5 / 16)
    assert found["clean_rejected"]["5"]["accuracy"] == 0 and row["tpr_5"] == 0
    assert found["detect_or_correct"]["5"]["accuracy"] == pytest.approx(0.25)
    assert found["curve"][0] == (0.0, pytest.approx(0.75)) and found["validation"] == 100
