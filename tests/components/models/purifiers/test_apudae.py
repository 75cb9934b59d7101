"""APuDAE: the denoisers, the variants of the descent, its gradient and its stand-ins."""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from toys import keyed, uniform_pixels

from components.data.draws import NoiseStream
from components.models.defense import Defense, bind, margin
from components.models.purifiers.apudae import Apudae, RandomAffine
from components.models.purifiers.autoencoder import ConvAutoencoder
from components.models.purifiers.contract import Purifier
from components.models.purifiers.denoiser import Denoiser, DenoisingAutoencoder, RedNet
from components.training.contract import Batch, Frozen
from components.training.generative import Denoising

SHAPE = (1, 8, 8)
BASE: dict[str, Any] = {
    "kind": "apudae", "steps": 4, "rate": 0.02, "optimiser": "adam", "target": "minimum",
    "scaled": False, "noise_255": 0.0, "transform": None,
}  # fmt: skip
AFFINE = {"degrees": 5.0, "stretch": 0.1}
VARIANTS: dict[str, dict[str, Any]] = {
    "A": {"optimiser": "sgd", "rate": 0.1},
    "B": {},
    "C": {"scaled": True},
    "D": {"target": "distribution"},
    "E": {"target": "one_sided"},
    "F": {"target": "one_sided", "noise_255": 0.7},
    "C, once": {"scaled": True, "scaled_once": True},
    "F, after": {"target": "one_sided", "noise_255": 0.7, "noise_after": True},
    "G": {"target": "one_sided", "noise_255": 0.7, "transform": AFFINE},
}


class Shrink(DenoisingAutoencoder):
    """f(x) = half of x: rd(x) = |x|^2 / 4, whose gradient is x / 2."""

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        return x / 2


def denoiser(trained: bool = True) -> DenoisingAutoencoder:
    torch.manual_seed(0)
    network = Denoiser(kind="denoiser", width=4).build(SHAPE)
    with torch.no_grad():
        for _ in range(3):
            network.train()(uniform_pixels(32, SHAPE))
    network.eval().requires_grad_(False)
    if trained:
        network.calibrate(uniform_pixels(32, SHAPE), 8)
    return network


def apudae(network: nn.Module, **changes: Any) -> Purifier:
    return Apudae.model_validate({**BASE, **changes}).wrap(network).eval()


def test_networks_of_the_paper_have_their_size() -> None:
    small = Denoiser(kind="denoiser", width=64).build((1, 28, 28))
    red = RedNet(kind="red_net", blocks=15, width=64).build((3, 32, 32))
    assert sum(p.numel() for p in small.parameters()) == pytest.approx(0.0755e6, rel=0.01)
    assert sum(p.numel() for p in red.parameters()) == pytest.approx(1.041e6, rel=0.01)


@pytest.mark.parametrize("config", [Denoiser(kind="denoiser", width=4),
                                    RedNet(kind="red_net", blocks=5, width=4)])  # fmt: skip
def test_odd_sides_are_refused(config: Denoiser | RedNet) -> None:
    with pytest.raises(ValueError, match="halves once, which 7 x 8 images do not allow"):
        config.build((1, 7, 8))


def test_calibration_stores_mean_and_deviation_for_any_batch() -> None:
    network, x = denoiser(trained=False), uniform_pixels(20, SHAPE)
    errors = (x - network(x)).square().flatten(1).sum(1)
    for batch in (1, 7, 20):
        network.calibrate(x, batch)
        assert torch.allclose(network.clean_mean, errors.mean())
        assert torch.allclose(network.clean_std, errors.std())
    assert torch.allclose(network.detector_score(x), (errors - errors.mean()) / errors.std())


def test_descent_on_a_known_error_has_a_closed_form() -> None:
    """With f(x) = x/2, an SGD step of rate r maps x to x (1 - r/2)."""
    x = uniform_pixels(3, SHAPE)
    direct = apudae(Shrink(), optimiser="sgd", rate=0.4, steps=3)(x)
    assert torch.allclose(direct, x * 0.8**3, atol=1e-6)
    one = apudae(Shrink(), steps=1, rate=0.01)(x)
    assert torch.allclose(one, (x - 0.01).clamp(0, 1), atol=1e-5), "Adam's first step is a sign"


def test_one_sided_target_leaves_clean_images_unchanged() -> None:
    network = Shrink()
    x = uniform_pixels(8, SHAPE)
    error = x.square().flatten(1).sum(1) / 4
    network.clean_mean.copy_(error.sort().values[3:5].mean())
    purified = apudae(network, target="one_sided", steps=6)(x)
    below = error <= network.clean_mean
    assert below.any() and not below.all()
    assert torch.equal(purified[below], x[below])
    moved = (purified != x).flatten(1).any(1)
    assert torch.equal(moved, ~below)
    two_sided = apudae(network, target="distribution", steps=6)(x)
    assert (two_sided != x).flatten(1).any(1).all(), "D moves clean images to the mean too"


