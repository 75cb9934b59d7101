"""Diffusion: schedules, steps back and the network by hand; DiffDefense and DiffPure against
references written anew, and their gradients against differences.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F
from toys import keyed, uniform_pixels

from components.data.draws import Draws
from components.models.purifiers import descent
from components.models.purifiers.autoencoder import ConvAutoencoder
from components.models.purifiers.contract import Purifier
from components.models.purifiers.descent import State, Step
from components.models.purifiers.diffusion import ddpm, diffdefense
from components.models.purifiers.diffusion.ddpm import (
    Ddpm,
    Diffusion,
    ddpm_step,
    ddim_step,
    linear_alpha_bar,
    add_noise,
    respaced_indices,
    respaced_process,
)
from components.models.purifiers.diffusion.diffdefense import (
    DiffDefense,
    UntrainedDiffusion,
    released_learning_rate,
)
from components.models.purifiers.diffusion.diffpure import DiffPure

SHAPE = (1, 8, 8)
DDPM: dict[str, Any] = {
    "kind": "ddpm", "width": 2, "steps": 20, "beta_start": 1e-3, "beta_end": 0.2,
    "centred": False, "norm_input": True,
}  # fmt: skip
DEFENSE: dict[str, Any] = {
    "kind": "diffdefense", "mode": "released", "iterations": 4, "restarts": 3, "steps": 3,
    "rate": 25.0,
}  # fmt: skip
FAITHFUL = {"mode": "faithful", "rate": 0.2, "iterations": 3}
PURE: dict[str, Any] = {"kind": "diffpure", "t_star": 9, "sampler": "ddpm", "substeps": 4}
# Between saturated pixels differences say nothing: a smaller rate than the code's.
SMOOTH = {
    "released": lambda: diff_defense(rate=0.5),
    "faithful": lambda: diff_defense(net(centred=True), **FAITHFUL),
    "ddpm": lambda: pure(),
    "ddim": lambda: pure(net(centred=True), sampler="ddim"),
}


def net(shape: tuple[int, int, int] = SHAPE, **changes: Any) -> Diffusion:
    torch.manual_seed(0)
    network = Ddpm.model_validate({**DDPM, **changes}).build(shape)
    with torch.no_grad():
        network.last.weight.mul_(3)  # an answer that matters
    return network.double().eval().requires_grad_(False)


def silent_network(**changes: Any) -> Diffusion:
    network = net(**changes)
    for parameter in network.last.parameters():
        nn.init.zeros_(parameter)
    return network


def diff_defense(network: nn.Module | None = None, **changes: Any) -> Purifier:
    return DiffDefense.model_validate({**DEFENSE, **changes}).wrap(network or net()).eval()


def pure(network: nn.Module | None = None, **changes: Any) -> Purifier:
    return DiffPure.model_validate({**PURE, **changes}).wrap(network or net()).eval()


def test_schedules_are_products_and_those_of_the_paper() -> None:
    bars = linear_alpha_bar(4, 0.1, 0.4)
    assert bars.dtype == torch.float64
    expected = [0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7, 0.9 * 0.8 * 0.7 * 0.6]
    assert bars.tolist() == pytest.approx(expected, rel=1e-12)
    trained = linear_alpha_bar(100, 1e-5, 0.02)
    assert float(trained[99]) == pytest.approx(0.365, abs=5e-4), "it never becomes pure noise"
    assert float(trained[14]) == pytest.approx(0.979, abs=1e-3)
    assert float(linear_alpha_bar(15, 1e-4, 0.02)[14]) == pytest.approx(0.859, abs=5e-4)


def test_respaced_indices_are_distinct_and_begin_with_the_last() -> None:
    assert respaced_indices(100, 4) == [99, 74, 49, 24]
    assert respaced_indices(7, 7) == [6, 5, 4, 3, 2, 1, 0]
    for count in range(1, 30):
        for steps in range(1, count + 1):
            found = respaced_indices(count, steps)
            assert found[0] == count - 1 and found[-1] >= 0
            assert all(one > two for one, two in pairwise(found))


def test_steps_back_on_numbers() -> None:
    """From alpha bar 0.5 to 0.8: alpha = 0.625, by hand."""
    z, eps, noise = (torch.tensor(v, dtype=torch.float64) for v in (1.0, 0.5, 2.0))
    mean = (1 - 0.375 * 0.5 / math.sqrt(0.5)) / math.sqrt(0.625)
    assert float(ddpm_step(z, eps, 0.5, 0.8, None)) == pytest.approx(mean)
    assert float(ddpm_step(z, eps, 0.5, 0.8, noise)) == pytest.approx(mean + 2 * math.sqrt(0.375))
    start = (1 - math.sqrt(0.5) * 0.5) / math.sqrt(0.5)
    plain = math.sqrt(0.8) * start + math.sqrt(0.2) * 0.5
    assert float(ddim_step(z, eps, 0.5, 0.8, None)) == pytest.approx(plain)
    # s^2 = (0.2 / 0.5) (1 - 0.625) = 0.15
    grained = math.sqrt(0.8) * start + math.sqrt(0.05) * 0.5 + 2 * math.sqrt(0.15)
    assert float(ddim_step(z, eps, 0.5, 0.8, noise)) == pytest.approx(grained)
    # The mean of the posterior of z there, given z here and the start (Ho et al. 2020, eq. 7).
    posterior = math.sqrt(0.8) * 0.375 / 0.5 * start + math.sqrt(0.625) * 0.2 / 0.5 * 1
    assert float(ddim_step(z, eps, 0.5, 0.8, 0 * noise)) == pytest.approx(posterior)


def test_the_last_step_leaves_what_the_image_was_made_of() -> None:
    x, noise = uniform_pixels(3, SHAPE).double(), torch.randn(3, *SHAPE).double()
    z = add_noise(x, noise, 0.3)
    for step in (ddpm_step, ddim_step):
        assert torch.allclose(step(z, noise, 0.3, 1.0, None), x, atol=1e-12)
    assert torch.allclose(ddim_step(z, noise, 0.3, 0.7, None), add_noise(x, noise, 0.7), atol=1e-12)


def test_noising_keeps_the_share_it_says() -> None:
    count, bar = 40_000, 0.3
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(count, generator=generator).double() * s for s in (0.5, 1.0))
    variance = float(add_noise(x, noise, bar).var())
    assert variance == pytest.approx(bar * 0.25 + 1 - bar, rel=0.03)


def variance_at_the_end(move: ddpm.ReverseStep, random: bool, monkeypatch: Any) -> float:
    """Sample with the best predictor there is for images of N(0, 1/4), known in closed form."""
    network = net(steps=200, beta_end=0.05)

    def predicted(self: Diffusion, z: Tensor, t: Tensor) -> Tensor:
        bar = self.alpha_bar[t][:, None, None, None]
        return (1 - bar).sqrt() * z / (bar / 4 + 1 - bar)

    monkeypatch.setattr(Diffusion, "forward", predicted)
    generator = torch.Generator().manual_seed(0)

    def noise(use: str) -> Tensor:
        return torch.randn(600, *SHAPE, generator=generator).double()

    way = respaced_process(network, 200, 200, move)
    return float(way.run(network, noise("start"), noise if random else None, True).var())


@pytest.mark.parametrize(("move", "random"), [(ddpm_step, True), (ddim_step, True), (ddim_step, False)])
def test_samples_have_the_variance_of_the_images(
    move: ddpm.ReverseStep, random: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert variance_at_the_end(move, random, monkeypatch) == pytest.approx(0.25, rel=0.06)


def test_a_step_that_forgot_its_noise_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    for move in (ddpm_step, ddim_step):
        forgetful = _forgetful(move)
        assert abs(variance_at_the_end(forgetful, True, monkeypatch) - 0.25) > 0.05


def _forgetful(move: ddpm.ReverseStep) -> ddpm.ReverseStep:
    return lambda z, eps, bar, before, noise: move(
        z, eps, bar, before, None if noise is None else 0 * noise
    )


def test_the_papers_network_has_the_papers_size_and_cost() -> None:
    network = Ddpm.model_validate({**DDPM, "width": 10}).build((1, 28, 28))
    # With the time table of 1000 x 100 that the paper's code counts in: 0.538 M.
    assert sum(p.numel() for p in network.parameters()) + 100_000 == 537_694
    spent = []

    def count(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        assert isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
        side = args[0] if isinstance(module, nn.ConvTranspose2d) else out
        spent.append(module.weight.numel() * side[0, 0].numel())

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(count)
    assert network(torch.rand(1, 1, 28, 28), torch.tensor([5])).shape == (1, 1, 28, 28)
    assert sum(spent) / 1e6 == pytest.approx(18.3, abs=0.1)


@pytest.mark.parametrize(
    "shape", [(1, 8, 8), (3, 12, 16), (1, 28, 28), (3, 32, 32), (2, 7, 13), (1, 1, 1)]
)
def test_any_shape_will_do(shape: tuple[int, int, int]) -> None:
    network = net(shape)
    x, t = uniform_pixels(5, shape).double(), torch.arange(5)
    whole = network(x, t)
    assert whole.shape == x.shape and whole.isfinite().all()
    assert torch.allclose(network(x[3:4], t[3:4]), whole[3:4], atol=1e-12)
    assert not torch.allclose(network(x, t + 5), whole), "the index does not matter"
    assert torch.allclose(network(x, t[2:3])[2], whole[2], atol=1e-12), "one index for all"


def test_norms_in_channels_last_are_layer_norms() -> None:
    norm = net().downs[1].layers[0]
    torch.nn.init.normal_(norm.norm.weight)
    torch.nn.init.normal_(norm.norm.bias)
    x = torch.randn(4, 2, 4, 4).double()
    weight, bias = (part.permute(2, 0, 1) for part in (norm.norm.weight, norm.norm.bias))
    assert torch.allclose(norm(x), F.layer_norm(x, (2, 4, 4), weight, bias), atol=1e-12)


def test_a_normalised_input_hides_how_noisy_it_is() -> None:
    z, t = torch.randn(2, *SHAPE).double(), torch.tensor([3, 3])
    for norm_input in (True, False):
        network = net(norm_input=norm_input)
        nn.init.ones_(network.entry.weight)
        same = torch.allclose(network(3 * z + 1, t), network(z, t), atol=1e-3)
        assert same == norm_input


def test_the_time_table_is_sines_and_cosines() -> None:
    table = net(steps=1000).time_embedding
    assert table.shape == (1000, 100) and len({tuple(row) for row in table.tolist()}) == 1000
    assert table[0].tolist() == [0.0, 1.0] * 50
    assert float(table[7, 0]) == pytest.approx(math.sin(7), abs=1e-6)
    assert float(table[7, 1]) == pytest.approx(math.cos(7), abs=1e-6)
    assert float(table[7, 21]) == pytest.approx(math.cos(7 / 10_000**0.2), abs=1e-6)


def test_the_network_sees_what_it_is_said_to_see() -> None:
    x = uniform_pixels(2, SHAPE).double()
    for centred in (True, False):
        network = net(centred=centred)
        assert torch.allclose(network.decode(network.encode(x)), x)
        assert torch.equal(network.encode(x), 2 * x - 1 if centred else x)
    assert set(net().state_dict()) == {name for name, _ in net().named_parameters()}


def test_the_released_learning_rates() -> None:
    rates = [released_learning_rate(index, 4, 25.0) for index in range(4)]
    assert rates == pytest.approx([0.02, 14.06, 7.91, 4.45], abs=0.005)


def descend_by_hand(x: Tensor, draws: Draws, network: Diffusion, start: int, config: Any) -> Tensor:
    """The released descent from one start by autograd and torch's Adam, the U-Net detached."""
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
@pytest.mark.parametrize("network", [net(), silent_network()])
def test_the_released_mode_is_the_released_descent(
    changes: dict[str, Any], network: Diffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descent, "EPSILON", 0.0)  # torch has its epsilon outside the root
    x, draws, config = uniform_pixels(5, SHAPE).double(), keyed(5), {**DEFENSE, **changes}
    starts = range(config["restarts"])
    made = torch.stack([descend_by_hand(x, draws, network, start, config) for start in starts])
    errors = (made - x).square().flatten(2).mean(2)
    best = made[errors.argmin(0), torch.arange(5)]
    purifier = diff_defense(network, **changes)
    assert torch.allclose(purifier(x, draws), best, atol=1e-7)
    assert torch.allclose(purifier.detector_score(x, draws), errors.mean(0), atol=1e-7)


