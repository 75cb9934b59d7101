"""A GPU draws, attacks and computes what a CPU does."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from synthetic import SHAPE, THREAT, images, pgd
from torch import Tensor, nn
from torch.nn import functional as F

from components.attacks import Attack, Crafted, Linf, craft
from components.attacks.apgd import ApgdCe
from components.attacks.autoattack import AutoAttack
from components.data.draws import Draws
from components.data.image_set import ImageSet
from components.models.accuracy import count_correct
from components.models.defense import Defense
from components.models.precision import float32_products, full_precision
from components.models.purifiers.apudae import Apudae
from components.models.purifiers.denoiser import Denoiser

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")
# Margins below this are on the knife edge: rounding decides them.
EDGE = 1e-3
ATTACKS: dict[str, Attack] = {
    "pgd": pgd(),
    "apgd_ce": ApgdCe(kind="apgd_ce", steps=50, restarts=1, eot=1),
    "autoattack": AutoAttack(kind="autoattack", version="standard"),
}

APUDAE = Apudae(
    kind="apudae", steps=15, rate=0.03, optimiser="adam", target="minimum", scaled=False,
    noise_255=0.0, transform=None,
)  # fmt: skip


def draws_on(device: torch.device) -> Draws:
    return Draws(7, "attack", (torch.arange(64) * 11 + 5).to(device), 3)


def ulps(one: Tensor, other: Tensor) -> int:
    """Return the largest number of float32 values between two tensors."""
    bits = [x.cpu().view(torch.int32).long() for x in (one, other)]
    ordered = [torch.where(x < 0, -(x & 0x7FFFFFFF), x) for x in bits]
    return int((ordered[0] - ordered[1]).abs().max())


def test_uniform_draws_and_permutations_are_equal_to_the_bit(gpu: torch.device) -> None:
    here, there = draws_on(CPU), draws_on(gpu)
    for shape in ((), (3, 32, 32)):
        for one, other in ((here, there), (here.stream("salt"), there.stream("salt"))):
            drawn = other.uniform(shape, "use")
            assert drawn.device.type == gpu.type
            assert torch.equal(one.uniform(shape, "use"), drawn.cpu())
    assert torch.equal(here.permutation(500, "use"), there.permutation(500, "use").cpu())


def test_normal_draws_are_equal_to_the_last_bit_of_float32(
    gpu: torch.device, record_property: Any
) -> None:
    one, other = (draws_on(device).normal((3, 64, 64), "use") for device in (CPU, gpu))
    largest = ulps(one, other)
    record_property("normal draws: largest difference in the last bit", largest)
    record_property("normal draws: part that differs", float((one != other.cpu()).float().mean()))
    assert largest <= 1


@pytest.mark.parametrize("name", ATTACKS)
def test_flags_are_those_of_the_cpu_off_the_knife_edge(
    name: str, network: nn.Module, count: int, gpu: torch.device, record_property: Any
) -> None:
    data, real = images(count, SHAPE, seed=2), gpu.type == "cuda"
    # In a rehearsal all images fall to the first gradients, which takes seconds.
    threat = THREAT if real else Linf(norm="linf", eps_255=64.0)
    found = []
    for device in (CPU, gpu):
        defense = Defense(deepcopy(network).to(device), None).freeze()
        found.append(craft(ATTACKS[name], defense, "full", data, threat, 0, 250))
    edge = torch.stack([on_edge(network, one) for one in found]).any(0)
    record_property(f"{name}: fooled on the CPU", int(found[0].success.sum()))
    record_property(f"{name}: fooled on the GPU", int(found[1].success.sum()))
    record_property(f"{name}: images on the knife edge", int(edge.sum()))
    here, there = (one.success.cpu()[~edge] for one in found)
    assert torch.equal(here, there)
    assert int(edge.sum()) <= 1 + count // 20
    assert not real or 0 < int(here.sum()) < len(here)


def on_edge(network: nn.Module, crafted: Crafted) -> Tensor:
    """Say of which images (N,) the margin, in float64, is close to 0."""
    exact, labels = deepcopy(network).double(), crafted.labels.cpu()
    with torch.no_grad():
        logits = exact(crafted.images.cpu().double())
    true = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return (true - others).abs() < EDGE


def test_counts_are_those_of_the_cpu(network: nn.Module, gpu: torch.device) -> None:
    data = images(200, SHAPE, seed=3)
    with torch.no_grad():
        logits = network(data.pixels())
    top = logits.topk(2).values
    clear = data[(top[:, 0] - top[:, 1]).abs() > EDGE]
    counts = [
        count_correct(
            Defense(deepcopy(network).to(device), None).freeze(), clear.pixels(), clear.labels,
            clear.ids, 0, "score", 2, 64,
        )
        for device in (CPU, gpu)
    ]  # fmt: skip
    assert (counts[0] == counts[1]).all() and 0 < counts[0].sum() < 2 * len(clear)


def test_a_descent_by_adam_gives_equal_bits_twice(gpu: torch.device, record_property: Any) -> None:
    """Rounding grows in a descent: on an H200 two calls differed by 3e-4 of their length."""
    torch.manual_seed(0)
    network = Denoiser(kind="denoiser", width=64).build((1, 28, 28))
    purifier = APUDAE.wrap(network).to(gpu).eval()
    answers = []
    with full_precision():
        for _ in range(3):
            pixels = torch.rand(64, 1, 28, 28, generator=seeded(4)).to(gpu).requires_grad_()
            answer = purifier(pixels)
            (gradient,) = torch.autograd.grad(answer.square().sum(), pixels)
            answers.append(torch.stack((answer.detach(), gradient)).cpu())
    first, *others = answers
    differences = [float((one - first).norm() / first.norm()) for one in others]
    record_property("descent by Adam: difference of two calls", max(differences))
    assert all(torch.equal(one, first) for one in others)


# Products


def matrices(device: torch.device) -> Tensor:
    """Return the error of a product of matrices, as a part of its length."""
    one, other = (torch.randn(512, 512, generator=seeded(k)).to(device) for k in (0, 1))
    return error(one @ other, one.double() @ other.double())


def convolution(device: torch.device) -> Tensor:
    """Return the error of a convolution, as a part of its length."""
    x = torch.randn(8, 64, 16, 16, generator=seeded(2)).to(device)
    weight = torch.randn(64, 64, 3, 3, generator=seeded(3)).to(device)
    return error(F.conv2d(x, weight, padding=1), F.conv2d(x.double(), weight.double(), padding=1))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def error(found: Tensor, exact: Tensor) -> Tensor:
    return (found.double() - exact).norm() / exact.norm()


@pytest.mark.parametrize("product", [matrices, convolution])
def test_products_are_in_full_float32_whatever_is_on(
    product: Any, gpu: torch.device, record_property: Any
) -> None:
    """TF32 keeps 10 bits of a factor, so its error is about 3e-4; that of float32 is below 1e-5."""
    with float32_products(tf32=True):
        rounded = float(product(gpu))
        with full_precision():
            full = float(product(gpu))
    record_property(f"{product.__name__}: error in float32", full)
    record_property(f"{product.__name__}: error in TF32", rounded)
    assert full < 5e-5
    if gpu.type == "cuda" and torch.cuda.get_device_capability(gpu) >= (8, 0):
        assert rounded > 5e-5, "TF32 was not on where a training asks for it"


def test_the_pixels_of_a_set_are_those_of_the_cpu(gpu: torch.device) -> None:
    """By a plain number, a GPU divides to other bits."""
    every = torch.arange(256, dtype=torch.uint8).view(16, 1, 4, 4)
    data = ImageSet(every, torch.zeros(16).long(), torch.arange(16), ("a",))
    white = torch.tensor(255.0).to(gpu)
    assert torch.equal((data.images.to(gpu).float() / white).cpu(), data.pixels())
