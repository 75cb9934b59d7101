"""DiffDefense and DiffPure: references, closed forms, and gradients against differences."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from toys import DDPM, keyed, small_ddpm, uniform_pixels

from components.data.draws import Draws
from components.models.purifiers import descent
from components.models.purifiers.autoencoder import ConvAutoencoder
from components.models.purifiers.contract import Purifier
from components.models.purifiers.descent import State, Step
from components.models.purifiers.diffusion import ddpm, diffdefense
from components.models.purifiers.diffusion.ddpm import (
    Diffusion,
    add_noise,
    ddim_step,
    linear_alpha_bar,
)
from components.models.purifiers.diffusion.diffdefense import (
    DiffDefense,
    DiffDefensePurifier,
    UntrainedDiffusion,
    released_learning_rate,
)
from components.models.purifiers.diffusion.diffpure import DiffPure

SHAPE = (1, 8, 8)
DIFFDEFENSE: dict[str, Any] = {
    "kind": "diffdefense", "mode": "released", "iterations": 4, "restarts": 3, "steps": 3,
    "rate": 25.0,
}  # fmt: skip
DDIM = {"mode": "ddim", "rate": 0.2, "iterations": 3}
ALGORITHM = {"mode": "algorithm_1", "rate": 20.0, "iterations": 3}
DIFFPURE: dict[str, Any] = {"kind": "diffpure", "t_star": 9, "sampler": "ddpm", "substeps": 4}
# The rate is smaller than the code's: finite differences fail on saturated pixels.
SMOOTH = {
    "released": lambda: diffdefense_purifier(rate=0.5),
    "algorithm_1": lambda: diffdefense_purifier(**ALGORITHM),
    "ddim": lambda: diffdefense_purifier(small_ddpm(centred=True), **DDIM),
    "diffpure, ddpm": lambda: diffpure_purifier(),
    "diffpure, ddim": lambda: diffpure_purifier(small_ddpm(centred=True), sampler="ddim"),
}


def zero_network(**changes: Any) -> Diffusion:
    """Return a network that predicts no noise."""
    network = small_ddpm(**changes)
    for parameter in network.last.parameters():
        nn.init.zeros_(parameter)
    return network


def diffdefense_purifier(network: nn.Module | None = None, **changes: Any) -> DiffDefensePurifier:
    config = DiffDefense.model_validate({**DIFFDEFENSE, **changes})
    return config.wrap(network or small_ddpm()).eval()


def diffpure_purifier(network: nn.Module | None = None, **changes: Any) -> Purifier:
    config = DiffPure.model_validate({**DIFFPURE, **changes})
    return config.wrap(network or small_ddpm()).eval()


def test_released_learning_rates_match_the_authors_code() -> None:
    rates = [released_learning_rate(index, 4, 25.0) for index in range(4)]
    assert rates == pytest.approx([0.02, 14.06, 7.91, 4.45], abs=0.005)


def descend_by_hand(x: Tensor, draws: Draws, network: Diffusion, start: int, config: Any) -> Tensor:
    """Compute the released descent from one start by autograd and torch's Adam, U-Net detached."""
    bars = [*linear_alpha_bar(config["steps"], 1e-4, 0.02).tolist()]
    z = draws.normal(SHAPE, f"start {start} start").double().requires_grad_()
    adam = torch.optim.Adam([z], lr=0.02, betas=(0.5, 0.999), eps=0)
    for iteration in range(config["iterations"]):
        image = z
        for index, t in enumerate(reversed(range(config["steps"]))):
            with torch.no_grad():
                eps = network(image, torch.full((len(x),), t))
            use = f"start {start} iteration {iteration} step {index}"
            noise = draws.normal(SHAPE, use).double() if t else None
            image = ddim_step(image, eps, bars[t], bars[t - 1] if t else 1.0, noise)
        made = image.sigmoid()
        adam.zero_grad()
        (made - x).square().flatten(1).mean(1).sum().backward()
        adam.step()
        decay = 0.1 ** ((iteration + 1) / math.ceil(0.8 * config["iterations"]))
        adam.param_groups[0]["lr"] = config["rate"] * decay
    return made.detach()


