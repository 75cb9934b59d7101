"""Every purifier keeps the contract: images in, images out, each on its own, facts as declared."""

import inspect
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from toys import keyed

from components.data.draws import Draws
from components.models.purifiers import ControlConfig, InferenceConfig, Purifier, PurifierConfig
from components.models.purifiers.transforms import Rt1, Rt2

AUTOENCODER = {
    "kind": "conv_autoencoder", "blocks": 4, "width": 6, "strided": [2], "residual": "none",
}  # fmt: skip
RT1 = {"kind": "rt1", "patch": 2, "missing": 0.25}
RT2 = {**RT1, "kind": "rt2", "sigma": 0.1}
DENOISER = {"kind": "denoiser", "width": 4}
APUDAE = {
    "kind": "apudae", "steps": 3, "rate": 0.02, "optimiser": "sgd", "target": "minimum",
    "scaled": False, "noise_255": 0.0, "transform": None,
}  # fmt: skip
DDPM = {
    "kind": "ddpm", "width": 2, "steps": 10, "beta_start": 0.0001, "beta_end": 0.2,
    "centred": False, "norm_input": True,
}  # fmt: skip
DIFFDEFENSE = {
    "kind": "diffdefense", "mode": "released", "iterations": 2, "restarts": 2, "steps": 3,
    "rate": 25.0,
}  # fmt: skip
GAN = {"kind": "gan", "latent": 16, "width": 4}
SAMPLES: dict[str, dict[str, Any]] = {
    "conv_autoencoder": AUTOENCODER,
    "random_transform": {"kind": "random_transform", "transform": RT2, "inner": AUTOENCODER},
    "identity": {"kind": "identity"},
    "gaussian_noise": {"kind": "gaussian_noise", "sigma": 0.1},
    "bit_depth": {"kind": "bit_depth", "bits": 2},
    "median": {"kind": "median", "size": 3},
    "threshold": {"kind": "threshold", "at": 0.5},
    "jpeg": {"kind": "jpeg", "quality": 50},
    "random_network": {"kind": "random_network", "inner": AUTOENCODER, "seed": 0},
    "denoiser": DENOISER,
    "red_net": {"kind": "red_net", "blocks": 4, "width": 4},
    "magnet": {"kind": "magnet", "width": 3},
    "untrained_diffusion": {
        "kind": "untrained_diffusion",
        "network": DDPM,
        "inference": DIFFDEFENSE,
        "weights": "random",
        "seed": 0,
    },
}
# Networks that are no purifiers, and all the ways to use a network: (network, inference).
GENERATIVE: dict[str, dict[str, Any]] = {"ddpm": DDPM, "gan": GAN}
WRAPPED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "apudae": (DENOISER, APUDAE),
    "diffdefense": (DDPM, DIFFDEFENSE),
    "diffpure": (DDPM, {"kind": "diffpure", "t_star": 4, "sampler": "ddpm", "substeps": 2}),
    "defense_gan": (GAN, {"kind": "defense_gan", "iterations": 3, "restarts": 2, "rate": 10.0}),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "autoencoder, global": {**AUTOENCODER, "residual": "global"},
    "autoencoder, odd and strided twice": {**AUTOENCODER, "blocks": 5, "strided": [1, 3]},
    "rt1": {"kind": "random_transform", "transform": RT1, "inner": AUTOENCODER},
    "median 5": {"kind": "median", "size": 5},
    "bit_depth 8": {"kind": "bit_depth", "bits": 8},
    "untrained_diffusion, zero": {
        "kind": "untrained_diffusion",
        "network": DDPM,
        "inference": DIFFDEFENSE,
        "weights": "zero",
        "seed": 0,
    },
}
WRAPPED_VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "apudae by Adam": (DENOISER, {**APUDAE, "optimiser": "adam", "target": "one_sided"}),
    "apudae with noise and turns": (
        DENOISER,
        {**APUDAE, "noise_255": 0.7, "transform": {"degrees": 5.0, "stretch": 0.1}},
    ),
    "diffdefense, faithful": (
        {**DDPM, "centred": True, "norm_input": False},
        {**DIFFDEFENSE, "mode": "faithful", "rate": 0.2},
    ),
    "diffpure, ddim": (DDPM, {"kind": "diffpure", "t_star": 4, "sampler": "ddim", "substeps": 2}),
}
SHAPES = ((1, 8, 8), (3, 12, 16))
EVERY = pytest.mark.parametrize("name", [*SAMPLES, *VARIANTS, *WRAPPED, *WRAPPED_VARIANTS])
SHAPED = pytest.mark.parametrize("shape", SHAPES)
IMAGES = 24


