"""Counting: the rules by brute force, and a random defense of known accuracy."""

import itertools
from collections.abc import Iterator
from math import sqrt

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import ATTACK_VARIANTS, ATTACKS, LINF, parse_attack

from components.attacks import craft
from components.data.draws import Draws, NoiseStream
from components.data.image_set import ImageSet
from components.evaluation.counting import (
    Effort,
    Score,
    count_score,
    count_sets,
    majority_of,
    per_class,
    worst,
    worst_of,
    worst_of_all,
)
from components.models.accuracy import UNREADABLE, count_correct, times
from components.models.classifiers import Classifier
from components.models.defense import Defense
from components.models.purifiers import Purifier
from components.models.purifiers.controls import GaussianNoise
from components.probes.statistics import summarise


class Threshold(nn.Module):
    """Class 1 if the mean pixel is above a threshold, else class 0."""

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(threshold), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        value = x.flatten(1).mean(1) - self.threshold
        return torch.stack([-value, value], 1)


class Fixed(nn.Module):
    """Looks the logits up by the first pixel: k / 255 gives row k."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[(x.flatten(1)[:, 0] * 255).round().long()]


class Coin(Purifier):
    """Turns an image black with the probability in its first pixel, else white."""

    stochastic = True

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        assert stream is not None
        toss = stream.uniform((1, 1, 1), "toss")
        return torch.where(toss < x[:, :, :1, :1], torch.zeros_like(x), torch.ones_like(x))


def draws_score(draws: int, select: list[int], scored: list[int]) -> Score:
    return Score(draws, np.array(select, dtype=np.int64), np.array(scored, dtype=np.int64))


# Rules over draws


def test_the_worst_set_is_selected_by_select_and_scored_by_score() -> None:
    scores = {
        "clean": draws_score(4, [4, 4, 2, 0], [4, 3, 1, 4]),
        "pgd": draws_score(4, [1, 4, 2, 3], [2, 0, 0, 0]),
        "apgd": draws_score(4, [0, 4, 1, 3], [3, 0, 4, 0]),
    }
    chosen, found = worst(scores, ["clean", "pgd", "apgd"])
    assert chosen == ["apgd", "clean", "apgd", "clean"]
    assert found.score.tolist() == [3, 3, 4, 4], "the score of the selected set, not the lowest one"
    assert found.select.tolist() == [0, 4, 1, 0] and found.draws == 4
    assert found.accuracy().tolist() == [0.75, 0.75, 1.0, 1.0]


def test_of_equal_sets_the_first_in_order_is_selected() -> None:
    scores = {
        "a": draws_score(2, [1, 0], [1, 1]),
        "b": draws_score(2, [1, 0], [2, 2]),
        "c": draws_score(2, [1, 1], [0, 0]),
    }
    for order in itertools.permutations("abc"):
        chosen, _ = worst(scores, list(order))
        assert chosen[0] == order[0]
        assert chosen[1] == next(name for name in order if name != "c")


def test_sets_of_different_numbers_of_draws_are_compared_by_accuracy() -> None:
    scores = {"many": draws_score(32, [31, 1], [30, 2]), "one": draws_score(1, [1, 0], [1, 0])}
    chosen, found = worst(scores, ["many", "one"])
    assert chosen == ["many", "one"] and found.draws == 32
    assert found.score.tolist() == [30, 0]


def subsets(right: int, draws: int, tries: int) -> Iterator[tuple[bool, ...]]:
    outcomes = [True] * right + [False] * (draws - right)
    return itertools.combinations(outcomes, tries)


@pytest.mark.parametrize("tries", [1, 2, 3, 4, 7])
def test_worst_and_majority_of_draws_equal_an_enumeration(tries: int) -> None:
    draws = 7
    every = draws_score(draws, [0] * 8, list(range(8)))
    for right, none_wrong, majority in zip(
        range(8), worst_of(every, tries), majority_of(every, tries), strict=True
    ):
        cases = list(subsets(right, draws, tries))
        assert none_wrong == pytest.approx(np.mean([all(case) for case in cases]))
        votes = [sum(case) > tries / 2 for case in cases]
        assert majority == pytest.approx(np.mean(votes)), "a tie is no majority"


def test_worst_and_majority_of_one_draw_are_that_draw() -> None:
    one = draws_score(1, [1, 0], [1, 0])
    assert worst_of(one, 10).tolist() == majority_of(one, 10).tolist() == [1.0, 0.0]


# Counting answers


def test_counting_equals_a_loop_for_any_batch_and_order() -> None:
    images = torch.rand(30, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    labels, ids = torch.arange(30) % 2, torch.arange(30) * 5
    noise = GaussianNoise(kind="gaussian_noise", sigma=0.3).build((1, 4, 4))
    defense = Defense(Threshold(), noise).freeze()
    counts = count_correct(defense, images, labels, ids, 3, "score", 8, 30)
    by_hand = [
        sum(
            int(defense(images[[i]], Draws(3, "score", ids[[i]], draw)).argmax()) == labels[i]
            for draw in range(8)
        )
        for i in range(30)
    ]
    assert counts.tolist() == by_hand and counts.dtype == np.int64
    for batch in (1, 7, 100):
        again = count_correct(defense, images, labels, ids, 3, "score", 8, batch)
        assert again.tolist() == counts.tolist()
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    shuffled = count_correct(defense, images[order], labels[order], ids[order], 3, "score", 8, 9)
    assert shuffled.tolist() == counts[order.numpy()].tolist()


def test_every_role_and_seed_has_its_own_noise() -> None:
    images, labels, ids = torch.full((200, 1, 2, 2), 0.5), torch.ones(200).long(), torch.arange(200)
    defense = Defense(Threshold(), Coin()).freeze()
    counts = {
        key: tuple(count_correct(defense, images, labels, ids, key[1], key[0], 8, 200).tolist())
        for key in (("score", 0), ("select", 0), ("clean", 0), ("attack", 0), ("score", 1))
    }  # type: ignore[arg-type]
    assert len(set(counts.values())) == 5


def test_a_deterministic_defense_is_evaluated_once() -> None:
    class Counting(Threshold):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            return super().forward(x)

    images = torch.tensor([0.2, 0.9]).view(2, 1, 1, 1)
    defense = Defense(Counting(), None).freeze()
    counts = count_correct(
        defense, images, torch.tensor([0, 0]), torch.arange(2), 0, "score", 32, 2
    )
    assert counts.tolist() == [32, 0] and Counting.calls == 1


def test_counts_of_a_random_defense_are_binomial() -> None:
    """Image i is right with probability 1 - p_i: each count is binomial, and so is their sum."""
    chances = torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0]).repeat(200)
    images = chances.view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    ids, draws = torch.arange(1000), 32
    defense = Defense(Threshold(), Coin()).freeze()
    counts = count_correct(defense, images, torch.ones(1000).long(), ids, 0, "score", draws, 128)
    for chance in chances.unique().tolist():
        found = counts[(chances == chance).numpy()]
        n = 200 * draws
        assert abs(found.sum() - n * (1 - chance)) <= 4 * sqrt(n * chance * (1 - chance))
    spread = counts[(chances == 0.5).numpy()].var() / (draws / 4)
    assert 0.6 < spread < 1.5, "draws of an image are not independent"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_count_as_wrong(bad: float) -> None:
    rows = torch.tensor([[bad, 0.0], [0.0, bad], [1.0, 0.0], [bad, bad]])
    images = (torch.arange(4) / 255).view(4, 1, 1, 1)
    for label in (0, 1):
        counts = count_correct(
            Defense(Fixed(rows), None).freeze(), images, torch.full((4,), label), torch.arange(4),
            0, "score", 1, 4,
        )  # fmt: skip
        assert counts.tolist() == [0, 0, int(label == 0), 0]


# The headline, end to end, where it can be computed


def test_the_headline_of_a_noisy_defense_equals_its_closed_form() -> None:
    """An image of mean m under noise of deviation s on n pixels is right with probability
    Phi((m - threshold) sqrt(n) / s). The worst of two sets is the nearer one to the threshold.
    The noise that selects it is not the noise that scores it, so the headline is the mean
    probability of the selected images.
    """
    count, pixels, sigma = 12000, 16, 0.1
    defense = Defense(
        Threshold(), GaussianNoise(kind="gaussian_noise", sigma=sigma).build((1, 4, 4))
    ).freeze()
    means = torch.linspace(0.5, 0.6, count)
    ids, labels = torch.arange(count), torch.ones(count).long()

    def counted(shift: float, role: str) -> tuple[Score, Tensor]:
        images = (means - shift).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
        select, scored = (
            count_correct(defense, images, labels, ids, 0, r, 32, 1000)  # type: ignore[arg-type]
            for r in ("select", role)
        )
        chance = torch.special.ndtr((means - shift - 0.5).double() * sqrt(pixels) / sigma)
        return Score(32, select, scored), chance

    clean, chance_clean = counted(0.0, "clean")
    attacked, chance_attacked = counted(0.02, "score")
    for found, chance in ((clean, chance_clean), (attacked, chance_attacked)):
        deviation = (chance * (1 - chance)).sum().sqrt().item() / count / sqrt(32)
        # This file salts the noise, and an edit draws anew: wide bounds, and many images.
        assert abs(found.accuracy().mean() - chance.mean().item()) < 4.5 * deviation
    chosen, headline = worst({"clean": clean, "attack": attacked}, ["clean", "attack"])
    picked = torch.tensor([name == "attack" for name in chosen])
    expected = torch.where(picked, chance_attacked, chance_clean)
    deviation = (expected * (1 - expected)).sum().sqrt().item() / count / sqrt(32)
    assert abs(headline.accuracy().mean() - expected.mean().item()) < 4.5 * deviation
    assert picked[means < 0.52].all(), "where both are often wrong, the attack is selected"


def test_the_noise_that_selects_the_worst_attack_does_not_score_it() -> None:
    """The lowest count of ten equal attacks is far below their accuracy; the headline is not."""
    rng = np.random.default_rng(0)
    names = [f"attack {k}" for k in range(10)]
    scores = {n: Score(32, rng.binomial(32, 0.6, 2000), rng.binomial(32, 0.6, 2000)) for n in names}
    chosen, headline = worst(scores, names)
    assert set(chosen) == set(names)
    assert abs(headline.accuracy().mean() - 0.6) < 4 * sqrt(0.24 / 2000 / 32)
    assert (headline.select / 32).mean() < 0.5


def test_the_headline_of_a_random_defense_is_the_smaller_of_two() -> None:
    """By hand: per image "a" then "b" are selected, and score 0.75; "b" alone scores 0.625."""
    scores = {
        "a": draws_score(4, [1, 4], [3, 4]),
        "b": draws_score(4, [2, 1], [2, 3]),
    }
    chosen, found = worst_of_all(scores, ["a", "b"])
    assert chosen == ["b", "b"] and found.score.tolist() == [2, 3]
    swapped = {"a": draws_score(4, [1, 4], [1, 4]), "b": scores["b"]}
    chosen, found = worst_of_all(swapped, ["a", "b"])
    assert chosen == ["a", "b"] and found.score.tolist() == [1, 3]
    certain = {"a": draws_score(1, [1, 0], [1, 0]), "b": draws_score(1, [0, 1], [0, 1])}
    assert worst_of_all(certain, ["a", "b"])[1].score.tolist() == [0, 0]
    once = {"a": draws_score(1, [0, 1], [1, 1]), "b": draws_score(1, [1, 0], [0, 1])}
    chosen, found = worst_of_all({**once, "c": draws_score(1, [0, 0], [1, 0])}, ["a", "b", "c"])
    assert chosen == ["c", "c"] and found.score.tolist() == [1, 0], "one draw, and random"


def test_the_single_set_is_not_selected_by_the_noise_that_scores_it() -> None:
    rng = np.random.default_rng(1)
    scores = {
        f"attack {k}": Score(32, rng.binomial(32, 0.6, 60), rng.binomial(32, 0.6, 60))
        for k in range(20)
    }
    order = list(scores)
    lowest = min(order, key=lambda name: scores[name].select.mean())
    _, found = worst_of_all(scores, order)
    single, each = scores[lowest].accuracy().mean(), worst(scores, order)[1].accuracy().mean()
    assert found.accuracy().mean() == min(single, each)
    assert found.accuracy().mean() > min(one.accuracy().mean() for one in scores.values())


class Witness(nn.Module):
    """A classifier that records for every call whether an image was fooled; `label` is right."""

    seen: list[bool] = []

    def __init__(self, classifier: Classifier, label: int) -> None:
        super().__init__()
        self.classifier, self.label = classifier, label

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(x)
        Witness.seen.append(bool((logits.argmax(1) != self.label).any()))
        return logits


@pytest.mark.parametrize("name", [*ATTACKS, *ATTACK_VARIANTS])
def test_an_attack_that_stops_early_ends_when_the_image_is_fooled(
    name: str, classifier: Classifier, test_set: ImageSet
) -> None:
    attack = parse_attack(name)
    if not attack.stops_early():
        assert not attack.early_stopping or not attack.early_stop
        return
    after, count, far = [], 0, LINF.scaled(2.5)
    for row in range(12):
        one = test_set[torch.tensor([row])]
        Witness.seen.clear()
        witness = Defense(Witness(classifier, int(one.labels)), None)
        crafted = craft(attack, witness, "full", one, far, 0, 1)
        if crafted.success.any() and not Witness.seen[0]:
            count += 1
            after.append(len(Witness.seen) - 1 - Witness.seen.index(True))
    # `craft` itself evaluates the image twice, and the attack may have evaluated it twice.
    assert count and max(after) <= 3


def test_a_curve_over_passes_has_the_fraction_of_images_not_fooled() -> None:
    effort = Effort(np.array([1, 3, 3, 50, 50]), np.array([True, True, False, True, False]))
    curve = dict(effort.curve())
    assert (curve[1], curve[2], curve[3], curve[50]) == (0.8, 0.8, 0.6, 0.4)
    assert list(curve) == sorted(curve) and list(curve)[-1] == effort.longest() == 50
    assert Effort(np.array([1]), np.array([True])).curve() == [(1, 0.0)]


def test_classes_with_images_are_counted_separately_in_their_order() -> None:
    accuracies, labels = np.array([1.0, 0.5, 0.0, 1.0]), np.array([2, 0, 2, 2])
    found = per_class(accuracies, labels, ["ten", "two", "one"])
    assert list(found) == ["ten", "one"]
    assert found["ten"] == summarise(accuracies[1:2]) and found["one"]["accuracy"] == 2 / 3


# The order of questions


class Listening(Purifier):
    """Keeps the first two pixels of every image: which set it belongs to, and which image it is."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[list[float]] = []

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        self.asked += x.flatten(1)[:, :2].tolist()
        return x


