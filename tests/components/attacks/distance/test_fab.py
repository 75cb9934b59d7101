"""FAB: its projection and its steps by hand and in closed form."""

from collections.abc import Callable
from itertools import pairwise
from typing import ClassVar

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch import Tensor, nn
from toy_networks import Linear, Noisy
from toys import LINF, THREATS, distances, linear_task, parse_attack, resized

from components.attacks import L2, Linf, craft
from components.attacks.autoattack import AuthorsFabT
from components.attacks.distance import fab
from components.attacks.distance.fab import FabT, to_plane
from components.attacks.search import Search
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.defense import Defense

ORDERS = pytest.mark.parametrize("order", [torch.inf, 2.0], ids=["linf", "l2"])


def fab_t(**changes: int) -> FabT:
    return FabT(kind="fab_t", **{"steps": 20, "targets": 1, "restarts": 1, **changes})


# The projection onto a plane within the box


def problem(count: int, pixels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return images with many pixels at 0 or 1, and planes of which some are out of reach."""
    generator = torch.Generator().manual_seed(0)
    x = (1.6 * torch.rand(count, 1, 1, pixels, generator=generator) - 0.3).clamp(0, 1)
    slope = torch.randn(count, 1, 1, pixels, generator=generator)
    slope[:, :, :, 0] = 0
    return x, slope, 1.5 * torch.randn(count, generator=generator)


def best_corner(x: Tensor, slope: Tensor, rise: Tensor) -> Tensor:
    """Return the step to the corner of the box furthest along `slope`, with the sign of `rise`."""
    sign = (slope * rise[:, None, None, None]).sign()
    return torch.where(sign > 0, 1 - x, torch.where(sign < 0, -x, 0))


def shortest_length(x: Tensor, slope: Tensor, rise: float, order: float) -> float:
    """Return the length of the shortest step to the plane, by scipy."""
    x, slope = x.flatten().double(), slope.flatten().double()
    bounds = list(zip((-x).tolist(), (1 - x).tolist(), strict=True))
    if order == torch.inf:
        size, eye = len(x), np.eye(len(x))
        within = np.vstack([np.hstack([sign * eye, -np.ones((size, 1))]) for sign in (1, -1)])
        plane = np.append(slope.numpy(), 0)[None]
        found = linprog(
            np.append(np.zeros(size), 1), within, np.zeros(2 * size), plane, [rise],
            [*bounds, (0, None)],
        )  # fmt: skip
    else:
        found = minimize(
            lambda d: (d @ d), np.zeros(len(x)), jac=lambda d: 2 * d, bounds=bounds,
            constraints={"type": "eq", "fun": lambda d: slope.numpy() @ d - rise},
            options={"ftol": 1e-9, "maxiter": 500},
        )  # fmt: skip
    assert found.success, found.message
    return float(found.fun if order == torch.inf else found.fun**0.5)


@ORDERS
def test_to_plane_returns_the_shortest_step(order: float) -> None:
    x, slope, rise = problem(60, 7)
    step = to_plane(x, slope, rise, order)
    corner = best_corner(x, slope, rise)
    far = (slope * corner).flatten(1).sum(1).abs()
    reached = rise.abs() < far
    assert 30 < reached.sum() < 60
    assert (x + step).min() >= 0 and (x + step).max() <= 1
    assert torch.allclose((slope * step).flatten(1).sum(1)[reached], rise[reached], atol=1e-6)
    assert torch.allclose(step[~reached], corner[~reached])
    lengths = torch.linalg.vector_norm(step, order, dim=(1, 2, 3))
    for row in reached.nonzero().flatten().tolist():
        shortest = shortest_length(x[row], slope[row], rise[row].item(), order)
        assert lengths[row].item() == pytest.approx(shortest, abs=1e-4)


def test_other_pixels_move_further_once_one_reaches_its_limit() -> None:
    x, slope = torch.tensor([0.5, 0.9, 0.5]), torch.tensor([1.0, 1.0, 0.0])
    for order, expected in ((2.0, [0.3, 0.1, 0.0]), (torch.inf, [0.3, 0.1, 0.0])):
        step = to_plane(x.view(1, 1, 1, 3), slope.view(1, 1, 1, 3), torch.tensor([0.4]), order)
        assert step.flatten().tolist() == pytest.approx(expected)
    slope = torch.tensor([3.0, -1.0, 0.0]).view(1, 1, 1, 3)
    for order, expected in ((2.0, [-0.3, 0.1, 0.0]), (torch.inf, [-0.25, 0.1, 0.0])):
        rise = torch.tensor([-1.0 if order == 2 else -0.85])
        step = to_plane(x.view(1, 1, 1, 3), slope, rise, order)
        assert step.flatten().tolist() == pytest.approx(expected)


@ORDERS
def test_to_plane_does_not_depend_on_scale_batch_or_memory_layout(order: float) -> None:
    x, slope, rise = problem(40, 50)
    step = to_plane(x, slope, rise, order)
    for factor in (1e-25, 1e-12, 1e12, 1e25):
        assert torch.allclose(to_plane(x, factor * slope, factor * rise, order), step, atol=1e-5)
    rows = torch.arange(40)[:, None]
    alone = torch.cat([to_plane(x[row], slope[row], rise[row], order) for row in rows])
    assert torch.allclose(alone, step, rtol=0, atol=1e-6)
    # The memory layout in which a convolution with channels-last weights returns gradients.
    strided = slope.reshape(40, 5, 5, 2).contiguous(memory_format=torch.channels_last)
    assert not strided.is_contiguous()
    turned = to_plane(x.reshape(40, 5, 5, 2), strided, rise, order)
    assert torch.allclose(turned.reshape(step.shape), step, atol=1e-6)


@ORDERS
def test_to_plane_does_not_move_without_a_finite_slope_and_rise(order: float) -> None:
    x, slope, rise = problem(10, 6)
    assert not to_plane(x, torch.zeros_like(slope), rise, order).any()
    assert not to_plane(x, slope, torch.zeros_like(rise), order).any()
    assert not to_plane(x, torch.zeros_like(slope), torch.zeros_like(rise), order).any()
    for value in (torch.nan, torch.inf, -torch.inf):
        broken = slope.clone()
        broken[:, :, :, 3] = value
        assert not to_plane(x, broken, rise, order).any()
        assert not to_plane(x, value * slope, rise, order).any()
    assert not to_plane(x, slope, torch.nan * rise, order).any()
    assert to_plane(x[:0], slope[:0], rise[:0], order).shape == (0, 1, 1, 6)


# FAB by hand: an image of one pixel, 0.5, that is fooled where `lead` is positive


class Pixel(nn.Module):
    """Two classes; the second leads by a function of the one pixel."""

    def __init__(self, lead: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.lead, self.anchor = lead, nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        lead = self.lead(x.flatten(1)[:, 0])
        return torch.stack([torch.zeros_like(lead), lead], 1)


class OnePixel(ImageSet):
    """One image of one pixel, 0.5 to the last bit."""

    def pixels(self) -> Tensor:
        return torch.full((len(self), 1, 1, 1), 0.5)

    def __getitem__(self, rows: Tensor) -> "OnePixel":
        return self


def final_pixel(
    lead: Callable[[Tensor], Tensor],
    eps: float,
    like: Linf | L2,
    kind: type[FabT] = FabT,
    **changes: int,
) -> tuple[float, bool, int]:
    """Run FAB; return the final pixel, whether it fools, and the number of steps."""
    data = OnePixel(
        torch.zeros(1, 1, 1, 1).byte(), torch.zeros(1).long(), torch.arange(1), ("a", "b")
    )
    defense = Defense(Pixel(lead), None).freeze()
    attack = kind.model_validate(fab_t(**changes).model_dump())
    found = craft(attack, defense, "full", data, resized(like, eps), 0, 1)
    return found.images.item(), bool(found.success.item()), int(found.iterations.item())


@THREATS
def test_fab_takes_the_steps_of_the_paper(threat: Linf | L2) -> None:
    def straight(x: Tensor) -> Tensor:
        return x - 0.7

    # Overshoot: the boundary is 0.2 away, and the step is 5 % longer.
    assert final_pixel(straight, 0.22, threat) == pytest.approx((0.71, True, 1), abs=1e-6)
    # That lies outside the threat: a tenth of the way back, to 0.689. The boundary is 0.011 away
    # from there and 0.2 from the image: the bias is 0.011 / 0.211, from 0.70055 towards 0.71.
    assert final_pixel(straight, 0.205, threat) == pytest.approx((0.7010427, True, 2), abs=1e-6)

    def receding(x: Tensor) -> Tensor:
        return torch.where(x < 0.705, x - 0.7, x - 0.91)

    # Not fooled at 0.71, so there is no step back. The boundary is 0.2 away from there and 0.41
    # from the image: the bias is cut to 0.1, between 0.92 and 0.9305.
    assert final_pixel(receding, 0.43, threat) == pytest.approx((0.92105, True, 2), abs=1e-6)


@THREATS
def test_the_final_search_interpolates_three_times_and_goes_past_the_boundary(
    threat: Linf | L2,
) -> None:
    def bent(x: Tensor) -> Tensor:
        return torch.where(x < 0.7, x - 0.7, 0.5 * (x - 0.7))

    x, expected = 0.71, []
    for _ in range(3):
        boundary = 0.5 + (x - 0.5) * 0.2 / (0.2 + 0.5 * (x - 0.7))
        x = boundary + 0.1 * (x - boundary)
        expected.append(x)
    assert expected == pytest.approx([0.705390, 0.702932, 0.701603], abs=1e-6)
    for eps, found in zip((0.206, 0.204, 0.202), expected, strict=True):
        assert final_pixel(bent, eps, threat, steps=1) == pytest.approx((found, True, 1), abs=1e-6)
    assert not final_pixel(bent, 0.2015, threat, steps=1)[1]
    assert not final_pixel(bent, 0.206, threat, AuthorsFabT, steps=1)[1]


@THREATS
def test_a_crossing_outside_the_threat_is_no_success(threat: Linf | L2) -> None:
    x, success, steps = final_pixel(lambda x: x - 0.7, 0.19, threat)
    assert not success and steps == 20
    assert 0.5 <= x <= 0.69 + 1e-6


@THREATS
def test_nan_logits_count_as_fooled_and_do_not_end_a_run(threat: Linf | L2) -> None:
    """There is no gradient there: only the backward steps lead out."""

    def torn(x: Tensor) -> Tensor:
        return (x - 0.7) * torch.where(x < 0.6, 1.0, torch.nan)

    # 0.71, and then nine tenths of the distance, again and again: 0.689, 0.6701, 0.65309, ...
    expected = 0.5 + 0.21 * 0.9**6
    assert final_pixel(torn, 0.112, threat) == pytest.approx((expected, True, 7), abs=1e-5)
    assert not final_pixel(torn, 0.09, threat)[1]


# FAB: nearest points, restarts, refusals


def boxed_task(classes: int, count: int) -> tuple[Linear, ImageSet, Callable[[float], Tensor]]:
    """Return a linear model, images with pixels at 0 and 1, and their exact distances by order.

    A distance is that to the nearest misclassified image within [0,1], in the norm of that order,
    by bisection in float64.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(classes, 36, generator=generator)
    images = torch.randint(-120, 376, (count, 1, 6, 6), generator=generator).clamp(0, 255).byte()
    bias = -(weight @ torch.full((36,), 128 / 255))
    model = Linear(weight, bias)
    labels = model(images / 255).argmax(1)
    names = tuple(str(k) for k in range(classes))

    def exact(order: float) -> Tensor:
        x = (images / 255).flatten(1).double()
        logits = model(x).double()
        nearest = torch.full((count,), torch.inf, dtype=torch.float64)
        for other in range(classes):
            slope = (weight[other] - weight[labels]).double()
            gap = logits.gather(1, labels[:, None]).squeeze(1) - logits[:, other]
            room = torch.where(slope > 0, 1 - x, x)
            speed = torch.ones_like(slope) if order == torch.inf else slope.abs()
            low, high = torch.zeros(count, 1).double(), torch.full((count, 1), 100.0).double()
            for _ in range(100):
                middle = (low + high) / 2
                short = ((slope.abs() * torch.minimum(middle * speed, room)).sum(1) < gap)[:, None]
                low, high = torch.where(short, middle, low), torch.where(short, high, middle)
            length = torch.minimum(high * speed, room).norm(dim=1, p=order)
            reached = (slope.abs() * room).sum(1) > gap
            nearest = torch.where(reached & (labels != other), length.minimum(nearest), nearest)
        return nearest

    return model, ImageSet(images, labels, torch.arange(count), names), exact


@THREATS
def test_fab_finds_the_nearest_point_within_the_box_on_a_linear_model(threat: Linf | L2) -> None:
    model, data, exact = boxed_task(5, 1000)
    distance = exact(torch.inf if threat is LINF else 2.0)
    free = distances(model, data, 1 if threat is LINF else 2)
    assert (distance > 1.05 * free).float().mean() > 0.3, "too few images are limited by [0,1]"
    eps = distance.quantile(0.5).item()
    attack = fab_t(steps=30, targets=4)
    crafted = craft(
        attack, Defense(model, None).freeze(), "full", data, resized(threat, eps), 0, 500
    )
    assert not (crafted.success & (distance > eps + 1e-5)).any(), (
        "an image was fooled within its exact distance"
    )
    assert (~crafted.success).float().mean().item() == pytest.approx(0.5, abs=0.002)
    assert (crafted.iterations[~crafted.success] == 120).all()


class Recording(nn.Module):
    """A classifier that records the images whose gradient is evaluated."""

    seen: ClassVar[list[Tensor]] = []

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen.clear()

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.seen.append(x.detach().clone())
        logits: Tensor = self.model(x)
        return logits


@THREATS
def test_a_restart_starts_half_a_radius_away(threat: Linf | L2) -> None:
    model, data = linear_task(4, 40)
    close, order = threat.scaled(0.01), torch.inf if threat is LINF else 2
    defense = Defense(Recording(model), None).freeze()
    robust = data[distances(model, data, 1 if threat is LINF else 2) > 2 * close.eps]
    attack = fab_t(steps=2, targets=1, restarts=3)
    crafted = craft(attack, defense, "full", robust, close, 0, 40)
    assert len(robust) > 20 and not crafted.success.any()
    # Two for each restart; `craft` asks about the finished images in three more.
    assert len(Recording.seen) == 6 + 3
    starts = Recording.seen[:6:2]
    first, second, third = (
        torch.linalg.vector_norm(x - robust.pixels(), order, dim=(1, 2, 3)) for x in starts
    )
    assert not first.any()
    for length in (second, third):
        assert torch.allclose(length, torch.full_like(length, close.eps / 2), atol=1e-6)
    assert not torch.allclose(starts[1], starts[2], atol=close.eps / 10)


def test_more_targets_restarts_and_steps_fool_no_fewer_images(
    classifier: Classifier, test_set: ImageSet
) -> None:
    data, defense = test_set[torch.arange(60)], Defense(classifier, None).freeze()
    for key, values in (("steps", (1, 5, 20)), ("targets", (1, 4, 9)), ("restarts", (1, 2, 3))):
        small = {"steps": 5, "targets": 2}
        sets = [
            craft(fab_t(**{**small, key: value}), defense, "full", data, LINF, 0, 60).success
            for value in values
        ]
        assert all(more[less].all() for less, more in pairwise(sets)), key
    assert sets[-1].sum() > 20


def test_fab_leaves_the_ball_if_its_search_records_every_image(
    classifier: Classifier, test_set: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted fault: without `BoundedSearch.record` the nearest crossing is returned anywhere."""
    data, defense = test_set[torch.arange(20)], Defense(classifier, None).freeze()
    threat = LINF.scaled(0.1)
    craft(parse_attack("fab_t"), defense, "full", data, threat, 0, 20)
    monkeypatch.setattr(fab.BoundedSearch, "record", Search.record)
    with pytest.raises(AssertionError, match=r"FabT left the threat: .*linf distance"):
        craft(parse_attack("fab_t"), defense, "full", data, threat, 0, 20)


def test_fab_refuses_stochastic_defenses_and_too_many_targets(
    classifier: Classifier, test_set: ImageSet
) -> None:
    data = test_set[torch.arange(4)]
    with pytest.raises(ValueError, match=r"fab_t .* not for stochastic defenses"):
        craft(fab_t(), Defense(classifier, Noisy()).freeze(), "full", data, LINF, 0, 4)
    with pytest.raises(ValueError, match="fab_t needs at most 9 targets here, but has targets: 10"):
        craft(fab_t(targets=10), Defense(classifier, None).freeze(), "full", data, LINF, 0, 4)