def build_purifier(name: str, shape: tuple[int, int, int] = SHAPES[0]) -> Purifier:
    """Build a purifier with BatchNorm statistics of its own, frozen, in eval mode."""
    wrapped = {**WRAPPED, **WRAPPED_VARIANTS}
    network, inference = wrapped.get(name) or ({**SAMPLES, **VARIANTS}[name], None)
    torch.manual_seed(0)
    built = TypeAdapter(PurifierConfig).validate_python(network).build(shape)
    if isinstance(built, Purifier):
        with torch.no_grad():
            for _ in range(3):
                built.train()(grey_levels(shape))
        built.eval().calibrate(grey_levels(shape), 8)
    if inference is not None:
        built = TypeAdapter(InferenceConfig).validate_python(inference).wrap(built)
    assert isinstance(built, Purifier)
    return built.eval().requires_grad_(False)


def grey_levels(shape: tuple[int, int, int]) -> Tensor:
    """Return images with the grey levels of a file, plenty of 0 and 1 among them."""
    generator = torch.Generator().manual_seed(1)
    levels = torch.randint(-128, 384, (IMAGES, *shape), generator=generator).clamp(0, 255)
    return levels.float() / 255


def kinds(union: Any) -> set[str]:
    members = get_args(get_args(union)[0])
    return {kind for m in members for kind in get_args(m.model_fields["kind"].annotation)}


def test_the_table_has_every_kind() -> None:
    assert kinds(PurifierConfig) == {*SAMPLES, *GENERATIVE}
    assert {name for name in SAMPLES if SAMPLES[name]["kind"] == name} == set(SAMPLES)
    trained = {"conv_autoencoder", "random_transform", "denoiser", "red_net", "magnet"}
    assert kinds(ControlConfig) == set(SAMPLES) - trained
    assert kinds(InferenceConfig) == set(WRAPPED)


@pytest.mark.parametrize("name", WRAPPED)
def test_an_inference_names_the_networks_it_takes_and_refuses_the_others(name: str) -> None:
    """What params.yaml is checked against is what `wrap` does."""
    inference = TypeAdapter(InferenceConfig).validate_python(WRAPPED[name][1])
    for kind, section in {**SAMPLES, **GENERATIVE}.items():
        network = TypeAdapter(PurifierConfig).validate_python(section).build(SHAPES[0])
        if kind in inference.network_kinds:
            assert isinstance(inference.wrap(network), Purifier)
        else:
            with pytest.raises(ValueError, match=name):
                inference.wrap(network)


@pytest.mark.parametrize("kind", GENERATIVE)
def test_a_generative_network_is_no_purifier(kind: str) -> None:
    network = TypeAdapter(PurifierConfig).validate_python(GENERATIVE[kind]).build(SHAPES[0])
    assert not isinstance(network, Purifier)


@EVERY
def test_stand_ins_are_purifiers_with_a_gradient_and_the_same_noise(name: str) -> None:
    purifier, draws = build_purifier(name), keyed(IMAGES)
    for kind in purifier.stand_ins:
        x = (0.2 + 0.6 * grey_levels(SHAPES[0])).requires_grad_()
        made = purifier.stand_in(kind, x, draws)
        assert made.shape == x.shape and made.min() >= 0 and made.max() <= 1
        assert torch.equal(purifier.stand_in(kind, x, draws), made), "other noise"
        (gradient,) = torch.autograd.grad(made.square().sum(), x)
        assert gradient.isfinite().all() and gradient.flatten(1).ne(0).any(1).all()
    if not purifier.stand_ins:
        with pytest.raises(NotImplementedError):
            purifier.stand_in("direct", grey_levels(SHAPES[0]), draws)


