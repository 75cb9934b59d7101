"""Controls compute their operation; the random network has untrained weights."""

import pytest
import torch
from toys import keyed

from components.data.draws import Draws
from components.models.purifiers.autoencoder import ConvAutoencoder
from components.models.purifiers.controls import (
    BitDepth,
    GaussianNoise,
    Identity,
    Median,
    RandomNetwork,
    Threshold,
)
from components.models.purifiers.jpeg import Jpeg
from limpid.testing.check import grey_levels

SHAPE = (1, 8, 8)
AUTOENCODER = ConvAutoencoder(
    kind="conv_autoencoder", blocks=4, width=6, strided=[2], residual="none"
)


def test_controls_compute_their_operation() -> None:
    x = grey_levels(24, SHAPE)
    assert torch.equal(Identity(kind="identity").build(SHAPE)(x), x)
    assert torch.equal(Threshold(kind="threshold", at=0.5).build(SHAPE)(x), (x > 0.5).float())
    assert torch.allclose(BitDepth(kind="bit_depth", bits=2).build(SHAPE)(x), (x * 3).round() / 3)
    # The images have 8 bits already.
    assert torch.allclose(BitDepth(kind="bit_depth", bits=8).build(SHAPE)(x), x, atol=1e-6)
    median = Median(kind="median", size=3).build(SHAPE)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="replicate")
    window = padded[:, :, 2:5, 4:7].flatten(2).sort(2).values[:, :, 4]
    assert torch.equal(median(x)[:, :, 2, 4], window)
    corner = x[:, 0, [0, 0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 0, 0, 1, 0, 0, 1]]
    assert torch.equal(median(x)[:, 0, 0, 0], corner.median(1).values), "edges are not replicated"
    noisy = GaussianNoise(kind="gaussian_noise", sigma=0.1).build(SHAPE)
    noise = noisy(torch.full_like(x, 0.5), keyed(24)) - 0.5
    assert abs(noise.std() - 0.1) < 0.02


def test_random_network_has_initial_weights_of_its_seed() -> None:
    stream = torch.get_rng_state()
    networks = [
        RandomNetwork(kind="random_network", inner=AUTOENCODER, seed=seed).build((1, 8, 8)).eval()
        for seed in (3, 3, 4)
    ]
    assert torch.equal(torch.get_rng_state(), stream), "it drew from the global stream"
    states = [network.state_dict() for network in networks]
    assert states[0].keys() == AUTOENCODER.build((1, 8, 8)).state_dict().keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    weights = [key for key in states[0] if states[0][key].dim() == 4]
    assert weights and not any(torch.equal(states[0][key], states[2][key]) for key in weights)
    torch.manual_seed(3)
    initial = AUTOENCODER.build((1, 8, 8)).state_dict()
    assert all(torch.equal(states[0][key], initial[key]) for key in initial), "as training starts"
    x = torch.rand(4, 1, 8, 8)
    one, again, other = (network(x) for network in networks)
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_random_network_takes_shapes_that_its_inner_network_takes() -> None:
    config = RandomNetwork(kind="random_network", inner=AUTOENCODER, seed=0)
    for shape in ((1, 8, 8), (3, 32, 32)):
        assert config.build(shape).eval()(torch.rand(2, *shape)).shape == (2, *shape)
    with pytest.raises(ValueError, match="halves 1 times, which 7 x 7 images do not allow"):
        config.build((1, 7, 7))


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize(
    "config",
    [
        Jpeg(kind="jpeg", quality=50),
        RandomNetwork(kind="random_network", inner=AUTOENCODER, seed=0),
    ],
    ids=lambda config: config.kind,
)
def test_jpeg_and_random_network_are_deterministic_and_have_a_gradient(
    config: Jpeg | RandomNetwork, count: int
) -> None:
    purifier = config.build((3, 8, 8)).eval()
    assert not purifier.stochastic
    x = (0.2 + 0.6 * torch.rand(count, 3, 8, 8)).requires_grad_()
    out = purifier(x, Draws(0, "score", torch.arange(count)).stream())
    assert torch.equal(out, purifier(x))
    if purifier.stand_ins:
        out = purifier.stand_in("soft", x, None)
    (gradient,) = torch.autograd.grad((out * torch.rand_like(out)).sum(), x)
    assert gradient.isfinite().all() and gradient.flatten(1).ne(0).any(1).all()