def test_the_released_mode_needs_no_network_to_come_near_the_image() -> None:
    """The finding the control is there for: an image without noise is fitted, then binarised."""
    x, draws = uniform_pixels(16, SHAPE).double(), keyed(16)
    purified = diff_defense(silent_network())(x, draws)
    saturated = ((purified < 0.05) | (purified > 0.95)).double().mean()
    clear = (x - 0.5).abs() > 0.3
    agreed = ((purified > 0.5) == (x > 0.5))[clear].double().mean()
    assert saturated > 0.8 and agreed > 0.85


def test_the_faithful_mode_with_a_silent_network_in_closed_form() -> None:
    """Without predicted noise the image is z / sqrt(alpha bar), and a first step is a sign."""
    network, x, draws = silent_network(centred=True), uniform_pixels(4, SHAPE).double(), keyed(4)
    root = math.sqrt(float(network.alpha_bar[-1]))
    z = draws.normal(SHAPE, "start 0 start").double()
    image = (z / root + 1) / 2
    z = z - 0.2 * (image - x).sign()
    expected = ((z / root + 1) / 2).clamp(0, 1)
    changes = {**FAITHFUL, "iterations": 1, "restarts": 1}
    assert torch.allclose(diff_defense(network, **changes)(x, draws), expected, atol=1e-6)