@EVERY
def test_suspicion_is_one_number_an_image_whatever_the_company(name: str) -> None:
    purifier, x, draws = build_purifier(name), grey_levels(SHAPES[0]), keyed(IMAGES)
    seen = purifier.detector_score(x, draws)
    assert seen.shape == (IMAGES,) and seen.isfinite().all()
    rows = torch.tensor([3, 17, 5])
    alone = purifier.detector_score(x[rows], draws[rows])
    assert torch.allclose(alone, seen[rows], rtol=1e-3, atol=1e-5)
    assert purifier.detector_score(x).shape == (IMAGES,), "served, it needs no draws"


@EVERY
@SHAPED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_in_are_images_out(
    name: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    x = grey_levels(shape).to(dtype)
    before = x.clone()
    purified = build_purifier(name, shape).to(dtype)(x, keyed(IMAGES))
    assert purified.shape == x.shape and purified.dtype == dtype and purified.device == x.device
    assert purified.isfinite().all() and purified.min() >= 0 and purified.max() <= 1
    assert torch.equal(x, before), "the input was written to"


@EVERY
@pytest.mark.parametrize("image", ["black", "white", "one"])
def test_extreme_images_are_purified_too(name: str, image: str) -> None:
    x = torch.ones(1, 1, 8, 8) if image == "one" else torch.full((4, 1, 8, 8), image == "white")
    purified = build_purifier(name)(x.float(), keyed(len(x)))
    assert purified.isfinite().all() and purified.min() >= 0 and purified.max() <= 1


@EVERY
def test_it_is_as_random_as_declared(name: str) -> None:
    purifier, x = build_purifier(name), grey_levels(SHAPES[0])
    one = purifier(x, keyed(IMAGES))
    assert torch.equal(purifier(x, keyed(IMAGES)), one), "equal draws, other answer"
    redrawn, reseeded = (
        purifier(x, keyed(IMAGES).redraw(1)),
        purifier(x, Draws(1, "score", keyed(IMAGES).ids)),
    )
    role = purifier(x, Draws(0, "attack", keyed(IMAGES).ids))
    for other in (redrawn, reseeded, role):
        moved = (other != one).flatten(1).any(1)
        assert moved.all() if purifier.stochastic else not moved.any()


@EVERY
def test_served_without_draws_its_noise_is_fresh(name: str) -> None:
    purifier, x = build_purifier(name), grey_levels(SHAPES[0])
    same = torch.equal(purifier(x), purifier(x))
    assert same != purifier.stochastic
    if purifier.stochastic:
        twice = purifier(x[:1].expand(2, -1, -1, -1))
        assert not torch.equal(twice[0], twice[1]), "one noise for the whole batch"


@EVERY
def test_it_is_as_differentiable_as_declared(name: str) -> None:
    purifier = build_purifier(name)
    x = (0.2 + 0.6 * grey_levels(SHAPES[0])).requires_grad_()
    purified = purifier(x, keyed(IMAGES))
    probe = torch.randn(purified.shape, generator=torch.Generator().manual_seed(2))
    gradient = torch.zeros_like(x)
    if purified.requires_grad:
        (found,) = torch.autograd.grad((probe * purified).sum(), x, allow_unused=True)
        gradient = gradient if found is None else found
    assert gradient.isfinite().all()
    usable = gradient.flatten(1).ne(0).any(1)
    assert usable.all() if purifier.differentiable else not usable.any()


@EVERY
def test_an_image_is_purified_on_its_own(name: str) -> None:
    """Equal bytes at the same batch size in any company; equal up to rounding at another size."""
    purifier, x, draws = build_purifier(name), grey_levels(SHAPES[0]), keyed(IMAGES)
    whole = purifier(x, draws)
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(3))
    assert torch.equal(purifier(x[order], draws[order]), whole[order])
    company = x.clone()
    company[1:] = 1 - company[1:]
    assert torch.equal(purifier(company, draws)[0], whole[0])
    for rows in (order[:1], order[:7], order[5:]):
        assert torch.allclose(purifier(x[rows], draws[rows]), whole[rows], rtol=0, atol=1e-5)


