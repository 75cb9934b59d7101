"""The contract that every purifier keeps, tested on every kind."""

import inspect
from typing import Any, get_args

import pytest
import torch
from pydantic import TypeAdapter
from toys import grey_levels, keyed, strided_pointwise

from components.data.draws import Draws, NoiseStream
from components.models.purifiers import (
    ControlConfig,
    InferenceConfig,
    Purifier,
    PurifierConfig,
    stochastic,
)

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
# Networks that are no purifiers by themselves, and every inference: (network, inference).
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
    "rt3 around a red_net with a mask channel": {
        "kind": "random_transform",
        "transform": {"kind": "rt3", "patch": 2, "masks": 4, "sigma": 0.1, "fill": 0.5},
        "inner": {"kind": "red_net", "blocks": 4, "width": 4},
        "mask_channel": True,
    },
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
    "diffdefense, algorithm_1": (DDPM, {**DIFFDEFENSE, "mode": "algorithm_1", "rate": 20.0}),
    "diffdefense, ddim": (
        {**DDPM, "centred": True, "norm_input": False},
        {**DIFFDEFENSE, "mode": "ddim", "rate": 0.2},
    ),
    "diffpure, ddim": (DDPM, {"kind": "diffpure", "t_star": 4, "sampler": "ddim", "substeps": 2}),
}
SHAPES = ((1, 8, 8), (3, 12, 16))
EVERY = pytest.mark.parametrize("name", [*SAMPLES, *VARIANTS, *WRAPPED, *WRAPPED_VARIANTS])
SHAPED = pytest.mark.parametrize("shape", SHAPES)
IMAGES = 24


def build_purifier(name: str, shape: tuple[int, int, int] = SHAPES[0]) -> Purifier:
    """Build a frozen purifier in eval mode; its BatchNorm statistics are not the initial ones."""
    wrapped = {**WRAPPED, **WRAPPED_VARIANTS}
    network, inference = wrapped.get(name) or ({**SAMPLES, **VARIANTS}[name], None)
    torch.manual_seed(0)
    built = TypeAdapter(PurifierConfig).validate_python(network).build(shape)
    if isinstance(built, Purifier):
        with torch.no_grad():
            for _ in range(3):
                built.train()(grey_levels(IMAGES, shape))
        built.eval().calibrate(grey_levels(IMAGES, shape), 8)
    if inference is not None:
        built = TypeAdapter(InferenceConfig).validate_python(inference).wrap(built)
    assert isinstance(built, Purifier)
    return built.eval().requires_grad_(False)


def noise(count: int) -> NoiseStream:
    """Return the noise of `count` images as a purifier gets it."""
    return keyed(count).stream()


def kinds(union: Any) -> set[str]:
    members = get_args(get_args(union)[0])
    return {kind for m in members for kind in get_args(m.model_fields["kind"].annotation)}


def test_samples_cover_every_kind() -> None:
    assert kinds(PurifierConfig) == {*SAMPLES, *GENERATIVE}
    assert {name for name in SAMPLES if SAMPLES[name]["kind"] == name} == set(SAMPLES)
    trained = {"conv_autoencoder", "random_transform", "denoiser", "red_net", "magnet"}
    assert kinds(ControlConfig) == set(SAMPLES) - trained
    assert kinds(InferenceConfig) == set(WRAPPED)


@pytest.mark.parametrize("name", WRAPPED)
def test_inference_accepts_its_network_kinds_and_refuses_others(name: str) -> None:
    """`network_kinds`, which params.yaml is checked against, agrees with `wrap`."""
    inference = TypeAdapter(InferenceConfig).validate_python(WRAPPED[name][1])
    for kind, section in {**SAMPLES, **GENERATIVE}.items():
        network = TypeAdapter(PurifierConfig).validate_python(section).build(SHAPES[0])
        if kind in inference.network_kinds:
            assert isinstance(inference.wrap(network), Purifier)
        else:
            with pytest.raises(ValueError, match=name):
                inference.wrap(network)


@pytest.mark.parametrize("kind", GENERATIVE)
def test_generative_network_is_not_a_purifier(kind: str) -> None:
    network = TypeAdapter(PurifierConfig).validate_python(GENERATIVE[kind]).build(SHAPES[0])
    assert not isinstance(network, Purifier)


@pytest.mark.parametrize("section", [*SAMPLES.values(), *GENERATIVE.values(), *VARIANTS.values()])
def test_no_network_has_a_strided_convolution_of_one_pixel(section: dict[str, Any]) -> None:
    network = TypeAdapter(PurifierConfig).validate_python(section).build((3, 48, 48))
    assert strided_pointwise(network) == []


@EVERY
def test_stand_ins_return_images_with_keyed_noise_and_a_gradient(name: str) -> None:
    purifier, stream = build_purifier(name), noise(IMAGES)
    for kind in purifier.stand_ins:
        x = (0.2 + 0.6 * grey_levels(IMAGES, SHAPES[0])).requires_grad_()
        purified = purifier.stand_in(kind, x, stream)
        assert purified.shape == x.shape and purified.min() >= 0 and purified.max() <= 1
        assert torch.equal(purifier.stand_in(kind, x, stream), purified), "the noise is not keyed"
        (gradient,) = torch.autograd.grad(purified.square().sum(), x)
        assert gradient.isfinite().all() and gradient.flatten(1).ne(0).any(1).all()
    if not purifier.stand_ins:
        with pytest.raises(NotImplementedError):
            purifier.stand_in("direct", grey_levels(IMAGES, SHAPES[0]), stream)


