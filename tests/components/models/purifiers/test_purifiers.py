"""Every kind of purifier keeps the contract of `limpid.testing`."""

from typing import Any, get_args

import pytest
import torch
from pydantic import TypeAdapter
from toys import strided_pointwise

from components.models.purifiers import (
    ControlConfig,
    InferenceConfig,
    Purifier,
    PurifierConfig,
    stochastic,
)
from limpid.testing import Check, purifier_checks
from limpid.testing.check import grey_levels

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
# Colour images that are not square take the checks of what comes back.
CHECKS = [(SHAPES[0], check) for check in purifier_checks(shape=SHAPES[0])]
CHECKS += [(SHAPES[1], check) for check in purifier_checks(shape=SHAPES[1])[:1]]
IMAGES = 24


def build_purifier(name: str, shape: tuple[int, int, int] = SHAPES[0]) -> Purifier:
    """Build a frozen purifier in eval mode; its BatchNorm statistics are not the initial ones.

    Its weights are the next of the global random stream.
    """
    wrapped = {**WRAPPED, **WRAPPED_VARIANTS}
    network, inference = wrapped.get(name) or ({**SAMPLES, **VARIANTS}[name], None)
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
@pytest.mark.parametrize(("shape", "check"), CHECKS, ids=str)
def test_every_kind_keeps_the_contract(
    name: str, shape: tuple[int, int, int], check: Check
) -> None:
    check(lambda: build_purifier(name, shape))


@EVERY
def test_the_sections_say_whether_a_purifier_draws_noise(name: str) -> None:
    network, inference = {**WRAPPED, **WRAPPED_VARIANTS}.get(name) or (
        {**SAMPLES, **VARIANTS}[name],
        None,
    )
    model = TypeAdapter(PurifierConfig).validate_python(network)
    how = TypeAdapter(InferenceConfig | None).validate_python(inference)
    assert stochastic(model, how) == build_purifier(name).stochastic