@EVERY
def test_it_sees_images_and_noise_and_no_labels(name: str) -> None:
    purifier = build_purifier(name)
    for method in (purifier.forward, purifier.purify):
        assert list(inspect.signature(method).parameters) == ["x", "draws"]


@EVERY
def test_purifying_changes_nothing_in_the_purifier(name: str) -> None:
    purifier = build_purifier(name)
    before = {key: value.clone() for key, value in purifier.state_dict().items()}
    stream = torch.get_rng_state()
    purifier(grey_levels(SHAPES[0]), keyed(IMAGES))
    assert all(torch.equal(before[key], value) for key, value in purifier.state_dict().items())
    assert torch.equal(torch.get_rng_state(), stream), "keyed noise took from the global stream"


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def autoencoder(**changes: Any) -> Any:
    return TypeAdapter(PurifierConfig).validate_python({**AUTOENCODER, **changes})


def test_the_papers_autoencoder_has_the_papers_size() -> None:
    net = autoencoder(blocks=15, width=64, strided=[1]).build((3, 32, 32))
    assert parameters(net) / 1e6 == pytest.approx(1.041, abs=0.002)
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
def test_skips_meet_the_shape_they_came_from(
    shape: tuple[int, int, int], blocks: int, strided: list[int]
) -> None:
    net = autoencoder(blocks=blocks, strided=strided).build(shape).eval()
    assert net(torch.rand(2, *shape)).shape == (2, *shape)


@pytest.mark.parametrize(("blocks", "skips"), [(15, 7), (6, 2), (5, 2), (4, 1), (2, 0)])
def test_every_second_block_is_skipped_to(blocks: int, skips: int) -> None:
    """Silencing a decoder block leaves a path to the output through every skip behind it."""
    net = autoencoder(blocks=blocks, strided=[]).build((1, 8, 8)).eval()
    blocks_of = [*net.get_submodule("decoder").children(), net.get_submodule("last")]
    x, found = torch.rand(1, 1, 8, 8), 0
    for silenced, following in pairwise(blocks_of):
        seen: list[Tensor] = []
        hooks = [
            silenced.register_forward_hook(lambda module, args, out: torch.zeros_like(out)),
            following.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0])),
        ]
        net(x)
        net(1 - x)
        found += not torch.equal(seen[0], seen[1])
        for hook in hooks:
            hook.remove()
    assert found == skips


def test_the_global_skip_starts_from_the_image_itself() -> None:
    net = autoencoder(residual="global").build((1, 8, 8)).eval()
    last = net.get_submodule("last")
    for parameter in last.parameters():
        nn.init.zeros_(parameter)
    x = grey_levels((1, 8, 8))
    assert torch.allclose(net(x), x, atol=1e-6)


def test_images_that_cannot_be_halved_are_refused_with_a_sentence() -> None:
    with pytest.raises(ValueError, match="halves 2 times, which 10 x 8 images do not allow"):
        autoencoder(strided=[1, 2]).build((1, 10, 8))
    with pytest.raises(ValidationError, match=r"strided \[5\] must name blocks 1\.\.4"):
        autoencoder(strided=[5])
    config = {"kind": "random_transform", "transform": {**RT1, "patch": 3}, "inner": AUTOENCODER}
    with pytest.raises(ValueError, match="patches of side 3 do not tile 8 x 8 images"):
        TypeAdapter(PurifierConfig).validate_python(config).build((1, 8, 8))
    few = {**config, "transform": {**RT1, "patch": 4, "missing": 0.1}}
    with pytest.raises(ValueError, match=r"missing: 0\.1 of 4 patches rounds to none"):
        TypeAdapter(PurifierConfig).validate_python(few).build((1, 8, 8))