@pytest.mark.parametrize("changes", [{}, {"iterations": 6, "steps": 1}, {"restarts": 1}])
@pytest.mark.parametrize("network", [small_ddpm(), zero_network()])
def test_released_mode_matches_a_reference_descent(
    changes: dict[str, Any], network: Diffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descent, "EPSILON", 0.0)  # torch has its epsilon outside the root
    x, draws, config = uniform_pixels(5, SHAPE).double(), keyed(5), {**DIFFDEFENSE, **changes}
    starts = range(config["restarts"])
    made = torch.stack([descend_by_hand(x, draws, network, start, config) for start in starts])
    errors = (made - x).square().flatten(2).mean(2)
    best = made[errors.argmin(0), torch.arange(5)]
    purifier = diffdefense_purifier(network, **changes)
    assert torch.allclose(purifier(x, draws), best, atol=1e-7)
    assert torch.allclose(purifier.detector_score(x, draws), errors.mean(0), atol=1e-7)


def test_released_mode_approaches_the_image_without_a_network() -> None:
    """This is why `untrained_diffusion` is a control: the image is fitted, and then binarised."""
    x, draws = uniform_pixels(16, SHAPE).double(), keyed(16)
    purified = diffdefense_purifier(zero_network())(x, draws)
    saturated = ((purified < 0.05) | (purified > 0.95)).double().mean()
    clear = (x - 0.5).abs() > 0.3
    agreed = ((purified > 0.5) == (x > 0.5))[clear].double().mean()
    assert saturated > 0.8 and agreed > 0.85


def test_algorithm_1_has_values_by_hand_where_one_step_leads_to_the_image() -> None:
    """With T* = 1, L = 2 and no predicted noise, the image is z / root(alpha), alpha = 1 - 0.001.

    The only step has rate 32 x 0.1^(1/2), as ceil(1.6) = 2, on the gradient of a mean over 64.
    """
    x, draws = uniform_pixels(4, SHAPE).double(), keyed(4)
    z = draws.normal(SHAPE, "start 0 start").double()
    root = 0.999**0.5
    z = z - 32 * 0.1**0.5 * 2 / 64 * (z / root - x) / root
    changes = {**ALGORITHM, "rate": 32.0, "iterations": 2, "restarts": 1, "steps": 1}
    purified = diffdefense_purifier(zero_network(), **changes)(x, draws)
    assert torch.allclose(purified, (z / root).clamp(0, 1), atol=1e-9)