def test_the_faithful_mode_comes_near_the_image_and_nearer_from_more_starts() -> None:
    x, draws, network = uniform_pixels(6, SHAPE).double(), keyed(6), net(centred=True)
    errors = [
        diff_defense(network, **{**FAITHFUL, "iterations": 15, "restarts": restarts})(x, draws) - x
        for restarts in (1, 4)
    ]
    one, four = (error.square().flatten(1).mean(1) for error in errors)
    assert (four <= one + 1e-12).all() and (four < one - 1e-3).any()
    begun = diff_defense(network, **{**FAITHFUL, "iterations": 1, "restarts": 1})(x, draws) - x
    assert one.mean() < 0.5 * begun.square().mean()


def test_going_there_and_back_with_a_silent_network_in_closed_form() -> None:
    network, x, draws = silent_network(), uniform_pixels(4, SHAPE).double(), keyed(4)
    bar = float(network.alpha_bar[9])
    z = add_noise(x, draws.normal(SHAPE, "start").double(), bar)
    expected = (z / math.sqrt(bar)).clamp(0, 1)
    assert torch.allclose(pure(network, sampler="ddim")(x, draws), expected, atol=1e-9)
    bars = [float(network.alpha_bar[index]) for index in (9, 6, 4, 1)]
    for index, (here, there) in enumerate(zip(bars, [*bars[1:], 1.0], strict=True)):
        z = z / math.sqrt(here / there)
        if there < 1:
            noise = draws.normal(SHAPE, f"step {index}").double()
            z = z + math.sqrt(1 - here / there) * noise
    assert torch.allclose(pure(network)(x, draws), z.clamp(0, 1), atol=1e-9)


