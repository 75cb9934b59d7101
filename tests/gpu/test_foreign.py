"""Networks from elsewhere on a GPU: keyed noise, and the streams of both devices left alone."""

import pytest
import torch
from synthetic import SHAPE, images
from torch import Tensor, nn
from torch.nn import functional as F

from components.data.draws import NoiseStream
from components.models.foreign import adopt_classifier, adopt_purifier

pytestmark = pytest.mark.gpu


class Dropping(nn.Module):
    """Random logits, of draws on the GPU and of draws on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        drawn = torch.randn(len(x), 4).to(x.device)
        return F.dropout(x.flatten(1)[:, :4], 0.5, training=True) + drawn


class Noised(nn.Module):
    """Pixels under noise, clipped."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 0.1 * torch.randn_like(x)).clamp(0, 1)


def test_noise_is_keyed_and_the_streams_are_left_alone(gpu: torch.device) -> None:
    x = images(16, SHAPE, seed=4).pixels()
    device = str(gpu)

    def states() -> list[Tensor]:
        cuda = [torch.cuda.get_rng_state(gpu)] if gpu.type == "cuda" else []
        return [torch.get_rng_state(), *cuda]

    before = states()
    classifier, purifier = (
        adopt_classifier(Dropping(), x, 4, device),
        adopt_purifier(Noised(), x, device),
    )
    x, keys = x.to(gpu), NoiseStream(torch.arange(len(x), device=gpu))
    for answer in (classifier, purifier):
        assert answer.stochastic
        first = answer(x, keys)
        assert first.device.type == gpu.type and torch.equal(answer(x, keys), first)
        assert not torch.equal(answer(x, None), first)
    assert all(map(torch.equal, states(), before))
    assert purifier.differentiable
