"""StAdv samples pixels along a bounded flow, and fools classifiers with it."""

from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F
from toy_networks import Noisy, Precise
from toys import LINF, head, uniform_pixels

from components.attacks import L2, craft
from components.attacks import stadv as module
from components.attacks.stadv import StAdv, displace, roughness
from components.data.draws import Draws
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.defense import Defense, bind

ATTACK = StAdv(kind="stadv", bound=0.3, steps=15, step=0.2, smoothness=0.01, eot=2)


class Left(nn.Module):
    """Predicts class 0 if the left half of an image (N,1,H,W) is the brighter one."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.mean((1, 2)).chunk(2, 1)
        return torch.stack([left.sum(1), right.sum(1)], 1)


def stripe(column: int) -> ImageSet:
    """Return one 8 x 8 image, black with one white column."""
    images = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    images[..., column] = 255
    return ImageSet(images, torch.zeros(1).long(), torch.arange(1), ("left", "right"))


def within_reach(images: Tensor, clean: Tensor, bound: float) -> Tensor:
    """Return (N,) whether every pixel lies between the least and largest value within `bound`."""
    pads = [int(bound * size / 2 + 0.999999) for size in (clean.shape[3], clean.shape[2])]
    padded = F.pad(clean, (pads[0], pads[0], pads[1], pads[1]), mode="replicate")
    windows = padded.unfold(2, 2 * pads[1] + 1, 1).unfold(3, 2 * pads[0] + 1, 1).flatten(4)
    inside = (images >= windows.amin(4) - 1e-5) & (images <= windows.amax(4) + 1e-5)
    return inside.flatten(1).all(1)


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (2, 1, 5, 9), (1, 1, 28, 28), (1, 2, 1, 4)])
def test_zero_flow_changes_nothing(shape: tuple[int, int, int, int]) -> None:
    images = uniform_pixels(shape[0], shape[1:])
    zero = torch.zeros(shape[0], *shape[2:], 2)
    assert torch.allclose(displace(images, zero), images, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("columns", "rows"), [(1, 0), (0, 1), (-2, 0), (0, -1), (1, -1), (0.5, 0)])
def test_a_flow_moves_the_image_by_its_columns_and_rows(columns: float, rows: float) -> None:
    """In coordinates from -1 to 1 a column is 2 / W and a row 2 / H; edges are replicated."""
    images = uniform_pixels(2, (3, 6, 10))
    flow = torch.tensor([columns * 2 / 10, rows * 2 / 6]).expand(2, 6, 10, 2)
    x = torch.arange(10) + columns
    y = (torch.arange(6) + rows).clamp(0, 5).long()
    low, high = x.floor().clamp(0, 9).long(), x.ceil().clamp(0, 9).long()
    expected = (images[:, :, y][..., low] + images[:, :, y][..., high]) / 2
    assert torch.allclose(displace(images, flow), expected, atol=1e-5)


def test_every_pixel_has_its_own_flow() -> None:
    images = uniform_pixels(1, (1, 4, 4))
    flow = torch.zeros(1, 4, 4, 2)
    flow[0, 1, 2] = torch.tensor([2 / 4, -2 / 4])
    moved = displace(images, flow)
    assert moved[0, 0, 1, 2].item() == pytest.approx(images[0, 0, 0, 3].item(), abs=1e-6)
    rest = torch.ones(4, 4).bool()
    rest[1, 2] = False
    assert torch.allclose(moved[0, 0][rest], images[0, 0][rest], atol=1e-6)


def test_roughness_is_the_flow_loss_of_the_paper() -> None:
    """The length of the difference of flows, summed over all pixels and their four neighbours."""
    flow = torch.zeros(2, 3, 3, 2)
    flow[0, 1, 1] = torch.tensor([3.0, 4.0])
    flow[0, 0, 0] = torch.tensor([-2.0, 0.0])
    assert roughness(flow).tolist() == pytest.approx([2 * (4 * 5 + 2 * 2), 0], abs=1e-4)
    assert roughness(flow + 7).tolist() == pytest.approx(roughness(flow).tolist(), abs=1e-4)
    start = torch.zeros(1, 3, 3, 2, requires_grad=True)
    (slope,) = torch.autograd.grad(roughness(start).sum(), start)
    assert not slope.any(), "the gradient of a constant flow is not zero"


def test_stadv_fools_an_undefended_classifier(classifier: Classifier, test_set: ImageSet) -> None:
    data, defense = head(test_set, 100), Defense(classifier, None).freeze()
    crafted = craft(ATTACK, defense, "full", data, LINF, 0, 100)
    assert crafted.success.float().mean() > 0.7
    assert within_reach(crafted.images, data.pixels(), ATTACK.bound).all()
    assert crafted.images.min() >= 0 and crafted.images.max() <= 1
    delta = (crafted.images - data.pixels()).abs().amax((1, 2, 3))
    assert (delta[crafted.success] > LINF.eps).any(), "all changes stay in the L-inf ball"
    spent = ATTACK.steps
    assert (crafted.backward[~crafted.success] == spent).all() and ATTACK.effort(
        10, False
    ).backward == spent
    assert crafted.iterations[crafted.success].float().mean() < 0.8 * spent
    stochastic = craft(
        ATTACK, Defense(classifier, Noisy(0.05)).freeze(), "bpda", data, LINF, 0, 100
    )
    assert stochastic.success.float().mean() > 0.6
    assert (stochastic.iterations == spent).all() and (stochastic.backward == 2 * spent).all()


def test_the_bound_limits_how_far_pixels_move() -> None:
    """A white column 3 of 8 lies mostly in the right half once it moves half a pixel, 1 / 8."""
    for bound, success in ((0.12, False), (0.14, True)):
        # Between black pixels the margin has no gradient: only smoothness moves those pixels.
        attack = ATTACK.model_copy(update={"bound": bound, "steps": 60})
        crafted = craft(attack, Defense(Left(), None).freeze(), "full", stripe(3), LINF, 0, 1)
        white = crafted.images[0, 0]
        assert bool(crafted.success) == success
        assert within_reach(crafted.images, stripe(3).pixels(), bound).all()
        assert not white[:, :2].any() and not white[:, 5:].any(), (
            "the column moved further than the bound"
        )
    far = ATTACK.model_copy(update={"bound": 0.4, "steps": 60})
    crafted = craft(far, Defense(Left(), None).freeze(), "full", stripe(0), LINF, 0, 1)
    assert not crafted.success.any()


def test_no_flow_leaves_the_bound(
    classifier: Classifier, test_set: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every evaluated image was sampled with a flow inside the bound, on both axes."""
    flows: list[Tensor] = []

    def recording(images: Tensor, flow: Tensor) -> Tensor:
        flows.append(flow.detach().clone())
        return displace(images, flow)

    monkeypatch.setattr(module, "displace", recording)
    attack = ATTACK.model_copy(update={"step": 0.7, "bound": 0.11})
    noisy = Defense(classifier, Noisy(0.05)).freeze()  # no row stops early
    craft(attack, noisy, "full", head(test_set, 60), LINF, 0, 60)
    assert len(flows) == attack.steps + 1
    assert max(flow.abs().max().item() for flow in flows) == pytest.approx(0.11, abs=1e-7)
    assert all(flow.abs().amax((1, 2)).min() > 0.07 for flow in flows)
    large = ATTACK.model_copy(update={"step": 50.0, "steps": 1})
    craft(large, noisy, "full", head(test_set, 60), LINF, 0, 60)
    assert flows[-2].abs().max().item() == pytest.approx(0.3), "the random step is clipped too"