def test_every_set_is_the_first_for_some_images() -> None:
    """Three sets of twelve images, in parts of one size and another."""
    x = torch.zeros(3, 12, 1, 2, 2)
    x[:, :, 0, 0, 0] = torch.arange(3.0)[:, None]
    x[:, :, 0, 0, 1] = torch.arange(12.0)
    for part in (12, 4, 1):
        first: dict[float, float] = {}
        for start in range(0, 12, part):
            listening, rows = Listening(), torch.arange(start, start + part)
            count_sets(
                Defense(Threshold(), listening), {str(k): x[k, rows] for k in range(3)}, rows,
                torch.zeros(part, dtype=torch.int64), rows, 0, 1, 1, 5,
            )  # fmt: skip
            assert len(listening.asked) == 3 * part
            for which, image in listening.asked[:part]:
                first[image] = which
        assert list(first) == list(range(12))
        assert list(first.values()) == 4 * [0, 1, 2], f"in parts of {part}"


@pytest.mark.parametrize("purifier", [None, GaussianNoise(kind="gaussian_noise", sigma=0.2)])
def test_an_honest_defense_answers_alike_in_any_order(
    purifier: GaussianNoise | None, classifier: Classifier, test_set: ImageSet
) -> None:
    defense = Defense(classifier, purifier and purifier.build(test_set.shape)).freeze()
    clean, labels, ids = test_set.pixels(), test_set.labels, test_set.ids
    moved = {f"{k}": (clean + 0.1 * k * (clean - 0.5)).clamp(0, 1) for k in (-4, 1, 3)}
    found = count_sets(defense, moved, torch.arange(len(ids)), labels, ids, 3, 4, 6, 50)
    assert list(found) == list(moved)
    for name, x in moved.items():
        alone = count_score(defense, x, labels, ids, 3, "score", 4, 6, 50)
        assert found[name].score.draws == alone.draws
        np.testing.assert_array_equal(found[name].score.select, alone.select)
        np.testing.assert_array_equal(found[name].score.score, alone.score)