def test_algorithm_1_matches_the_papers_loop_on_a_linear_denoiser(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The network predicts (t + 1)/40 of z; the loop is Algorithm 1, by autograd."""
    monkeypatch.setattr(Diffusion, "forward", lambda self, z, t: z * (int(t) + 1) / 40)
    x, draws, stages, iterations = uniform_pixels(3, SHAPE).double(), keyed(3), 5, 6
    alpha = 1 - torch.linspace(1e-3, 0.2, 20, dtype=torch.float64)
    made = []
    for start in range(2):
        z, rate = draws.normal(SHAPE, f"start {start} start").double(), 20.0
        for i in range(iterations):
            point = z.requires_grad_()
            image = point
            for step, t in enumerate(range(stages - 1, -1, -1)):
                bar, predicted = alpha[: t + 1].prod(), image * (t + 1) / 40
                image = (image - (1 - alpha[t]) / (1 - bar).sqrt() * predicted) / alpha[t].sqrt()
                if t:
                    noise = draws.normal(SHAPE, f"start {start} iteration {i} step {step}").double()
                    image = image + (1 - alpha[t]).sqrt() * noise
            rate *= 0.1 ** (1 / math.ceil(0.8 * iterations))
            loss = (image - x).square().flatten(1).mean(1).sum()
            z = (point - rate * torch.autograd.grad(loss, point)[0]).detach()
        made.append(image.detach().clamp(0, 1))
    errors = torch.stack([(one - x).square().flatten(1).mean(1) for one in made])
    best = torch.stack(made)[errors.argmin(0), torch.arange(3)]
    changes = {**ALGORITHM, "iterations": iterations, "restarts": 2, "steps": stages}
    purifier = diffdefense_purifier(**changes)
    assert torch.allclose(purifier(x, draws), best, atol=1e-9)
    assert torch.allclose(purifier.detector_score(x, draws), errors.mean(0), atol=1e-9)


def test_ddim_mode_with_zero_network_has_a_closed_form() -> None:
    """The image is then z / sqrt(alpha bar), and Adam's first step is the sign of the gradient."""
    network, x, draws = zero_network(centred=True), uniform_pixels(4, SHAPE).double(), keyed(4)
    root = math.sqrt(float(network.alpha_bar[-1]))
    z = draws.normal(SHAPE, "start 0 start").double()
    image = (z / root + 1) / 2
    z = z - 0.2 * (image - x).sign()
    expected = ((z / root + 1) / 2).clamp(0, 1)
    changes = {**DDIM, "iterations": 1, "restarts": 1}
    assert torch.allclose(diffdefense_purifier(network, **changes)(x, draws), expected, atol=1e-6)


def test_ddim_mode_matches_a_loop_on_a_linear_denoiser(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network predicts (t + 1)/40 of z; levels 19, 12 and 5 of 20, torch's Adam."""
    monkeypatch.setattr(Diffusion, "forward", lambda self, z, t: z * (int(t) + 1) / 40)
    monkeypatch.setattr(descent, "EPSILON", 0.0)  # torch has its epsilon outside the root
    x, draws = uniform_pixels(3, SHAPE).double(), keyed(3)
    bars = (1 - torch.linspace(1e-3, 0.2, 20, dtype=torch.float64)).cumprod(0)
    z = draws.normal(SHAPE, "start 0 start").double().requires_grad_()
    adam = torch.optim.Adam([z], lr=0.2, eps=0)

    def generate() -> Tensor:
        image: Tensor = z
        for t, after in ((19, 12), (12, 5), (5, None)):
            bar, predicted = bars[t], image * (t + 1) / 40
            image = (image - (1 - bar).sqrt() * predicted) / bar.sqrt()
            if after is not None:
                image = bars[after].sqrt() * image + (1 - bars[after]).sqrt() * predicted
        return (image + 1) / 2

    for _ in range(4):
        adam.zero_grad()
        (generate() - x).square().flatten(1).mean(1).sum().backward()
        adam.step()
    changes = {**DDIM, "iterations": 4, "restarts": 1}
    purified = diffdefense_purifier(small_ddpm(centred=True), **changes)(x, draws)
    assert torch.allclose(purified, generate().detach().clamp(0, 1), atol=1e-7)


def test_ddim_mode_approaches_the_image_closer_from_more_starts() -> None:
    x, draws, network = uniform_pixels(6, SHAPE).double(), keyed(6), small_ddpm(centred=True)
    settings: dict[str, Any] = {**DDIM, "iterations": 15}
    errors = [
        diffdefense_purifier(network, **{**settings, "restarts": restarts})(x, draws) - x
        for restarts in (1, 4)
    ]
    one, four = (error.square().flatten(1).mean(1) for error in errors)
    assert (four <= one + 1e-12).all() and (four < one - 1e-3).any()
    first_step = diffdefense_purifier(network, **{**DDIM, "iterations": 1, "restarts": 1})
    assert one.mean() < 0.5 * (first_step(x, draws) - x).square().mean()


def test_diffpure_with_zero_network_has_a_closed_form() -> None:
    network, x, draws = zero_network(), uniform_pixels(4, SHAPE).double(), keyed(4)
    bar = float(network.alpha_bar[9])
    z = add_noise(x, draws.normal(SHAPE, "start").double(), bar)
    expected = (z / math.sqrt(bar)).clamp(0, 1)
    assert torch.allclose(diffpure_purifier(network, sampler="ddim")(x, draws), expected, atol=1e-9)
    bars = [float(network.alpha_bar[index]) for index in (9, 6, 4, 1)]
    for index, (here, there) in enumerate(zip(bars, [*bars[1:], 1.0], strict=True)):
        z = z / math.sqrt(here / there)
        if there < 1:
            noise = draws.normal(SHAPE, f"step {index}").double()
            z = z + math.sqrt(1 - here / there) * noise
    assert torch.allclose(diffpure_purifier(network)(x, draws), z.clamp(0, 1), atol=1e-9)


def gradient_error(function: Callable[[Tensor, Draws], Tensor]) -> float:
    """Return the relative error of the gradient of `function` against central differences."""
    x, draws = 0.3 + 0.4 * uniform_pixels(3, SHAPE).double(), keyed(3)
    generator = torch.Generator().manual_seed(2)
    probe = torch.randn(x.shape, generator=generator).double()

    def scalar(at: Tensor) -> Tensor:
        value = function(at, draws)
        return value if value.ndim == 1 else (value * probe).sum((1, 2, 3))

    point = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(scalar(point).sum(), point, allow_unused=True)
    gradient = torch.zeros_like(x) if found is None else found
    worst = 0.0
    for _ in range(4):
        direction = torch.randn(x.shape, generator=generator).double()
        with torch.no_grad():
            measured = (scalar(x + 1e-6 * direction) - scalar(x - 1e-6 * direction)) / 2e-6
        missed = ((gradient * direction).sum((1, 2, 3)) - measured).abs()
        worst = max(worst, float((missed / measured.abs().amax()).amax()))
    return worst


@pytest.mark.parametrize("kind", SMOOTH)
def test_gradient_matches_central_differences(kind: str) -> None:
    purifier = SMOOTH[kind]()
    assert gradient_error(purifier) < 1e-4


@pytest.mark.parametrize("kind", SMOOTH)
def test_gradients_of_stand_in_and_detector_score_match_central_differences(kind: str) -> None:
    purifier = SMOOTH[kind]()
    assert gradient_error(lambda x, draws: purifier.stand_in("short", x, draws)) < 1e-4
    assert gradient_error(purifier.detector_score) < 1e-4


@pytest.mark.parametrize("kind", SMOOTH)
def test_central_differences_reveal_a_detached_network(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault leaves the values as they are, but removes a part of the derivative."""
    if kind in ("algorithm_1", "ddim"):
        gradient_at = diffdefense.gradient_at
        monkeypatch.setattr(
            diffdefense, "gradient_at", lambda loss, at: gradient_at(loss, at).detach()
        )
    else:
        forward = Diffusion.forward
        monkeypatch.setattr(Diffusion, "forward", lambda self, z, t: forward(self, z, t).detach())
    purifier = SMOOTH[kind]()
    assert gradient_error(purifier) > 1e-2


def descend_with_graph(step: Step, count: int, constants: State, state: State) -> State:
    """Descend without checkpoints."""
    for index in range(count):
        state = step(index, constants, state)
    return state


@pytest.mark.parametrize("kind", SMOOTH)
def test_checkpointed_gradient_equals_that_of_the_whole_graph(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradient() -> tuple[Tensor, Tensor]:
        point = uniform_pixels(3, SHAPE).double().requires_grad_()
        purified = SMOOTH[kind]()(point, keyed(3))
        (found,) = torch.autograd.grad(purified.square().sum(), point)
        return purified.detach(), found

    value, checkpointed = gradient()
    for module in (ddpm, diffdefense):
        monkeypatch.setattr(module, "descend", descend_with_graph)
    same, whole = gradient()
    assert torch.allclose(value, same, rtol=0, atol=1e-10)
    assert torch.allclose(checkpointed, whole, rtol=1e-7, atol=1e-10)
    assert checkpointed.abs().sum() > 0


@pytest.mark.parametrize("kind", SMOOTH)
def test_image_does_not_depend_on_its_batch_or_on_a_graph(kind: str) -> None:
    purifier, x, draws = SMOOTH[kind](), uniform_pixels(7, SHAPE).double(), keyed(7)
    whole = purifier(x, draws)
    assert not whole.requires_grad and whole.min() >= 0 and whole.max() <= 1
    for rows in (torch.tensor([4]), torch.tensor([6, 0, 3])):
        assert torch.allclose(purifier(x[rows], draws[rows]), whole[rows], rtol=0, atol=1e-9)
    traced = purifier(x.clone().requires_grad_(), draws)
    assert traced.requires_grad and torch.allclose(traced, whole, rtol=0, atol=1e-9)
    assert not torch.allclose(purifier(x, draws.redraw(1)), whole, atol=1e-3)
    scores = purifier.detector_score(x, draws)
    assert scores.shape == (7,)
    assert torch.allclose(purifier.detector_score(x[2:4], draws[2:4]), scores[2:4])


@pytest.mark.parametrize("kind", ["released", "algorithm_1", "ddim", "diffpure"])
def test_order_of_images_changes_no_byte(kind: str) -> None:
    """The paper's width 10 is no multiple of the processor's vector size."""
    shape = (1, 28, 28)
    network = small_ddpm(shape, width=10).float()
    x, draws = uniform_pixels(9, shape), keyed(9)
    order = torch.tensor([3, 1, 4, 0, 5, 8, 2, 6, 7])
    less = {"iterations": 2, "restarts": 2, "steps": 2}
    changes = {"released": {}, "algorithm_1": ALGORITHM, "ddim": DDIM}
    purifier = (
        diffpure_purifier(network)
        if kind == "diffpure"
        else diffdefense_purifier(network, **{**changes[kind], **less})
    )
    assert torch.equal(purifier(x[order], draws[order]), purifier(x, draws)[order])


def test_short_stand_in_is_the_purifier_with_fewer_steps() -> None:
    x, draws = uniform_pixels(5, SHAPE).double(), keyed(5)
    network = small_ddpm(centred=True)
    alone = {**DDIM, "restarts": 1}
    nine, three = (diffdefense_purifier(network, **{**alone, "iterations": k}) for k in (9, 3))
    assert torch.equal(nine.stand_in("short", x, draws), three(x, draws))
    # Of several starts it uses the one that is best in the end, not after a third of the steps.
    several = diffdefense_purifier(network, **{**DDIM, "restarts": 3, "iterations": 9})
    short = several.stand_in("short", x, draws)
    with torch.no_grad():
        ends, thirds = (
            [several.reconstruct(x, draws, torch.full((5,), k), many) for k in range(3)]
            for many in (9, 3)
        )
    errors = torch.stack([(end - x).square().flatten(1).mean(1) for end in ends])
    chosen = torch.stack(thirds)[errors.argmin(0), torch.arange(5)]
    assert torch.allclose(short, chosen, rtol=0, atol=1e-9)
    whole, third = (diffpure_purifier(network, substeps=k, sampler="ddim") for k in (6, 2))
    assert torch.equal(whole.stand_in("short", x, draws), third(x, draws))
    released = diffdefense_purifier(network).stand_in("short", x.requires_grad_(), draws)
    (gradient,) = torch.autograd.grad(released.sum(), x)
    assert gradient.flatten(1).abs().amax(1).min() > 1e-4, "the gradient is masked"


def test_untrained_diffusion_has_weights_of_its_seed_or_zero() -> None:
    def build(weights: str, seed: int) -> Purifier:
        return UntrainedDiffusion.model_validate(
            {"kind": "untrained_diffusion", "network": DDPM, "inference": DIFFDEFENSE,
             "weights": weights, "seed": seed}
        ).build(SHAPE)  # fmt: skip

    stream = torch.get_rng_state()
    one, again, other = build("random", 3), build("random", 3), build("random", 4)
    zero = build("zero", 3)
    assert torch.equal(torch.get_rng_state(), stream), "it drew from the global stream"
    x, draws = uniform_pixels(4, SHAPE), keyed(4)
    assert torch.equal(one(x, draws), again(x, draws))
    assert not torch.equal(one(x, draws), other(x, draws))
    network = zero.get_submodule("network")
    assert not network(x, torch.zeros(4, dtype=torch.int64)).any()


def test_unfit_networks_and_settings_are_refused() -> None:
    other = ConvAutoencoder(
        kind="conv_autoencoder", blocks=2, width=2, strided=[], residual="none"
    ).build(SHAPE)
    with pytest.raises(ValueError, match="diffdefense needs a ddpm"):
        diffdefense_purifier(other)
    with pytest.raises(ValueError, match="diffpure needs a ddpm"):
        diffpure_purifier(other)
    for mode in ("released", "algorithm_1", "ddim"):
        with pytest.raises(ValueError, match="takes 21 steps of a ddpm that was trained on 20"):
            diffdefense_purifier(mode=mode, steps=21)
        diffdefense_purifier(mode=mode, steps=20)
    with pytest.raises(ValueError, match="t_star: 20, but the ddpm was trained on indices 0 to 19"):
        diffpure_purifier(t_star=20)
    with pytest.raises(ValidationError, match="substeps: 11, but from index 9 there are at most"):
        diffpure_purifier(substeps=11)
    for mode in ("released", "algorithm_1"):
        with pytest.raises(ValidationError, match=f"iterations: 1 is no descent in mode {mode}"):
            diffdefense_purifier(mode=mode, iterations=1)
    assert diffdefense_purifier(**{**DDIM, "iterations": 1}).stochastic
