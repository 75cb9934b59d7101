"""The verdict of a defense: exact paired tests, a published interval, and every way to stand."""

from itertools import product

import numpy as np
import pytest

from components.checks import verdicts
from components.checks.verdicts import difference, higher, unbeaten, verdict, written_for
from components.probes.contract import Accuracies
from components.probes.statistics import more_fooled


def right(*parts: tuple[int, float]) -> Accuracies:
    """Return accuracies per image: so many images of each value."""
    return np.concatenate([np.full(count, value) for count, value in parts])


def test_the_test_of_zeros_and_ones_is_mcnemars() -> None:
    generator = np.random.default_rng(0)
    for _ in range(10):
        one, other = (generator.random((2, 200)) < 0.5).astype(float)
        assert higher(one, other) == pytest.approx(more_fooled(other, one), abs=1e-12)


def test_the_test_of_fractions_equals_the_sum_over_all_signs() -> None:
    one, other = np.array([0.75, 0.5, 1.0, 0.25, 0.5]), np.array([0.0, 0.75, 0.5, 0.25, 0.25])
    seen = (one - other).sum()
    sums = [(np.array(signs) * np.abs(one - other)).sum() for signs in product((-1, 1), repeat=5)]
    assert higher(one, other) == pytest.approx(np.mean(np.array(sums) >= seen - 1e-9))


def test_thirds_are_compared_exactly() -> None:
    one, other = right((3, 1 / 3)), right((3, 0.0))
    assert higher(one, other) == pytest.approx(1 / 8)
    assert higher(other, one) == 1.0 and higher(one, one) == 1.0


def test_fractions_of_any_numbers_of_draws_are_compared() -> None:
    """1009 draws beside 32, and 20011: their common denominator is beyond any table."""
    generator = np.random.default_rng(0)
    one, other = generator.binomial(1009, 0.5, 60) / 1009, generator.binomial(32, 0.5, 60) / 32
    low = generator.binomial(20011, 0.3, 60) / 20011
    same, back = higher(one, other), higher(other, one)
    assert 0.01 < same < 0.99 and same + back == pytest.approx(1, abs=1e-3)
    assert higher(one, low) < 1e-9 and higher(low, one) > 0.99


def test_many_small_gains_do_not_outweigh_large_losses() -> None:
    """The sign test would say that a mean of 1.9 % beats one of 20 %."""
    small, large = right((180, 1 / 32), (120, 0.0)), right((240, 0.0), (60, 1.0))
    assert more_fooled(large, small) < 1e-9
    assert higher(small, large) > 0.99 and higher(large, small) < 1e-9
    assert unbeaten(small, {"none": large}).keys() == {"none"}


def test_the_interval_is_newcombes() -> None:
    """Newcombe 1998, method 10 at 95 %: pairs (36, 12, 2, 0) give 0.0569 to 0.3404."""
    one, other = right((48, 1.0), (2, 0.0)), right((36, 1.0), (12, 0.0), (2, 1.0))
    assert difference(one, other, 1.959964) == pytest.approx((0.2, 0.0569, 0.3404), abs=5e-5)


def test_the_correlation_of_pairs_is_corrected_for_continuity() -> None:
    """A weak correlation counts as none; of a full one the covariance loses 1/(2n)."""
    one, other = right((3, 1.0), (2, 0.0)), right((2, 1.0), (2, 0.0), (1, 1.0))
    independent = float(np.hypot(*limits(0.6, 5)))
    assert difference(one, other) == pytest.approx((0.0, -independent, independent))
    same = right((50, 1.0), (50, 0.0))
    half = float(np.sqrt(2 * (1 - 0.98))) * limits(0.5, 100)[0]
    assert difference(same, same) == pytest.approx((0.0, -half, half))


def limits(mean: float, n: int) -> tuple[float, float]:
    """Return how far the Wilson 99 % limits lie below and above a mean: roots of a quadratic."""
    z = verdicts.Z99**2 / n
    low, high = sorted(np.roots([1 + z, -(2 * mean + z), mean**2]).real)
    return mean - low, high - mean


def test_the_interval_of_fractions_covers_their_mean_difference() -> None:
    """Against a deterministic rival, right on like images; at least 99 % must be covered."""
    generator, missed = np.random.default_rng(0), 0
    for _ in range(2000):
        chances = generator.beta(0.3, 0.3, 100)
        one = generator.binomial(32, 0.9 * chances) / 32
        other = (generator.random(100) < chances).astype(float)
        _, low, high = difference(one, other)
        missed += not low <= -0.05 <= high
    assert missed <= 30