def disagreement(purifier: Purifier, answer: Callable[[Tensor, Draws], Tensor]) -> float:
    """Return by how much, relatively, the gradient of `answer` misses central differences."""
    x, draws = 0.3 + 0.4 * uniform_pixels(3, SHAPE).double(), keyed(3)
    generator = torch.Generator().manual_seed(2)
    probe = torch.randn(x.shape, generator=generator).double()

    def scalar(at: Tensor) -> Tensor:
        found = answer(at, draws)
        return found if found.ndim == 1 else (found * probe).sum((1, 2, 3))

    point = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(scalar(point).sum(), point, allow_unused=True)
    slope = torch.zeros_like(x) if found is None else found
    worst = 0.0
    for _ in range(4):
        way = torch.randn(x.shape, generator=generator).double()
        with torch.no_grad():
            measured = (scalar(x + 1e-6 * way) - scalar(x - 1e-6 * way)) / 2e-6
        missed = ((slope * way).sum((1, 2, 3)) - measured).abs()
        worst = max(worst, float((missed / measured.abs().amax()).amax()))
    return worst


@pytest.mark.parametrize("kind", SMOOTH)
def test_gradients_are_what_differences_measure(kind: str) -> None:
    purifier = SMOOTH[kind]()
    assert disagreement(purifier, purifier) < 1e-4


