"""The GAN, its losses and the descent on its codes, against closed forms and slow references."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from toys import keyed, uniform_pixels

from components.models.purifiers import gan
from components.models.purifiers.contract import Purifier
from components.models.purifiers.gan import (
    DefenseGan,
    Gan,
    GenerativePair,
    critic_loss,
    generator_loss,
)

SHAPES = [(1, 8, 8), (3, 12, 16), (1, 28, 28), (3, 32, 32), (2, 9, 15)]
SMALL = (1, 8, 8)
IMAGES = 12


def pair(shape: tuple[int, int, int] = SMALL, latent: int = 8, width: int = 4) -> GenerativePair:
    torch.manual_seed(0)
    return Gan(kind="gan", latent=latent, width=width).build(shape)


def exact() -> GenerativePair:
    """Return a frozen pair in float64 with large weights, so that its images differ."""
    made = pair().double().requires_grad_(False)
    for parameter in made.generator.parameters():
        parameter.mul_(4)
    return made


def wrapped(network: nn.Module, **changes: Any) -> Purifier:
    settings = {"iterations": 6, "restarts": 3, "rate": 30.0, **changes}
    return DefenseGan(kind="defense_gan", **settings).wrap(network).eval()


def latent_noise(count: int, latent: int) -> tuple[Tensor, Tensor]:
    return keyed(count).normal((latent,), "latent"), keyed(count).uniform((1, 1, 1), "mix")


def reconstruct_by_hand(
    generator: Callable[[Tensor], Tensor],
    x: Tensor,
    latent: int,
    restart: int,
    iterations: int,
    rate: float,
) -> Tensor:
    """Reconstruct the images one by one, from one start, with an ordinary graph."""
    starts = keyed(len(x)).normal((latent,), f"start {restart}").to(x.dtype)
    made = []
    for image, start in zip(x, starts, strict=True):
        code, velocity = start * math.sqrt(1 / latent), torch.zeros_like(start)
        for k in range(iterations - 1):
            point = code if code.requires_grad else code.requires_grad_()
            error = (generator(point[None])[0] - image).square().mean()
            (gradient,) = torch.autograd.grad(error, point, create_graph=True)
            velocity = 0.7 * velocity + gradient
            code = code - rate * 0.1 ** (k / math.ceil(0.8 * iterations)) * velocity
        made.append(generator(code[None])[0])
    return torch.stack(made)


# The networks


def test_networks_of_the_paper_have_their_size() -> None:
    made = pair((1, 28, 28), 128, 64)
    generator = sum(parameter.numel() for parameter in made.generator.parameters())
    assert generator == 128 * 4096 + 4096 + 819_328 + 204_864 + 1_601
    assert generator / 1e6 == pytest.approx(1.55, rel=0.01)
    critic = [tuple(p.shape) for p in made.critic.parameters() if p.dim() > 1]
    assert critic == [(64, 1, 5, 5), (128, 64, 5, 5), (256, 128, 5, 5), (1, 4096)]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in made.modules())


@pytest.mark.parametrize(
    ("shape", "sides"),
    [
        ((1, 28, 28), [(4, 4), (7, 7), (14, 14), (28, 28)]),
        ((3, 32, 32), [(4, 4), (8, 8), (16, 16), (32, 32)]),
        ((1, 8, 8), [(1, 1), (2, 2), (4, 4), (8, 8)]),
        ((3, 12, 16), [(2, 2), (3, 4), (6, 8), (12, 16)]),
    ],
)
def test_generator_layers_have_the_sides_of_the_paper(
    shape: tuple[int, int, int], sides: list[tuple[int, int]]
) -> None:
    made, seen = pair(shape), []
    for rise in made.generator.get_submodule("rises").children():
        rise.register_forward_pre_hook(lambda m, args: seen.append(tuple(args[0].shape[2:])))
    images = made.generator(torch.zeros(1, 8))
    assert [*seen, tuple(images.shape[2:])] == sides


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_generator_returns_pixels_and_critic_one_number_per_image(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    made = pair(shape).to(dtype)
    images = made.generator(20 * torch.randn(7, 8, dtype=dtype))
    assert images.shape == (7, *shape) and images.dtype == dtype
    assert images.min() >= 0 and images.max() <= 1 and images.std(0).min() > 0
    x = uniform_pixels(7, shape).to(dtype).requires_grad_()
    scores = made.critic(x)
    assert scores.shape == (7,) and scores.dtype == dtype
    (gradient,) = torch.autograd.grad(scores.sum(), x)
    assert gradient.ne(0).any(0).all(), "a pixel has no effect on the critic"


# The losses


class Affine(nn.Module):
    """D(x) = <w, x> + b: its gradient is w everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, generator=torch.Generator().manual_seed(3)))
        self.bias = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight + self.bias


