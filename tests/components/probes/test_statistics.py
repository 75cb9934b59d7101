"""Intervals are the published ones, and p-values are exact."""

import time
from fractions import Fraction
from math import comb, sqrt

import numpy as np
import pytest

from components.probes.contract import Accuracies
from components.probes.statistics import (
    holm,
    more_fooled,
    shares_differ,
    summarise,
    wilson,
)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        (0, 500, 0.0, 0.0076),
        (250, 500, 0.4563, 0.5437),
        (500, 500, 0.9924, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (256, 512, 0.4569, 0.5431),
    ],
)
def test_wilson_gives_the_published_intervals(right: int, n: int, low: float, high: float) -> None:
    assert wilson(right / n, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_solves_its_equation() -> None:
    """Each bound is 1.96 of its own standard deviations away from the accuracy."""
    for accuracy, n in ((0.1, 40), (0.63, 500), (0.97, 77)):
        for bound in wilson(accuracy, n):
            deviation = sqrt(bound * (1 - bound) / n)
            assert abs(accuracy - bound) == pytest.approx(1.959964 * deviation, rel=1e-6)
    assert wilson(0.5, 0) == (0.0, 1.0)


def test_a_summary_counts_images_and_not_draws() -> None:
    accuracies = np.array([1.0, 0.5, 0.0, 0.5])
    low, high = wilson(0.5, 4)
    assert summarise(accuracies) == {"accuracy": 0.5, "low": low, "high": high, "n": 4}
    empty = {"accuracy": 0.0, "low": 0.0, "high": 1.0, "n": 0}
    assert summarise(np.array([])) == empty


def test_the_sign_test_equals_a_calculation_by_hand() -> None:
    """Heads in at least 8 of 10 tosses: (45 + 10 + 1) / 1024."""
    reference = np.ones(30)
    suspect = np.ones(30)
    suspect[:8] = 0
    reference[28:] = 0
    assert more_fooled(suspect, reference) == pytest.approx(56 / 1024)
    assert more_fooled(reference, suspect) == pytest.approx(1 - 11 / 1024)
    assert more_fooled(suspect, suspect) == 1.0
    one = np.array([0.5, 1.0])
    assert more_fooled(one, np.array([0.6, 1.0])) == 0.5, "any difference counts"
    strong = np.zeros(1000)
    assert more_fooled(strong, np.ones(1000)) == pytest.approx(0.5**1000)


def pair(lower: int, higher: int) -> tuple[Accuracies, Accuracies]:
    """Return accuracies of which the first are lower on some images, higher on others."""
    suspect = np.repeat([0.0, 0.75, 0.5], [lower, higher, 5])
    reference = np.repeat([1.0, 0.25, 0.5], [lower, higher, 5])
    return suspect, reference


@pytest.mark.parametrize(
    ("lower", "higher", "size"),
    [(27, 23, 0.336), (610, 585, 0.244), (70, 31, 6.54e-5), (1090, 895, 6.57e-6),
     (672, 1, 1.72e-200), (1500, 245, 4.67e-220), (23, 27, 0.760), (0, 40, 1.0), (1070, 0, 8e-323)],
)  # fmt: skip
def test_the_sign_test_is_exact_however_small_p_is(lower: int, higher: int, size: float) -> None:
    n = lower + higher
    exact = Fraction(sum(comb(n, k) for k in range(lower, n + 1)), 2**n)
    p = more_fooled(*pair(lower, higher))
    assert p == float(exact)
    assert p == pytest.approx(size, rel=0.01, abs=0)


def test_the_sign_test_equals_the_sum_over_all_outcomes() -> None:
    """Term by term against the plain sum, for every way to split up to forty images."""
    for n in range(41):
        for lower in range(n + 1):
            plain = Fraction(sum(comb(n, k) for k in range(lower, n + 1)), 2**n)
            assert more_fooled(*pair(lower, n - lower)) == float(plain)


def test_half_of_ten_thousand_images_are_as_likely_as_symmetry_says() -> None:
    """An odd number splits into two equal halves; of an even one, the middle is counted twice."""
    assert more_fooled(*pair(5001, 5000)) == 0.5
    middle = Fraction(comb(10_000, 5000), 2**10_000)
    assert more_fooled(*pair(5000, 5000)) == float(Fraction(1, 2) + middle / 2)
    both = more_fooled(*pair(5100, 4900)) + more_fooled(*pair(4901, 5099))
    assert both == pytest.approx(1, rel=1e-15)


@pytest.mark.parametrize("lower", [0, 4900, 5000, 5100, 10_000])
def test_the_sign_test_of_ten_thousand_differing_images_takes_under_a_tenth_of_a_second(
    lower: int,
) -> None:
    suspect, reference = pair(lower, 10_000 - lower)
    seconds = []
    for _ in range(3):
        started = time.process_time()
        more_fooled(suspect, reference)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 0.1


def test_holm_equals_a_calculation_by_hand() -> None:
    """Smallest times 4, next times 3 and not below the one before, and so on; at most 1."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([0.02, 0.011]) == pytest.approx([0.022, 0.022])
    assert holm([0.2]) == [0.2] and holm([]) == []


def test_shares_of_one_image_are_compared_by_fishers_test() -> None:
    """By hand: 4 of 4 against 1 of 4; given 5 right answers of 8, C(4,4) C(4,1) of C(8,5) ways."""
    p = shares_differ(np.array([4]), 4, np.array([1]), 4)
    assert p == pytest.approx(2 * 4 / 56)
    assert shares_differ(np.array([2]), 4, np.array([2]), 4) == 1


def test_shares_of_several_images_have_the_distribution_of_every_split() -> None:
    """Against all ways to split the right answers of each image, counted one by one."""
    few, many = np.array([2, 0, 1]), np.array([1, 0, 3])
    chances: dict[int, Fraction] = {0: Fraction(1)}
    for total in (few + many).tolist():
        ways = {
            k: Fraction(comb(2, k) * comb(3, total - k), comb(5, total))
            for k in range(3) if total - k >= 0
        }  # fmt: skip
        chances = {
            s: sum((chances.get(s - k, Fraction(0)) * way for k, way in ways.items()), Fraction(0))
            for s in range(7)
        }
    upper = sum(chance for total, chance in chances.items() if total >= 3)
    lower = sum(chance for total, chance in chances.items() if total <= 3)
    assert shares_differ(few, 2, many, 3) == pytest.approx(float(min(1, 2 * min(upper, lower))))


def test_equal_rates_differ_no_more_often_than_promised() -> None:
    generator = np.random.default_rng(0)
    values = []
    for _ in range(400):
        rates = generator.uniform(size=50)
        few, many = generator.binomial(4, rates), generator.binomial(32, rates)
        values.append(shares_differ(few, 4, many, 32))
    assert 5 <= sum(p < 0.05 for p in values) <= 33, "20 expected"


def test_ten_thousand_images_take_seconds() -> None:
    generator = np.random.default_rng(0)
    rates = generator.uniform(size=10_000)
    few, many = generator.binomial(4, rates), generator.binomial(32, rates)
    began = time.perf_counter()
    assert 0.001 < shares_differ(few, 4, many, 32) <= 1
    assert time.perf_counter() - began < 10