@pytest.mark.parametrize("kind", SMOOTH)
def test_so_are_those_of_stand_ins_and_of_the_suspicion(kind: str) -> None:
    purifier = SMOOTH[kind]()
    assert disagreement(purifier, lambda x, draws: purifier.stand_in("short", x, draws)) < 1e-4
    assert disagreement(purifier, purifier.detector_score) < 1e-4


@pytest.mark.parametrize("kind", SMOOTH)
def test_a_network_cut_out_of_the_graph_would_be_noticed(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault: what is computed stays, a part of its derivative goes."""
    if kind == "faithful":
        slope = diffdefense.gradient_at
        monkeypatch.setattr(diffdefense, "gradient_at", lambda loss, at: slope(loss, at).detach())
    else:
        forward = Diffusion.forward
        monkeypatch.setattr(Diffusion, "forward", lambda self, z, t: forward(self, z, t).detach())
    purifier = SMOOTH[kind]()
    assert disagreement(purifier, purifier) > 1e-2


def _whole(step: Step, count: int, constants: State, state: State) -> State:
    """A descent that keeps its graph."""
    for index in range(count):
        state = step(index, constants, state)
    return state


@pytest.mark.parametrize("kind", SMOOTH)
def test_replayed_gradients_are_those_of_the_whole_graph(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradient() -> tuple[Tensor, Tensor]:
        point = uniform_pixels(3, SHAPE).double().requires_grad_()
        purified = SMOOTH[kind]()(point, keyed(3))
        (found,) = torch.autograd.grad(purified.square().sum(), point)
        return purified.detach(), found

    value, replayed = gradient()
    for module in (ddpm, diffdefense):
        monkeypatch.setattr(module, "descend", _whole)
    same, whole = gradient()
    assert torch.allclose(value, same, rtol=0, atol=1e-10)
    assert torch.allclose(replayed, whole, rtol=1e-7, atol=1e-10) and replayed.abs().sum() > 0


@pytest.mark.parametrize("kind", SMOOTH)
def test_each_image_goes_its_own_way_with_and_without_a_graph(kind: str) -> None:
    purifier, x, draws = SMOOTH[kind](), uniform_pixels(7, SHAPE).double(), keyed(7)
    whole = purifier(x, draws)
    assert not whole.requires_grad and whole.min() >= 0 and whole.max() <= 1
    for rows in (torch.tensor([4]), torch.tensor([6, 0, 3])):
        assert torch.allclose(purifier(x[rows], draws[rows]), whole[rows], rtol=0, atol=1e-9)
    traced = purifier(x.clone().requires_grad_(), draws)
    assert traced.requires_grad and torch.allclose(traced, whole, rtol=0, atol=1e-9)
    assert not torch.allclose(purifier(x, draws.redraw(1)), whole, atol=1e-3)
    odd = purifier.detector_score(x, draws)
    assert odd.shape == (7,) and torch.allclose(
        purifier.detector_score(x[2:4], draws[2:4]), odd[2:4]
    )


@pytest.mark.parametrize("kind", ["released", "faithful", "ddpm"])
def test_the_order_of_images_of_the_papers_size_changes_no_byte(kind: str) -> None:
    """Width 10 is what no vector of the processor holds evenly."""
    shape = (1, 28, 28)
    network = net(shape, width=10).float()
    x, draws = uniform_pixels(9, shape), keyed(9)
    order = torch.tensor([3, 1, 4, 0, 5, 8, 2, 6, 7])
    less = {"iterations": 2, "restarts": 2, "steps": 2}
    changes = less if kind == "released" else {**FAITHFUL, **less}
    purifier = pure(network) if kind == "ddpm" else diff_defense(network, **changes)
    assert torch.equal(purifier(x[order], draws[order]), purifier(x, draws)[order])


def test_a_short_stand_in_is_the_purifier_with_less_to_do() -> None:
    x, draws = uniform_pixels(5, SHAPE).double(), keyed(5)
    network = net(centred=True)
    alone = {**FAITHFUL, "restarts": 1}
    nine, three = (diff_defense(network, **{**alone, "iterations": k}) for k in (9, 3))
    assert torch.equal(nine.stand_in("short", x, draws), three(x, draws)), "a third of them"
    # Of several starts it goes on from the one that is best in the end, not after a third.
    several = diff_defense(network, **{**FAITHFUL, "restarts": 3, "iterations": 9})
    short = several.stand_in("short", x, draws)
    with torch.no_grad():
        ends, thirds = (
            [several.reconstruct(x, draws, torch.full((5,), k), many) for k in range(3)]  # type: ignore[operator]
            for many in (9, 3)
        )
    errors = torch.stack([(end - x).square().flatten(1).mean(1) for end in ends])
    chosen = torch.stack(thirds)[errors.argmin(0), torch.arange(5)]
    assert torch.allclose(short, chosen, rtol=0, atol=1e-9)
    whole, third = (pure(network, substeps=k, sampler="ddim") for k in (6, 2))
    assert torch.equal(whole.stand_in("short", x, draws), third(x, draws))
    released = diff_defense(network).stand_in("short", x.requires_grad_(), draws)
    (gradient,) = torch.autograd.grad(released.sum(), x)
    assert gradient.flatten(1).abs().amax(1).min() > 1e-4, "it is masked"


def test_untrained_networks_are_those_of_their_seed_or_silent() -> None:
    def build(weights: str, seed: int) -> Purifier:
        return UntrainedDiffusion.model_validate(
            {"kind": "untrained_diffusion", "network": DDPM, "inference": DEFENSE,
             "weights": weights, "seed": seed}
        ).build(SHAPE)  # fmt: skip

    stream = torch.get_rng_state()
    one, again, other = build("random", 3), build("random", 3), build("random", 4)
    zero = build("zero", 3)
    assert torch.equal(torch.get_rng_state(), stream), "it took from the global stream"
    x, draws = uniform_pixels(4, SHAPE), keyed(4)
    assert torch.equal(one(x, draws), again(x, draws))
    assert not torch.equal(one(x, draws), other(x, draws))
    network = zero.get_submodule("network")
    assert not network(x, torch.zeros(4, dtype=torch.int64)).any()


def test_what_does_not_fit_is_refused_with_a_sentence() -> None:
    other = ConvAutoencoder(
        kind="conv_autoencoder", blocks=2, width=2, strided=[], residual="none"
    ).build(SHAPE)
    with pytest.raises(ValueError, match="diffdefense needs a ddpm"):
        diff_defense(other)
    with pytest.raises(ValueError, match="diffpure needs a ddpm"):
        pure(other)
    for mode in ("released", "faithful"):
        with pytest.raises(ValueError, match="takes 21 steps of a ddpm that was trained on 20"):
            diff_defense(mode=mode, steps=21)
        diff_defense(mode=mode, steps=20)
    with pytest.raises(ValueError, match="t_star: 20, but the ddpm was trained on indices 0 to 19"):
        pure(t_star=20)
    with pytest.raises(ValidationError, match="substeps: 11, but from index 9 there are at most"):
        pure(substeps=11)
    with pytest.raises(ValidationError, match="iterations: 1 is no descent"):
        diff_defense(iterations=1)
    assert diff_defense(**{**FAITHFUL, "iterations": 1}).stochastic