def test_scaled_rate_grows_with_the_error() -> None:
    network = Shrink()
    x = torch.cat([torch.full((1, *SHAPE), 0.1), torch.full((1, *SHAPE), 0.9)])
    network.clean_mean.copy_(network.error(x).mean())
    network.clean_std.fill_(0.5)
    step = x - apudae(network, steps=1, scaled=True)(x)
    factor = torch.sigmoid((network.error(x) - network.clean_mean) / network.clean_std)
    expected = (0.02 * factor)[:, None, None, None].expand_as(step)
    assert torch.allclose(step, expected, atol=1e-5)


@pytest.mark.parametrize("once", [False, True])
def test_rate_is_that_of_the_current_image_or_of_the_first(once: bool) -> None:
    """On 64 pixels of value v, rd = 16 v^2 and its gradient is v/2: two steps by hand."""
    network = Shrink()
    network.clean_mean.fill_(5.0)
    network.clean_std.fill_(4.0)
    switch = {"scaled_once": True} if once else {}
    purifier = apudae(network, optimiser="sgd", rate=0.5, steps=2, scaled=True, **switch)

    def factor(value: float) -> float:
        return 1 / (1 + math.exp(-(16 * value**2 - 5) / 4))

    one = 0.8 - 0.5 * factor(0.8) * 0.4
    two = one - 0.5 * factor(0.8 if once else one) * one / 2
    assert factor(0.8) - factor(one) > 0.1, "both readings must differ"
    purified = purifier(torch.full((1, *SHAPE), 0.8))
    assert torch.allclose(purified, torch.full_like(purified, two), atol=1e-6)


@pytest.mark.parametrize("after", [False, True])
def test_gradient_is_taken_at_the_noisy_image_or_at_the_one_before(after: bool) -> None:
    """With f(x) = x/2, a step leads from x and noise n to (x + n)(1 - r/2), or to x + n - x r/2."""
    network, x, draws = Shrink(), 0.3 + 0.4 * uniform_pixels(3, SHAPE), keyed(3)
    switch = {"noise_after": True} if after else {}
    settings = {"optimiser": "sgd", "rate": 0.4, "noise_255": 20.0}
    purified = apudae(network, steps=2, **settings, **switch)(x, draws)
    image = x
    for index in range(2):
        excess = image.square().flatten(1).sum(1) / 4
        size = (20 / 255 * (excess / 2) ** 2).clamp(max=80 / 255)[:, None, None, None]
        noise = size * (2 * draws.uniform(SHAPE, f"step {index}") - 1)
        image = image + noise - 0.2 * (image if after else image + noise)
    assert torch.allclose(purified, image.clamp(0, 1), atol=1e-6)


def test_noise_grows_with_the_detector_score_and_is_zero_at_the_mean() -> None:
    network = Shrink()
    x = torch.full((2, *SHAPE), 0.5)
    x[1] = 0.9
    network.clean_mean.copy_(network.error(x)[0])
    noisy = apudae(network, target="one_sided", noise_255=0.7, steps=1, rate=1e-9)
    moved = (noisy(x, keyed(2)) - x).abs().flatten(1).amax(1)
    amplitude = 0.7 / 255 * min(float((network.error(x)[1] - network.clean_mean) / 2) ** 2, 4)
    assert moved[0] < 1e-7 and 0.8 * amplitude < moved[1] <= amplitude + 1e-6


def test_random_affine_keeps_lengths_range_and_the_identity() -> None:
    x, draws = uniform_pixels(4, SHAPE), keyed(4)
    still = RandomAffine(degrees=0.0, stretch=0.0).apply(x, draws)
    assert torch.allclose(still, x, atol=1e-5)
    # In a wide image too, a dot four pixels from the centre stays at that distance.
    wide = torch.zeros(1, 1, 9, 17)
    wide[0, 0, 4, 12] = 1.0
    quarter = math.atan2(1, 1)
    rotation = RandomAffine(degrees=45.0, stretch=0.0)
    for k in range(40):
        one = keyed(1).redraw(k)
        angle = (2 * float(one.uniform((2,), "turn")[0, 0]) - 1) * quarter
        there = rotation.apply(wide, one)[0, 0]
        row, column = (there.argmax() // 17).item(), (there.argmax() % 17).item()
        assert abs(abs(row - 4) - abs(4 * math.sin(angle))) < 0.8
        assert abs(abs(column - 8) - abs(4 * math.cos(angle))) < 0.8
    transformed = RandomAffine(degrees=20.0, stretch=0.2).apply(x, draws)
    assert (transformed - x).abs().amax() > 0.1
    assert transformed.min() >= 0 and transformed.max() <= 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_image_does_not_depend_on_its_batch(variant: str) -> None:
    x, draws = uniform_pixels(9, SHAPE), keyed(9)
    purifier = apudae(denoiser(), **VARIANTS[variant])
    whole = purifier(x, draws)
    assert purifier.stochastic == (variant[0] in "FG")
    assert whole.min() >= 0 and whole.max() <= 1
    for rows in (torch.tensor([4]), torch.tensor([8, 0, 3])):
        assert torch.allclose(purifier(x[rows], draws[rows]), whole[rows], rtol=0, atol=1e-5)


# Central differences fail at the kinks of the denoiser (ReLU, clip). Elsewhere they must agree.
@pytest.mark.parametrize("variant", ["A", "C", "C, once", "D", "E", "F", "F, after", "G"])
def test_unrolled_gradient_matches_central_differences(variant: str) -> None:
    network = denoiser()
    network.clean_mean.mul_(0.3)
    changes = {"optimiser": "sgd", "rate": 0.05, **VARIANTS[variant], "steps": 3}
    if variant not in "A":
        changes |= {"optimiser": "sgd", "rate": 0.005}
    purifier = apudae(network, **changes).double()
    x, draws = 0.3 + 0.4 * uniform_pixels(4, SHAPE).double(), keyed(4)
    point = x.clone().requires_grad_()
    probe = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).double()
    (gradient,) = torch.autograd.grad((purifier(point, draws) * probe).sum(), point)
    agreed = 0
    for seed in range(6):
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).double()

        def difference(h: float, direction: Tensor = direction) -> Tensor:
            change = purifier(x + h * direction, draws) - purifier(x - h * direction, draws)
            return (change * probe).sum((1, 2, 3)) / (2 * h)

        coarse, fine = difference(1e-6), difference(3e-7)
        smooth = (coarse - fine).abs() <= 1e-4 * fine.abs().clamp_min(1e-6)
        predicted = (gradient * direction).sum((1, 2, 3))
        assert torch.allclose(predicted[smooth], fine[smooth], rtol=1e-3, atol=1e-6)
        agreed += int(smooth.sum())
    assert agreed >= 8