class Bowl(nn.Module):
    """D(x) = a |x|^2 / 2: its gradient is a x."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.4))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * x.square().flatten(1).sum(1) / 2


def test_critic_loss_has_a_closed_form_for_an_affine_critic() -> None:
    made, real, (latent, mix) = pair(), uniform_pixels(IMAGES, SMALL), latent_noise(IMAGES, 8)
    critic = Affine()
    made.critic = critic  # type: ignore[assignment]
    gap = (made.generator(latent).mean(0) - real.mean(0)).flatten().detach()
    length = critic.weight.detach().norm()
    loss = critic_loss(made, real, latent, mix)
    assert torch.allclose(loss, gap @ critic.weight + 10 * (length - 1) ** 2, atol=1e-4)
    loss.backward()
    expected = gap + 20 * (length - 1) * critic.weight.detach() / length
    assert critic.weight.grad is not None
    assert torch.allclose(critic.weight.grad, expected, atol=1e-4)


def test_penalty_is_taken_per_image_at_the_mixture() -> None:
    made, real, (latent, mix) = pair(), uniform_pixels(IMAGES, SMALL), latent_noise(IMAGES, 8)
    bowl = Bowl()
    made.critic = bowl  # type: ignore[assignment]
    fake = made.generator(latent).detach()
    sizes = ((1 - mix) * real + mix * fake).flatten(1).square().sum(1).sqrt()
    means = [x.square().flatten(1).sum(1).mean() / 2 for x in (fake, real)]
    expected = 0.4 * (means[0] - means[1]) + 10 * (0.4 * sizes - 1).square().mean()
    loss = critic_loss(made, real, latent, mix)
    assert torch.allclose(loss, expected, atol=1e-4)
    loss.backward()
    slope = means[0] - means[1] + 20 * ((0.4 * sizes - 1) * sizes).mean()
    assert bowl.a.grad is not None and torch.allclose(bowl.a.grad, slope, rtol=1e-4)


def test_constant_critic_has_a_finite_loss_and_gradient() -> None:
    made, (latent, mix) = pair(), latent_noise(IMAGES, 8)
    nn.init.zeros_(made.critic.get_parameter("7.weight"))
    loss = critic_loss(made, uniform_pixels(IMAGES, SMALL), latent, mix)
    assert loss.item() == pytest.approx(10)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.critic.parameters())


def reached(module: nn.Module) -> list[bool]:
    return [p.grad is not None and bool(p.grad.ne(0).any()) for p in module.parameters()]


def test_each_loss_reaches_its_own_parameters_only() -> None:
    made, (latent, mix) = pair(), latent_noise(IMAGES, 8)
    critic_loss(made, uniform_pixels(IMAGES, SMALL), latent, mix).backward()
    # The gradient of the last bias is zero: it shifts real and fake images alike.
    assert all(reached(made.critic)[:-1])
    assert all(p.grad is None for p in made.generator.parameters())
    made.zero_grad()
    generator_loss(made, latent).backward()
    assert all(reached(made.generator))
    assert all(p.grad is None for p in made.critic.parameters())
    assert all(p.requires_grad for p in made.parameters())
    assert torch.equal(generator_loss(made, latent), -made.critic(made.generator(latent)).mean())


def test_a_step_on_the_generator_loss_raises_the_critic_value() -> None:
    made, (latent, _) = pair(), latent_noise(IMAGES, 8)
    before = made.critic(made.generator(latent)).mean()
    generator_loss(made, latent).backward()
    torch.optim.SGD(made.parameters(), 0.1).step()
    assert made.critic(made.generator(latent)).mean() > before


def test_losses_are_equal_without_gradients() -> None:
    made, (latent, mix) = pair(), latent_noise(IMAGES, 8)
    with torch.no_grad():
        off = (
            critic_loss(made, uniform_pixels(IMAGES, SMALL), latent, mix),
            generator_loss(made, latent),
        )
    assert not any(loss.requires_grad for loss in off)
    assert torch.allclose(off[0], critic_loss(made, uniform_pixels(IMAGES, SMALL), latent, mix))
    assert torch.allclose(off[1], generator_loss(made, latent))


def test_one_optimiser_alternates_and_the_critic_separates_real_from_fake() -> None:
    made, real = pair(), torch.zeros(IMAGES, *SMALL)
    first = made.generator(latent_noise(IMAGES, 8)[0]).mean()
    optimiser = torch.optim.Adam(made.parameters(), 1e-2, betas=(0.5, 0.9))
    for step in range(48):
        draws = keyed(IMAGES).redraw(step)
        latent, mix = draws.normal((8,), "latent"), draws.uniform((1, 1, 1), "mix")
        turn = step % 6 == 5
        resting = made.critic if turn else made.generator
        before = [p.clone() for p in resting.parameters()]
        loss = generator_loss(made, latent) if turn else critic_loss(made, real, latent, mix)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        after = resting.parameters()
        assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    fake = made.generator(latent_noise(IMAGES, 8)[0])
    assert made.critic(real).min() > made.critic(fake).max()
    assert fake.mean() < first - 0.02, "the generator has not approached the real images"


# The descent


class LinearGenerator(nn.Module):
    """G(z) = A z + c as images of 8 x 8, unbounded."""

    def __init__(self) -> None:
        super().__init__()
        made = torch.randn(64, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        self.matrix = nn.Parameter(made)

    def forward(self, codes: Tensor) -> Tensor:
        return (codes @ self.matrix.T + 0.5).unflatten(1, SMALL)


@pytest.mark.parametrize("iterations", [2, 3, 5])
def test_descent_on_a_linear_generator_has_a_closed_form(iterations: int) -> None:
    made, x = exact(), uniform_pixels(IMAGES, SMALL).double()
    made.generator = LinearGenerator()  # type: ignore[assignment]
    a = made.generator.get_parameter("matrix").detach()
    z = keyed(IMAGES).normal((8,), "start 0").double() / 8**0.5
    gap = x.flatten(1) - 0.5

    def gradient(code: Tensor) -> Tensor:
        return 2 / 64 * (code @ a.T - gap) @ a

    first = gradient(z)
    z = z - 0.8 * first
    if iterations > 2:
        second = gradient(z)
        decay = {3: 3, 5: 4}[iterations]
        velocity = 0.7 * first + second
        z = z - 0.8 * 0.1 ** (1 / decay) * velocity
    if iterations > 3:
        third = 0.7 * velocity + gradient(z)
        z = z - 0.8 * 0.1 ** (2 / 4) * third
        z = z - 0.8 * 0.1 ** (3 / 4) * (0.7 * third + gradient(z))
    purified = wrapped(made, iterations=iterations, restarts=1, rate=0.8)(x, keyed(IMAGES))
    assert torch.allclose(purified.detach().flatten(1), z @ a.T + 0.5, atol=1e-12)


@pytest.mark.parametrize("iterations", [2, 7])
def test_best_start_of_each_image_is_returned(iterations: int) -> None:
    made, x = exact(), uniform_pixels(IMAGES, SMALL).double()
    each = [reconstruct_by_hand(made.generator, x, 8, r, iterations, 30.0) for r in range(4)]
    errors = torch.stack([(one - x).square().flatten(1).mean(1) for one in each])
    best = errors.argmin(0)
    assert len(best.unique()) > 1
    expected = torch.stack([each[r][i] for i, r in enumerate(best.tolist())]).detach()
    purifier = wrapped(made, iterations=iterations, restarts=4)
    assert torch.allclose(purifier(x, keyed(IMAGES)), expected, atol=1e-12)
    assert torch.allclose(
        purifier.detector_score(x, keyed(IMAGES)), errors.amin(0).detach(), atol=1e-12
    )


def test_more_iterations_reduce_the_error_of_a_generated_image() -> None:
    made = exact()
    x = made.generator(keyed(IMAGES).normal((8,), "image").double() / 8**0.5)
    errors = [
        wrapped(made, iterations=i).detector_score(x, keyed(IMAGES)).mean() for i in (2, 10, 100)
    ]
    assert errors[0] > 1.5 * errors[1] > 3 * errors[2]


# The gradient


def found_and_expected(purifier: Purifier) -> tuple[Tensor, Tensor]:
    """Return directional derivatives of the purified images, one per image (N,).

    The first is from the graph, the second from central differences under the same noise.
    """
    x = uniform_pixels(IMAGES, SMALL).double().requires_grad_()
    generator = torch.Generator().manual_seed(5)
    direction, probe = (torch.randn(x.shape, generator=generator, dtype=x.dtype) for _ in range(2))
    reached = (probe * purifier(x, keyed(IMAGES))).sum() + 0 * x.sum()
    (gradient,) = torch.autograd.grad(reached, x)
    with torch.no_grad():
        ahead, behind = (purifier(x + h * direction, keyed(IMAGES)) for h in (1e-6, -1e-6))
    expected = (probe * (ahead - behind)).flatten(1).sum(1) / 2e-6
    return (gradient * direction).flatten(1).sum(1), expected


@pytest.mark.parametrize("changes", [{}, {"iterations": 2}, {"iterations": 20, "restarts": 1}])
def test_gradient_matches_central_differences(changes: dict[str, Any]) -> None:
    found, expected = found_and_expected(wrapped(exact(), **changes))
    assert expected.abs().min() > 1e-5, "nothing to compare"
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-7)


def test_checkpointed_gradient_equals_that_of_the_whole_graph() -> None:
    made = exact()
    x = uniform_pixels(IMAGES, SMALL).double().requires_grad_()
    probe = torch.randn(x.shape, generator=torch.Generator().manual_seed(6), dtype=x.dtype)
    purified = wrapped(made, restarts=1)(x, keyed(IMAGES))
    (found,) = torch.autograd.grad((probe * purified).sum(), x)
    plain = reconstruct_by_hand(made.generator, x, 8, 0, 6, 30.0)
    (expected,) = torch.autograd.grad((probe * plain).sum(), x)
    assert torch.allclose(purified, plain, atol=1e-12)
    assert expected.flatten(1).abs().amax(1).min() > 1e-6
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("fault", ["image", "code", "gradient"])
def test_central_differences_reveal_a_detached_part(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, gradient_at = gan.mean_squared_error, gan.gradient_at
    if fault == "image":
        monkeypatch.setattr(
            gan, "mean_squared_error", lambda one, other: error(one, other.detach())
        )
    elif fault == "code":  # the second derivative of the error is lost
        monkeypatch.setattr(gan, "gradient_at", lambda loss, at: gradient_at(loss, at.detach()))
    else:
        monkeypatch.setattr(gan, "gradient_at", lambda loss, at: gradient_at(loss, at).detach())
    found, expected = found_and_expected(wrapped(exact()))
    assert (found - expected).norm() > 0.3 * expected.norm()


def test_graph_is_built_only_where_a_gradient_is_needed() -> None:
    purifier, x = wrapped(exact()), uniform_pixels(IMAGES, SMALL).double()
    assert not purifier(x, keyed(IMAGES)).requires_grad
    with torch.no_grad():
        off = purifier(x.clone().requires_grad_(), keyed(IMAGES))
    assert not off.requires_grad and torch.equal(off, purifier(x, keyed(IMAGES)))
    assert torch.allclose(off, purifier(x.requires_grad_(), keyed(IMAGES)), atol=1e-12)


# The contract


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_has_shape_dtype_and_range_of_images(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    purifier, x = (
        wrapped(pair(shape).requires_grad_(False)).to(dtype),
        uniform_pixels(IMAGES, shape).to(dtype),
    )
    purified = purifier(x, keyed(IMAGES))
    assert purified.shape == x.shape and purified.dtype == dtype
    assert purified.isfinite().all() and purified.min() >= 0 and purified.max() <= 1


@pytest.mark.parametrize("score", [False, True])
def test_image_does_not_depend_on_its_batch(score: bool) -> None:
    purifier, x, draws = (
        wrapped(pair().requires_grad_(False)),
        uniform_pixels(IMAGES, SMALL),
        keyed(IMAGES),
    )
    call = purifier.detector_score if score else purifier
    whole = call(x, draws)
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(3))
    assert torch.equal(call(x[order], draws[order]), whole[order])
    others_changed = x.clone()
    others_changed[1:] = 1 - others_changed[1:]
    assert torch.equal(call(others_changed, draws)[0], whole[0])
    for rows in (order[:1], order[:5], order[5:]):
        assert torch.allclose(call(x[rows], draws[rows]), whole[rows], rtol=0, atol=1e-5)


def test_noise_is_keyed_by_draws_only() -> None:
    purifier, x = wrapped(exact()), uniform_pixels(IMAGES, SMALL).double()
    stream = torch.get_rng_state()
    one = purifier(x, keyed(IMAGES))
    assert torch.equal(one, purifier(x, keyed(IMAGES)))
    assert torch.equal(stream, torch.get_rng_state())
    redrawn = purifier(x, keyed(IMAGES).redraw(1))
    assert (redrawn != one).flatten(1).any(1).all()
    assert purifier.stochastic and purifier.differentiable
    assert not torch.equal(purifier(x), purifier(x))


@pytest.mark.parametrize(("iterations", "short"), [(2, 2), (19, 2), (40, 4)])
def test_short_stand_in_takes_a_tenth_of_the_iterations_from_the_first_start(
    iterations: int, short: int
) -> None:
    made, x = exact(), uniform_pixels(IMAGES, SMALL).double().requires_grad_()
    purifier = wrapped(made, iterations=iterations)
    assert purifier.stand_ins == ("short",)
    stood = purifier.stand_in("short", x, keyed(IMAGES))
    assert torch.equal(stood, wrapped(made, iterations=short, restarts=1)(x, keyed(IMAGES)))
    (gradient,) = torch.autograd.grad(stood.sum(), x)
    assert gradient.flatten(1).ne(0).any(1).all()


def test_other_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="needs a gan, which this model is not"):
        wrapped(nn.Linear(3, 3))


@pytest.mark.parametrize(
    "change", [{"iterations": 1}, {"restarts": 0}, {"rate": 0.0}, {"momentum": 0.7}]
)
def test_impossible_settings_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        wrapped(pair(), **change)