@EVERY
def test_detector_score_of_an_image_does_not_depend_on_its_batch(name: str) -> None:
    purifier, x, stream = build_purifier(name), grey_levels(IMAGES, SHAPES[0]), noise(IMAGES)
    scores = purifier.detector_score(x, stream)
    assert scores.shape == (IMAGES,) and scores.isfinite().all()
    rows = torch.tensor([3, 17, 5])
    alone = purifier.detector_score(x[rows], stream[rows])
    assert torch.allclose(alone, scores[rows], rtol=1e-3, atol=1e-5)
    assert purifier.detector_score(x).shape == (IMAGES,), "without a stream"
    assert torch.equal(purifier.detector_score(x, stream, purifier(x, stream)), scores)


@EVERY
@SHAPED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_has_shape_dtype_and_range_of_images(
    name: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    x = grey_levels(IMAGES, shape).to(dtype)
    before = x.clone()
    purified = build_purifier(name, shape).to(dtype)(x, noise(IMAGES))
    assert purified.shape == x.shape and purified.dtype == dtype and purified.device == x.device
    assert purified.isfinite().all() and purified.min() >= 0 and purified.max() <= 1
    assert torch.equal(x, before), "the input has changed"


@EVERY
@pytest.mark.parametrize("image", ["black", "white", "one"])
def test_extreme_images_stay_finite_and_in_range(name: str, image: str) -> None:
    x = torch.ones(1, 1, 8, 8) if image == "one" else torch.full((4, 1, 8, 8), image == "white")
    purified = build_purifier(name)(x.float(), noise(len(x)))
    assert purified.isfinite().all() and purified.min() >= 0 and purified.max() <= 1


@EVERY
def test_output_is_random_only_if_declared_stochastic(name: str) -> None:
    purifier, x = build_purifier(name), grey_levels(IMAGES, SHAPES[0])
    one = purifier(x, noise(IMAGES))
    assert torch.equal(purifier(x, noise(IMAGES)), one), "equal noise, other output"
    draws = keyed(IMAGES)
    reseeded, other_role = Draws(1, "score", draws.ids), Draws(0, "attack", draws.ids)
    for other in (draws.redraw(1), reseeded, other_role):
        moved = (purifier(x, other.stream()) != one).flatten(1).any(1)
        assert moved.all() if purifier.stochastic else not moved.any()


@EVERY
def test_the_sections_say_whether_a_purifier_draws_noise(name: str) -> None:
    network, inference = {**WRAPPED, **WRAPPED_VARIANTS}.get(name) or (
        {**SAMPLES, **VARIANTS}[name],
        None,
    )
    model = TypeAdapter(PurifierConfig).validate_python(network)
    how = TypeAdapter(InferenceConfig | None).validate_python(inference)
    assert stochastic(model, how) == build_purifier(name).stochastic


@EVERY
def test_noise_is_fresh_for_every_image_without_a_stream(name: str) -> None:
    purifier, x = build_purifier(name), grey_levels(IMAGES, SHAPES[0])
    same = torch.equal(purifier(x), purifier(x))
    assert same != purifier.stochastic
    if purifier.stochastic:
        twice = purifier(x[:1].expand(2, -1, -1, -1))
        assert not torch.equal(twice[0], twice[1]), "one noise for the whole batch"


@EVERY
def test_gradient_is_usable_only_if_declared_differentiable(name: str) -> None:
    purifier = build_purifier(name)
    x = (0.2 + 0.6 * grey_levels(IMAGES, SHAPES[0])).requires_grad_()
    purified = purifier(x, noise(IMAGES))
    probe = torch.randn(purified.shape, generator=torch.Generator().manual_seed(2))
    gradient = torch.zeros_like(x)
    if purified.requires_grad:
        (found,) = torch.autograd.grad((probe * purified).sum(), x, allow_unused=True)
        gradient = gradient if found is None else found
    assert gradient.isfinite().all()
    usable = gradient.flatten(1).ne(0).any(1)
    assert usable.all() if purifier.differentiable else not usable.any()


@EVERY
def test_purified_image_does_not_depend_on_its_batch(name: str) -> None:
    """Equal bytes in batches of equal size; equal up to rounding in batches of another size."""
    purifier, x, stream = build_purifier(name), grey_levels(IMAGES, SHAPES[0]), noise(IMAGES)
    whole = purifier(x, stream)
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(3))
    assert torch.equal(purifier(x[order], stream[order]), whole[order])
    others_changed = x.clone()
    others_changed[1:] = 1 - others_changed[1:]
    assert torch.equal(purifier(others_changed, stream)[0], whole[0])
    for rows in (order[:1], order[:7], order[5:]):
        assert torch.allclose(purifier(x[rows], stream[rows]), whole[rows], rtol=0, atol=1e-5)


@EVERY
def test_purifier_takes_images_and_noise_only(name: str) -> None:
    purifier = build_purifier(name)
    for method in (purifier.forward, purifier.purify):
        assert list(inspect.signature(method).parameters) == ["x", "stream"]


@EVERY
def test_purifying_changes_neither_state_nor_global_stream(name: str) -> None:
    purifier = build_purifier(name)
    before = {key: value.clone() for key, value in purifier.state_dict().items()}
    state = torch.get_rng_state()
    purifier(grey_levels(IMAGES, SHAPES[0]), noise(IMAGES))
    assert all(torch.equal(before[key], value) for key, value in purifier.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state), "it drew from the global stream"