def test_gradient_changes_if_the_denoiser_is_detached(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: the error ignores the dependence of f(x) on x."""
    exact = input_gradient(denoiser())
    monkeypatch.setattr(
        DenoisingAutoencoder,
        "error",
        lambda self, x: (x - self(x).detach()).square().flatten(1).sum(1),
    )
    assert not torch.allclose(input_gradient(denoiser()), exact, rtol=0.05)


def input_gradient(network: DenoisingAutoencoder) -> Tensor:
    point = uniform_pixels(4, SHAPE).requires_grad_()
    (gradient,) = torch.autograd.grad(
        apudae(network, optimiser="sgd", rate=0.05)(point).square().sum(), point
    )
    return gradient


def test_stand_ins_keep_the_value_and_have_gradients_of_their_own() -> None:
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).requires_grad_(False)
    purifier = apudae(denoiser())
    defense = Defense(classifier, purifier).freeze()
    x, labels, draws = uniform_pixels(5, SHAPE), torch.zeros(5, dtype=torch.int64), keyed(5)
    exact = bind(defense, "full", draws, 1).evaluate(x, labels, margin, 0)
    seen = [exact.gradient]
    for kind in purifier.stand_ins:
        found = bind(defense, kind, draws, 1).evaluate(x, labels, margin, 0)
        assert torch.allclose(found.margin, exact.margin, atol=1e-6)
        assert found.gradient.flatten(1).ne(0).any(1).all()
        assert all(not torch.allclose(found.gradient, other) for other in seen)
        seen.append(found.gradient)
    with pytest.raises(ValueError, match="has no stand-in short; it has direct, plain"):
        bind(defense, "short", draws, 1).evaluate(x, labels, margin, 0)


def test_direct_stand_in_is_one_pass_of_the_denoiser() -> None:
    network, x = denoiser(), uniform_pixels(3, SHAPE)
    assert torch.equal(apudae(network).stand_in("direct", x, None), network(x))


def test_other_networks_and_a_zero_rate_are_refused() -> None:
    other = ConvAutoencoder(
        kind="conv_autoencoder", blocks=2, width=2, strided=[], residual="none"
    ).build(SHAPE)
    with pytest.raises(ValueError, match="apudae needs a denoiser or a red_net"):
        apudae(other)
    with pytest.raises(ValidationError, match="rate"):
        Apudae.model_validate({**BASE, "rate": 0})


def test_switches_without_an_effect_are_refused() -> None:
    with pytest.raises(ValidationError, match="scaled_once: true needs scaled: true"):
        apudae(Shrink(), scaled_once=True)
    with pytest.raises(ValidationError, match="noise_after: true needs noise_255 above 0"):
        apudae(Shrink(), noise_after=True)


def test_denoising_objective_draws_a_noise_level_per_image() -> None:
    """With f = identity, the loss is the mean squared noise: sigma_max^2 / 3."""

    class Identity(Purifier):
        def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
            return x

    frozen = Frozen(None, (), None)  # type: ignore[arg-type]
    objective = Denoising(kind="denoising", sigma_max=0.3).bind(frozen)
    x = uniform_pixels(4000, SHAPE)
    loss, _ = objective(Identity(), Batch(x, torch.zeros(4000), None), 0.5, keyed(4000))
    assert float(loss) == pytest.approx(0.3**2 / 3, rel=0.03)
