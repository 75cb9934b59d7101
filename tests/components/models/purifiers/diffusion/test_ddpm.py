"""The diffusion network, its schedule and its samplers, against values computed by hand."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import DDPM, small_ddpm, uniform_pixels

from components.models.purifiers.diffusion.ddpm import (
    Ddpm,
    Diffusion,
    ReverseStep,
    add_noise,
    ddim_step,
    ddpm_step,
    linear_alpha_bar,
    respaced_indices,
    respaced_process,
)

SHAPE = (1, 8, 8)


def test_alpha_bar_is_the_product_of_one_minus_beta() -> None:
    bars = linear_alpha_bar(4, 0.1, 0.4)
    assert bars.dtype == torch.float64
    expected = [0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7, 0.9 * 0.8 * 0.7 * 0.6]
    assert bars.tolist() == pytest.approx(expected, rel=1e-12)
    trained = linear_alpha_bar(100, 1e-5, 0.02)
    assert float(trained[99]) == pytest.approx(0.365, abs=5e-4), "the last level is not pure noise"
    assert float(trained[14]) == pytest.approx(0.979, abs=1e-3)
    assert float(linear_alpha_bar(15, 1e-4, 0.02)[14]) == pytest.approx(0.859, abs=5e-4)


def test_respaced_indices_descend_from_the_last() -> None:
    assert respaced_indices(100, 4) == [99, 74, 49, 24]
    assert respaced_indices(7, 7) == [6, 5, 4, 3, 2, 1, 0]
    for count in range(1, 30):
        for steps in range(1, count + 1):
            found = respaced_indices(count, steps)
            assert found[0] == count - 1 and found[-1] >= 0
            assert all(one > two for one, two in pairwise(found))


def test_reverse_steps_match_values_computed_by_hand() -> None:
    """From alpha bar 0.5 to 0.8: alpha = 0.625, by hand."""
    z, eps, noise = (torch.tensor(v, dtype=torch.float64) for v in (1.0, 0.5, 2.0))
    mean = (1 - 0.375 * 0.5 / math.sqrt(0.5)) / math.sqrt(0.625)
    assert float(ddpm_step(z, eps, 0.5, 0.8, None)) == pytest.approx(mean)
    assert float(ddpm_step(z, eps, 0.5, 0.8, noise)) == pytest.approx(mean + 2 * math.sqrt(0.375))
    start = (1 - math.sqrt(0.5) * 0.5) / math.sqrt(0.5)
    deterministic = math.sqrt(0.8) * start + math.sqrt(0.2) * 0.5
    assert float(ddim_step(z, eps, 0.5, 0.8, None)) == pytest.approx(deterministic)
    # sigma^2 = (0.2 / 0.5) (1 - 0.625) = 0.15
    noisy = math.sqrt(0.8) * start + math.sqrt(0.05) * 0.5 + 2 * math.sqrt(0.15)
    assert float(ddim_step(z, eps, 0.5, 0.8, noise)) == pytest.approx(noisy)
    # The posterior mean of the next z, given this z and the image (Ho et al. 2020, eq. 7).
    posterior = math.sqrt(0.8) * 0.375 / 0.5 * start + math.sqrt(0.625) * 0.2 / 0.5 * 1
    assert float(ddim_step(z, eps, 0.5, 0.8, 0 * noise)) == pytest.approx(posterior)


def test_reverse_steps_with_the_true_noise_undo_add_noise() -> None:
    x, noise = uniform_pixels(3, SHAPE).double(), torch.randn(3, *SHAPE).double()
    z = add_noise(x, noise, 0.3)
    for step in (ddpm_step, ddim_step):
        assert torch.allclose(step(z, noise, 0.3, 1.0, None), x, atol=1e-12)
    assert torch.allclose(ddim_step(z, noise, 0.3, 0.7, None), add_noise(x, noise, 0.7), atol=1e-12)


def test_add_noise_has_the_variance_of_its_level() -> None:
    count, bar = 40_000, 0.3
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(count, generator=generator).double() * s for s in (0.5, 1.0))
    variance = float(add_noise(x, noise, bar).var())
    assert variance == pytest.approx(bar * 0.25 + 1 - bar, rel=0.03)


def sample_variance(step: ReverseStep, random: bool, monkeypatch: Any) -> float:
    """Sample with the optimal predictor for images from N(0, 1/4), which has a closed form."""
    network = small_ddpm(steps=200, beta_end=0.05)

    def predicted(self: Diffusion, z: Tensor, t: Tensor) -> Tensor:
        bar = self.alpha_bar[t][:, None, None, None]
        return (1 - bar).sqrt() * z / (bar / 4 + 1 - bar)

    monkeypatch.setattr(Diffusion, "forward", predicted)
    generator = torch.Generator().manual_seed(0)

    def noise(use: str) -> Tensor:
        return torch.randn(600, *SHAPE, generator=generator).double()

    process = respaced_process(network, 200, 200, step)
    return float(process.run(network, noise("start"), noise if random else None, True).var())


@pytest.mark.parametrize(
    ("step", "random"), [(ddpm_step, True), (ddim_step, True), (ddim_step, False)]
)
def test_samples_have_the_variance_of_the_images(
    step: ReverseStep, random: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sample_variance(step, random, monkeypatch) == pytest.approx(0.25, rel=0.06)


def test_a_step_without_its_noise_changes_that_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (ddpm_step, ddim_step):
        noiseless = without_noise(step)
        assert abs(sample_variance(noiseless, True, monkeypatch) - 0.25) > 0.05


def without_noise(step: ReverseStep) -> ReverseStep:
    return lambda z, predicted, alpha_bar, next_alpha_bar, noise: step(
        z, predicted, alpha_bar, next_alpha_bar, None if noise is None else 0 * noise
    )


def test_network_of_the_paper_has_its_size_and_cost() -> None:
    network = Ddpm.model_validate({**DDPM, "width": 10}).build((1, 28, 28))
    # The paper's 0.538 M include a time embedding of 1000 x 100.
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
def test_network_takes_any_shape_and_uses_the_index(shape: tuple[int, int, int]) -> None:
    network = small_ddpm(shape)
    x, t = uniform_pixels(5, shape).double(), torch.arange(5)
    whole = network(x, t)
    assert whole.shape == x.shape and whole.isfinite().all()
    assert torch.allclose(network(x[3:4], t[3:4]), whole[3:4], atol=1e-12)
    assert not torch.allclose(network(x, t + 5), whole), "the index has no effect"
    assert torch.allclose(network(x, t[2:3])[2], whole[2], atol=1e-12), "one index for all"


def test_channels_last_norm_is_a_layer_norm() -> None:
    norm = small_ddpm().downs[1].layers[0]
    torch.nn.init.normal_(norm.norm.weight)
    torch.nn.init.normal_(norm.norm.bias)
    x = torch.randn(4, 2, 4, 4).double()
    weight, bias = (part.permute(2, 0, 1) for part in (norm.norm.weight, norm.norm.bias))
    assert torch.allclose(norm(x), F.layer_norm(x, (2, 4, 4), weight, bias), atol=1e-12)


def test_normalised_input_hides_the_level_of_noise() -> None:
    z, t = torch.randn(2, *SHAPE).double(), torch.tensor([3, 3])
    for norm_input in (True, False):
        network = small_ddpm(norm_input=norm_input)
        nn.init.ones_(network.entry.weight)
        same = torch.allclose(network(3 * z + 1, t), network(z, t), atol=1e-3)
        assert same == norm_input


def test_time_embedding_has_sines_and_cosines() -> None:
    table = small_ddpm(steps=1000).time_embedding
    assert table.shape == (1000, 100) and len({tuple(row) for row in table.tolist()}) == 1000
    assert table[0].tolist() == [0.0, 1.0] * 50
    assert float(table[7, 0]) == pytest.approx(math.sin(7), abs=1e-6)
    assert float(table[7, 1]) == pytest.approx(math.cos(7), abs=1e-6)
    assert float(table[7, 21]) == pytest.approx(math.cos(7 / 10_000**0.2), abs=1e-6)


def test_encode_and_decode_are_inverse_and_scale_only_if_centred() -> None:
    x = uniform_pixels(2, SHAPE).double()
    for centred in (True, False):
        network = small_ddpm(centred=centred)
        assert torch.allclose(network.decode(network.encode(x)), x)
        assert torch.equal(network.encode(x), 2 * x - 1 if centred else x)
    assert set(small_ddpm().state_dict()) == {name for name, _ in small_ddpm().named_parameters()}