def test_smoothness_lowers_the_roughness(
    classifier: Classifier, test_set: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    last: dict[float, Tensor] = {}
    for smoothness in (0.0, 1.0):

        def recording(images: Tensor, flow: Tensor, key: float = smoothness) -> Tensor:
            last[key] = flow.detach()
            return displace(images, flow)

        monkeypatch.setattr(module, "displace", recording)
        attack = ATTACK.model_copy(update={"smoothness": smoothness, "step": 0.05})
        noisy = Defense(classifier, Noisy(0.05)).freeze()  # no row stops early
        craft(attack, noisy, "full", head(test_set, 60), LINF, 0, 60)
    assert roughness(last[1.0]).mean() < 0.6 * roughness(last[0.0]).mean()


def test_a_wider_bound_and_more_steps_fool_no_fewer(
    classifier: Classifier, test_set: ImageSet
) -> None:
    data, defense = head(test_set, 80), Defense(classifier, None).freeze()
    for key, values in (("bound", (0.02, 0.05, 0.1)), ("steps", (1, 3, 15))):
        counts = []
        for value in values:
            attack = ATTACK.model_copy(update={"bound": 0.08, key: value})
            counts.append(craft(attack, defense, "full", data, LINF, 0, 80).success.sum().item())
        assert all(more > less for less, more in pairwise(counts)), (key, counts)


@pytest.mark.parametrize("stochastic", [False, True], ids=["deterministic", "stochastic"])
def test_neither_order_nor_batch_size_changes_an_image(
    stochastic: bool, classifier: Classifier, test_set: ImageSet
) -> None:
    """In float64, where the rounding of other batch sizes does not show."""
    defense = Defense(Precise(classifier), Noisy(0.05) if stochastic else None).freeze()
    data = head(test_set, 20)
    whole = craft(ATTACK, defense, "full", data, LINF, 0, 20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    for batch in (20, 7, 1):
        shuffled = craft(ATTACK, defense, "full", data[order], LINF, 0, batch)
        assert torch.allclose(shuffled.images, whole.images[order], rtol=0, atol=1e-5)
        for column in ("success", "iterations", "forward", "backward"):
            assert torch.equal(getattr(shuffled, column), getattr(whole, column)[order]), column


@pytest.mark.parametrize("mode", ["full", "bpda"])
def test_stadv_changes_neither_model_nor_images_nor_random_streams(
    mode: str, classifier: Classifier, test_set: ImageSet
) -> None:
    data, model = head(test_set, 8), deepcopy(classifier).requires_grad_(True)
    draws, stream = Draws(0, "attack", data.ids), torch.get_rng_state()
    target = bind(Defense(model, Noisy(0.05)).eval(), mode, draws, 2)  # type: ignore[arg-type]
    pixels = data.pixels().to(memory_format=torch.channels_last)
    outcome = ATTACK.run(target, pixels, data.labels, LINF, draws)
    assert torch.equal(torch.get_rng_state(), stream) and torch.equal(pixels, data.pixels())
    assert not any(p.grad is not None for p in model.parameters())
    assert not outcome.images.requires_grad


def test_misclassified_images_and_nan_logits_count_as_fooled(
    classifier: Classifier, test_set: ImageSet
) -> None:
    data, defense = head(test_set, 12), Defense(classifier, None).freeze()
    wrong = ImageSet(data.images, (data.labels + 1) % 10, data.ids, data.class_names)
    crafted = craft(ATTACK, defense, "full", wrong, L2(norm="l2", eps_l2=0.1), 0, 12)
    assert crafted.success.all() and torch.equal(crafted.images, wrong.pixels())

    class Nan(Left):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nan * super().forward(x)

    for purifier in (None, Noisy(0.05)):
        nan = Defense(Nan(), purifier).freeze()
        assert craft(ATTACK, nan, "full", stripe(3), LINF, 0, 1).success.all()


@pytest.mark.parametrize(
    "changes", [{"bound": 0.0}, {"bound": 2.5}, {"step": 0.0}, {"steps": 0}, {"smoothness": -1.0}]
)
def test_settings_out_of_range_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        StAdv.model_validate({**ATTACK.model_dump(), **changes})