def test_predictions_are_held_against_any_classes() -> None:
    """Of two draws on four images; what cannot be read agrees with nothing."""
    predicted = np.array([[0, 1, UNREADABLE, UNREADABLE], [0, 2, 1, UNREADABLE]])
    assert times(predicted, np.array([0, 2, 1, UNREADABLE])).tolist() == [2, 1, 1, 0]


def test_the_predictions_of_every_set_are_its_own() -> None:
    """Image k of set s holds 3 s + k: a table gives its class, and one row is no number."""
    classes = torch.tensor([2, 0, 1, 1, 2, 0])
    logits = torch.eye(3)[classes]
    logits[4] = torch.nan
    x = torch.arange(6.0).reshape(2, 3, 1, 1, 1) / 255
    rows, labels = torch.arange(3), torch.tensor([2, 2, 1])
    sets = {"full/a": x[0], "full/b": x[1]}
    found = count_sets(Defense(Fixed(logits), None), sets, rows, labels, rows, 0, 1, 1, 2)
    assert {name: one.predicted.tolist() for name, one in found.items()} == {
        "full/a": [[2, 0, 1]], "full/b": [[1, UNREADABLE, 0]],
    }  # fmt: skip
    assert found["full/a"].score.score.tolist() == [1, 0, 1]
    assert found["full/b"].score.score.tolist() == [0, 0, 0]


def test_where_there_are_no_sets_nothing_is_counted() -> None:
    nothing, rows = dict[str, Tensor](), torch.arange(2)
    assert count_sets(Defense(Threshold(), None), nothing, rows, rows, rows, 0, 1, 1, 5) == {}