def test_intervals_stay_finite_where_all_are_right_or_none_is() -> None:
    for one, other in ((1.0, 1.0), (0.0, 0.0), (1.0, 0.0)):
        mean, low, high = difference(right((50, one)), right((50, other)))
        assert -1 <= low <= mean <= high <= 1


NONE, CONTROL = right((200, 0.0)), right((20, 1.0), (180, 0.0))
ROBUST = right((100, 1.0), (100, 0.0))


def stands(one: Accuracies, bound: bool = False, robust_bound: bool = False) -> verdicts.Verdict:
    rivals = {"none": NONE, "median": CONTROL}
    lost = unbeaten(one, {**rivals, "robust": ROBUST})
    return verdict(one, bound, lost, {"none": NONE}, ["median"], {"robust": (ROBUST, robust_bound)})


@pytest.mark.parametrize(
    ("one", "standing", "rivals"),
    [
        (NONE, "broken", ("none",)),
        (right((3, 1.0), (197, 0.0)), "broken", ("none",)),
        (right((15, 1.0), (185, 0.0)), "no better than a control", ("median",)),
        (right((60, 1.0), (140, 0.0)), "below", ("robust",)),
        (right((98, 1.0), (102, 0.0)), "not told apart", ("robust",)),
        (right((140, 1.0), (60, 0.0)), "above", ("robust",)),
    ],
)
def test_a_defense_stands_where_its_accuracy_puts_it(
    one: Accuracies, standing: str, rivals: tuple[str, ...]
) -> None:
    found = stands(one)
    assert (found.standing, found.rivals) == (standing, rivals)
    assert found.difference is not None
    assert found.difference.mean == pytest.approx(one.mean() - 0.5)
    assert (found.difference.p < 0.01) == (not found.difference.low <= 0 <= found.difference.high)


def test_an_upper_bound_can_only_lose() -> None:
    low, same, high = (right((n, 1.0), (200 - n, 0.0)) for n in (60, 98, 140))
    assert stands(low, bound=True).standing == "below"
    assert stands(NONE, bound=True).standing == "broken"
    assert {stands(one, bound=True).standing for one in (same, high)} == {"not measured"}
    assert stands(high, robust_bound=True).standing == "above"
    assert {stands(one, robust_bound=True).standing for one in (low, same)} == {"not measured"}


def test_without_adversarial_training_there_is_no_comparison() -> None:
    one = right((140, 1.0), (60, 0.0))
    found = verdict(one, False, {}, {"none": NONE}, [], {})
    assert (found.standing, found.rivals, found.difference) == ("no comparison", (), None)
    assert verdict(one, True, {}, {"none": NONE}, [], {}).standing == "not measured"


def test_adversarial_training_that_changed_nothing_is_no_yardstick() -> None:
    """Standard weights under the card of adversarial training, and three lucky images."""
    one, none = right((60, 1.0), (140, 0.0)), {"none": right((3, 1.0), (197, 0.0))}
    sham = right((3, 0.0), (6, 1.0), (191, 0.0))
    found = verdict(one, False, {}, none, [], {"sham": (sham, False)})
    assert (found.standing, found.rivals, found.difference) == ("no comparison", ("sham",), None)
    found = verdict(one, False, {}, none, [], {"sham": (sham, False), "robust": (ROBUST, False)})
    assert (found.standing, found.rivals) == ("below", ("robust",))
    weak = right((20, 1.0), (180, 0.0))
    assert verdict(one, False, {}, none, [], {"weak": (weak, False)}).standing == "above"


def test_without_the_undefended_classifier_nothing_is_measured() -> None:
    one, robust = right((140, 1.0), (60, 0.0)), {"robust": (ROBUST, False)}
    assert verdict(one, False, {}, {}, [], robust).standing == "not measured"
    assert verdict(one, False, {}, {}, [], {}).standing == "not measured"
    assert verdict(one, False, ["median"], {}, ["median"], robust).standing == (
        "no better than a control"
    )


def test_the_most_accurate_adversarial_training_is_compared() -> None:
    one = right((98, 1.0), (102, 0.0))
    weaker = right((20, 1.0), (180, 0.0))
    found = verdict(
        one, False, {}, {"none": NONE}, [], {"weak": (weaker, False), "robust": (ROBUST, False)}
    )
    assert found.rivals == ("robust",)


def test_attacks_are_written_for_a_defense_or_not() -> None:
    plain = {"full/pgd": "pgd", "bpda/pgd": "pgd", "classifier/aware": "pgd"}
    assert written_for(plain) == []
    more = {"soft/pgd": "pgd", "direct/x": "apgd_ce", "direct/y": "pgd", "fixed_noise/pgd": "pgd"}
    assert written_for({**plain, **more}) == ["direct", "soft", "fixed_noise"]
    assert written_for({"full/aware": "detector_aware"}) == ["detector_aware"]