@pytest.mark.parametrize(
    ("patch", "missing", "cells"), [(4, 0.25, 16), (2, 0.25, 64), (2, 0.5, 128), (1, 0.15, 154)]
)
def test_transforms_remove_exactly_their_share_of_patches(
    patch: int, missing: float, cells: int
) -> None:
    """On 32 x 32 images: 16 of 64 cells of side 4 is the setting of AToP (facts 4.2)."""
    white = torch.ones(IMAGES, 3, 32, 32)
    kept = Rt1(kind="rt1", patch=patch, missing=missing).apply(white, keyed(IMAGES))
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    gone = (kept == 0).flatten(1).sum(1)
    assert gone.tolist() == [cells * patch * patch * 3] * IMAGES
    blocks = kept.unfold(2, patch, patch).unfold(3, patch, patch).flatten(4)
    assert torch.equal(blocks.amin(4), blocks.amax(4)), "a patch was cut"
    assert torch.equal(kept[:, :1].expand_as(kept), kept), "channels lose different patches"


def test_every_image_loses_its_own_patches_and_every_patch_is_lost_as_often() -> None:
    many = 4000
    white = torch.ones(many, 1, 8, 8)
    kept = Rt1(kind="rt1", patch=2, missing=0.25).apply(white, keyed(many))
    assert len({tuple(mask.flatten().tolist()) for mask in kept[:20]}) == 20
    share = (kept == 0).float().mean(0)
    assert (share - 0.25).abs().max() < 5 * (0.25 * 0.75 / many) ** 0.5
    assert not torch.equal(
        Rt1(kind="rt1", patch=2, missing=0.25).apply(white, keyed(many).redraw(1)), kept
    )


def test_the_second_transform_adds_clipped_noise_before_patches_go() -> None:
    grey = torch.full((IMAGES, 1, 32, 32), 0.5)
    rt2 = Rt2(kind="rt2", patch=2, missing=0.25, sigma=0.1)
    damaged = rt2.apply(grey, keyed(IMAGES))
    mask = Rt1(kind="rt1", patch=2, missing=0.25).apply(torch.ones_like(grey), keyed(IMAGES))
    assert torch.equal(damaged == 0, mask == 0), "a missing patch is not empty"
    noise = damaged[mask == 1] - 0.5
    n = noise.numel()
    assert abs(noise.mean()) < 5 * 0.1 / n**0.5
    assert abs(noise.std() - 0.1) < 5 * 0.1 / (2 * n) ** 0.5
    wild = Rt2(kind="rt2", patch=2, missing=0.25, sigma=2.0).apply(grey, keyed(IMAGES))
    assert wild.min() == 0 and wild.max() == 1
    assert 0.3 < (wild[mask == 1] == 1).float().mean() < 0.5


def test_controls_compute_what_they_are_named_after() -> None:
    x = grey_levels((1, 8, 8))
    assert torch.equal(build_purifier("identity")(x), x)
    assert torch.equal(build_purifier("threshold")(x), (x > 0.5).float())
    assert torch.allclose(build_purifier("bit_depth")(x), (x * 3).round() / 3)
    assert torch.allclose(build_purifier("bit_depth 8")(x), x, atol=1e-6), (
        "8 bits are what a file has"
    )
    windows = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="replicate")
    window = windows[:, :, 2:5, 4:7].flatten(2).sort(2).values[:, :, 4]
    assert torch.equal(build_purifier("median")(x)[:, :, 2, 4], window)
    corner = x[:, 0, [0, 0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 0, 0, 1, 0, 0, 1]]
    assert torch.equal(build_purifier("median")(x)[:, 0, 0, 0], corner.median(1).values), (
        "edges repeat"
    )
    noise = build_purifier("gaussian_noise")(torch.full_like(x, 0.5), keyed(IMAGES)) - 0.5
    assert abs(noise.std() - 0.1) < 0.02
