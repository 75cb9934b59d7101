"""Koo's autoencoder: its size, its skips, its global residual, and the shapes that it refuses."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from components.models.purifiers.autoencoder import ConvAutoencoder
from limpid.testing.check import grey_levels

AUTOENCODER = {
    "kind": "conv_autoencoder", "blocks": 4, "width": 6, "strided": [2], "residual": "none",
}  # fmt: skip


def autoencoder(**changes: Any) -> ConvAutoencoder:
    return ConvAutoencoder.model_validate({**AUTOENCODER, **changes})


def test_network_of_the_paper_has_its_published_size() -> None:
    net = autoencoder(blocks=15, width=64, strided=[1]).build((3, 32, 32))
    parameters = sum(parameter.numel() for parameter in net.parameters())
    assert parameters / 1e6 == pytest.approx(1.041, abs=0.002)
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    deconvolutions = [m for m in net.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert (len(convolutions), len(deconvolutions)) == (15, 15)
    assert net.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("shape", "blocks", "strided"),
    [
        ((1, 28, 28), 15, [1, 3]),
        ((1, 28, 28), 5, [1, 3]),
        ((1, 28, 28), 6, [2, 6]),
        ((3, 32, 32), 15, [1, 8, 15]),
        ((1, 8, 8), 2, [1, 2]),
        ((1, 8, 12), 3, []),
    ],
)
def test_skips_fit_for_any_strides(
    shape: tuple[int, int, int], blocks: int, strided: list[int]
) -> None:
    net = autoencoder(blocks=blocks, strided=strided).build(shape).eval()
    assert net(torch.rand(2, *shape)).shape == (2, *shape)


@pytest.mark.parametrize(("blocks", "skips"), [(15, 7), (6, 2), (5, 2), (4, 1), (2, 0)])
def test_every_second_decoder_block_receives_a_skip(blocks: int, skips: int) -> None:
    """With the output of a decoder block set to zero, the next block still sees a skip, if any."""
    net = autoencoder(blocks=blocks, strided=[]).build((1, 8, 8)).eval()
    decoder = [*net.get_submodule("decoder").children(), net.get_submodule("last")]
    x, found = torch.rand(1, 1, 8, 8), 0
    for zeroed, following in pairwise(decoder):
        seen: list[Tensor] = []
        hooks = [
            zeroed.register_forward_hook(lambda module, args, out: torch.zeros_like(out)),
            following.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0])),
        ]
        net(x)
        net(1 - x)
        found += not torch.equal(seen[0], seen[1])
        for hook in hooks:
            hook.remove()
    assert found == skips


def test_global_residual_returns_the_image_if_the_last_layer_is_zero() -> None:
    net = autoencoder(residual="global").build((1, 8, 8)).eval()
    last = net.get_submodule("last")
    for parameter in last.parameters():
        nn.init.zeros_(parameter)
    x = grey_levels(24, (1, 8, 8))
    assert torch.allclose(net(x), x, atol=1e-6)


def test_shapes_that_cannot_be_halved_are_refused() -> None:
    with pytest.raises(ValueError, match="halves 2 times, which 10 x 8 images do not allow"):
        autoencoder(strided=[1, 2]).build((1, 10, 8))


def test_strided_blocks_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"strided \[5\] must name blocks 1\.\.4"):
        autoencoder(strided=[5])
