"""Checks of stored sets: the ball, the range, every image once, and the models behind them."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import LINF, THREATS, failed

from components.attacks import L2, Linf, violations
from components.checks import sets
from components.data.draws import Draws
from components.data.image_set import ImageSet
from components.probes import Finding


def check_stored_set(data: ImageSet, images: Tensor, **changes: Any) -> list[Finding]:
    facts = {"ids": data.ids, "labels": data.labels, "threat": LINF, **changes}
    part = (images, facts["ids"], facts["labels"], data)
    return sets.stored_set("full/pgd", [part], len(data), facts["threat"])


def attacked(data: ImageSet, factor: float = 1.0) -> Tensor:
    """Return images on the surface of the ball, or `factor` times as far away."""
    signs = torch.randn(data.images.shape, generator=torch.Generator().manual_seed(0)).sign()
    return (data.pixels() + factor * LINF.eps * signs).clamp(0, 1)


def test_a_sound_set_passes(test_set: ImageSet) -> None:
    findings = check_stored_set(test_set, attacked(test_set))
    assert [f.name for f in findings] == ["accounting/full/pgd", "threat_model/full/pgd"]
    assert failed(findings) == []
    assert failed(check_stored_set(test_set, attacked(test_set, 5), threat=None)) == [], (
        "it has no ball"
    )
    ball = L2(norm="l2", eps_l2=1.0)
    noise = ball.start(test_set.pixels(), Draws(0, "attack", test_set.ids), "start")
    assert failed(check_stored_set(test_set, noise, threat=ball)) == []


def test_images_outside_their_ball_are_reported(test_set: ImageSet) -> None:
    one = attacked(test_set)
    one[77, 0, 3, 3] = (one[77, 0, 3, 3] + 0.3) % 1
    faults = {
        "twice the radius": attacked(test_set, 2),
        "slightly outside": attacked(test_set, 1.0001),
        "one pixel of one image": one,
        "float16": attacked(test_set).half().float(),
        "bfloat16": attacked(test_set).bfloat16().float(),
        "truncated to 8 bits": (attacked(test_set) * 255 - 1).floor().clamp(0) / 255,
        "float64": attacked(test_set).double(),
        "below 0": attacked(test_set) - 0.01,
        "not a number": attacked(test_set).where(test_set.pixels() > 0, torch.nan),
    }
    for name, images in faults.items():
        assert failed(check_stored_set(test_set, images)) == ["threat_model/full/pgd"], name
    assert failed(check_stored_set(test_set, attacked(test_set) + 1, threat=None)) != []
    far = L2(norm="l2", eps_l2=0.5)
    assert failed(check_stored_set(test_set, attacked(test_set), threat=far)) != []


def test_sets_of_other_images_are_reported(test_set: ImageSet) -> None:
    images, count = attacked(test_set), len(test_set)
    missing = torch.arange(count - 1)
    order = torch.arange(count).roll(1)
    faults = {
        "shifted ids": check_stored_set(test_set, images, ids=test_set.ids.roll(1)),
        "another id": check_stored_set(
            test_set, images, ids=test_set.ids + (torch.arange(count) == 5)
        ),
        "other labels": check_stored_set(test_set, images, labels=(test_set.labels + 1) % 10),
        "one missing": check_stored_set(
            test_set, images[missing], ids=test_set.ids[missing], labels=test_set.labels[missing]
        ),
        "another order": check_stored_set(
            test_set, images[order], ids=test_set.ids[order], labels=test_set.labels[order]
        ),
        "filtered": check_stored_set(
            test_set, images[:9], ids=test_set.ids[:9], labels=test_set.labels[:9]
        ),
    }
    for name, findings in faults.items():
        assert failed(findings) == ["accounting/full/pgd"], name


def test_images_under_the_ids_of_others_leave_the_ball(test_set: ImageSet) -> None:
    assert failed(check_stored_set(test_set, attacked(test_set).roll(1, 0))) == [
        "threat_model/full/pgd"
    ]


def test_a_set_against_another_model_is_reported_as_a_transfer() -> None:
    same = {"classifier": ("a", "a"), "purifier": ("b", "b"), "data": ("c", "c")}
    assert sets.agreement("full/pgd", same).passed
    for part in same:
        found = sets.agreement("full/pgd", {**same, part: ("a", "z")})
        assert not found.passed and found.level == "block"
        assert f"another {part}" in found.detail and "transfer" in found.detail


@pytest.mark.parametrize(
    ("n", "mended", "fooled", "level", "passed"),
    [
        (1000, 0, 0, "warn", True),
        (1000, 10, 0, "warn", True),
        (1000, 11, 0, "warn", False),
        (1000, 300, 0, "warn", False),
        (1000, 0, 10, "warn", True),
        (1000, 0, 11, "warn", False),
        (1000, 0, 20, "warn", False),
        (1000, 0, 21, "block", False),
        (1000, 21, 21, "block", False),
        (1000, 300, 21, "block", False),
        (50, 0, 3, "warn", False),
        (50, 4, 4, "block", False),
    ],
)
def test_rounding_may_not_fool_what_withstood(
    n: int, mended: int, fooled: int, level: str, passed: bool
) -> None:
    """Images that are right again do not make up for those that are fooled only then."""
    stored = np.arange(n) < n // 2
    rounded = stored.copy()
    rounded[:fooled], rounded[n - mended :] = False, True
    found = sets.rounding(stored.astype(float), rounded.astype(float))
    assert (found.level, found.passed) == (level, passed), found.detail


def test_rounded_images_are_at_the_nearest_levels() -> None:
    origin, x = torch.tensor([[[[10.0, 10, 10, 0]]]]), torch.tensor([[[[12.4, 7.4, 12.6, 0.2]]]])
    threat = Linf(norm="linf", eps_255=3)
    levels = 255 * sets.in_levels(x / 255, origin / 255, threat)
    torch.testing.assert_close(levels, torch.tensor([[[[12.0, 7, 13, 0]]]]))


def test_a_level_outside_the_ball_gives_way_to_the_next_one_inside() -> None:
    origin, x = torch.tensor([[[[10.0, 10, 10, 9]]]]), torch.tensor([[[[13.5, 6.5, 12.4, 9]]]])
    threat = Linf(norm="linf", eps_255=3.5)
    levels = 255 * sets.in_levels(x / 255, origin / 255, threat)
    torch.testing.assert_close(levels, torch.tensor([[[[13.0, 7, 12, 9]]]]))


@THREATS
def test_rounding_leaves_no_ball(threat: Linf | L2, test_set: ImageSet) -> None:
    for ball in (threat, threat.scaled(0.513), threat.scaled(0.02)):
        clean = test_set.pixels()
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        levels = sets.in_levels(ball.project(clean + noise, clean), clean, ball)
        assert violations(levels, clean, ball) == []
        torch.testing.assert_close(255 * levels, (255 * levels).round(), rtol=0, atol=1e-4)
