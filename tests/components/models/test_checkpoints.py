"""Model folders: the saved network is loaded to the bit, or the folder is refused."""

import io
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import project
import pytest
import torch
from torch import nn
from toys import Evil

from components.data.draws import Draws
from components.data.shards import MANIFEST, DataError, sha256
from components.models.checkpoints import (
    CONFIG,
    WEIGHTS,
    ModelCard,
    build,
    fingerprint,
    latest_state,
    load,
    load_purifier,
    read_card,
    save,
)
from components.models.classifiers import ClassifierConfig
from components.models.identity import state_digest
from components.models.purifiers import PurifierConfig
from components.models.purifiers.diffusion.ddpm import Diffusion
from components.models.purifiers.gan import DefenseGan, GenerativePair

DDPM = {
    "kind": "ddpm", "width": 2, "steps": 5, "beta_start": 0.0001, "beta_end": 0.2,
    "centred": False, "norm_input": True,
}  # fmt: skip
AUTOENCODER = {
    "kind": "conv_autoencoder", "blocks": 4, "width": 4, "strided": [2], "residual": "none",
}  # fmt: skip
RT2 = {"kind": "rt2", "patch": 2, "missing": 0.25, "sigma": 0.1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "small_cnn": ("classifier", {"kind": "small_cnn", "width": 4}),
    "resnet": ("classifier", {"kind": "resnet", "depth": 8, "width": 4}),
    "resnet18": ("classifier", {"kind": "resnet18", "width": 4}),
    "resnet34": ("classifier", {"kind": "resnet34", "width": 2}),
    "resnet50": ("classifier", {"kind": "resnet50", "width": 2}),
    "wide_resnet": ("classifier", {"kind": "wide_resnet", "depth": 10, "widen": 1}),
    "conv_autoencoder": ("purifier", AUTOENCODER),
    "random_transform": (
        "purifier",
        {"kind": "random_transform", "transform": RT2, "inner": AUTOENCODER},
    ),
    "identity": ("purifier", {"kind": "identity"}),
    "gaussian_noise": ("purifier", {"kind": "gaussian_noise", "sigma": 0.1}),
    "bit_depth": ("purifier", {"kind": "bit_depth", "bits": 3}),
    "median": ("purifier", {"kind": "median", "size": 3}),
    "threshold": ("purifier", {"kind": "threshold", "at": 0.5}),
    "jpeg": ("purifier", {"kind": "jpeg", "quality": 50}),
    "random_network": ("purifier", {"kind": "random_network", "inner": AUTOENCODER, "seed": 0}),
    "defense_gan_a": ("classifier", {"kind": "defense_gan_a"}),
    "defense_gan_b": ("classifier", {"kind": "defense_gan_b"}),
    "denoiser": ("purifier", {"kind": "denoiser", "width": 4}),
    "red_net": ("purifier", {"kind": "red_net", "blocks": 4, "width": 4}),
    "magnet": ("purifier", {"kind": "magnet", "width": 3}),
    "ddpm": ("purifier", DDPM),
    "gan": ("purifier", {"kind": "gan", "latent": 16, "width": 4}),
    "untrained_diffusion": (
        "purifier",
        {
            "kind": "untrained_diffusion", "network": DDPM, "weights": "random", "seed": 0,
            "inference": {
                "kind": "diffdefense", "mode": "released", "iterations": 2, "restarts": 1,
                "steps": 3, "rate": 25.0,
            },
        },
    ),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", MODELS)
IMAGES = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
# For the classifiers of Defense-GAN, which need larger images.
LARGE = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def images_for(name: str) -> torch.Tensor:
    return LARGE if name.startswith("defense_gan") else IMAGES


def output(name: str, module: nn.Module) -> torch.Tensor:
    """Return the output of a network for images, or for its other kind of input."""
    x = images_for(name)
    if isinstance(module, GenerativePair):
        return torch.cat([module.generator(LARGE[:, 0, 0, :16]).flatten(), module.critic(x)])
    if isinstance(module, Diffusion):
        out: torch.Tensor = module(x, torch.arange(12) % 5)
        return out
    noise = (Draws(0, "score", torch.arange(len(x))),) if MODELS[name][0] == "purifier" else ()
    out = module(x, *noise)
    return out


def card_of(name: str, **changes: Any) -> ModelCard:
    family, model = MODELS[name]
    facts: dict[str, Any] = {
        "format": 1,
        "family": family,
        "model": model,
        "shape": list(images_for(name).shape[1:]),
        "class_names": [str(digit) for digit in range(10)],
        "provenance": {"trained_on": "nothing"},
    }
    return ModelCard(**{**facts, **changes})


def build_trained(name: str, seed: int = 0) -> nn.Module:
    """Return a network whose buffers are not the initial ones."""
    torch.manual_seed(seed)
    module = build(card_of(name))
    with torch.no_grad():
        output(name, module.train())
    if MODELS[name][0] == "classifier":
        module.get_buffer("mean").fill_(0.3)
    return module.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "model", build_trained("small_cnn"), card_of("small_cnn"))
    return tmp_path / "model"


def test_models_cover_every_kind() -> None:
    kinds = set()
    for union in (ClassifierConfig, PurifierConfig):
        for member in get_args(get_args(union)[0]):
            kinds |= set(get_args(member.model_fields["kind"].annotation))
    assert kinds == set(MODELS)


@EVERY
def test_loaded_model_equals_the_saved_one_to_the_bit(name: str, tmp_path: Path) -> None:
    module = build_trained(name)
    save(tmp_path / "model", module, card_of(name))
    loaded = load(tmp_path / "model")
    assert torch.equal(output(name, loaded), output(name, module))
    assert state_digest(loaded) == state_digest(module)
    assert not any(m.training for m in loaded.modules())
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(output(name, load(str(tmp_path / "model"))), output(name, module))


@EVERY
def test_folder_has_no_pickle_and_no_paths_of_the_machine(name: str, tmp_path: Path) -> None:
    save(tmp_path / "model", build_trained(name), card_of(name))
    names = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert names == sorted([CONFIG, WEIGHTS, MANIFEST])
    json.loads((tmp_path / "model" / CONFIG).read_text())
    json.loads((tmp_path / "model" / MANIFEST).read_text())
    weights = (tmp_path / "model" / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(weights[:8], "little")
    tensors = {k: v for k, v in json.loads(weights[8:header]).items() if k != "__metadata__"}
    values = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    assert header + values == len(weights), "it has more than a header and numbers"
    for path in (tmp_path / "model").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()


@EVERY
def test_equal_weights_give_equal_bytes(name: str, tmp_path: Path) -> None:
    save(tmp_path / "one", build_trained(name), card_of(name))
    save(tmp_path / "two", build_trained(name), card_of(name))
    for file in (CONFIG, WEIGHTS, MANIFEST):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")


def test_memory_layout_does_not_change_the_bytes(tmp_path: Path) -> None:
    module = build_trained("resnet")
    save(tmp_path / "one", module, card_of("resnet"))
    save(tmp_path / "two", module.to(memory_format=torch.channels_last), card_of("resnet"))
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()


def test_fingerprint_changes_with_weights_and_card(tmp_path: Path) -> None:
    cards = [card_of("small_cnn"), card_of("small_cnn", provenance={"trained_on": "something"})]
    prints = set()
    for index, (seed, card) in enumerate(((0, cards[0]), (1, cards[0]), (0, cards[1]))):
        save(tmp_path / str(index), build_trained("small_cnn", seed), card)
        prints.add(fingerprint(tmp_path / str(index)))
    assert len(prints) == 3


# Damage


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_every_altered_byte_is_refused(file: str, folder: Path) -> None:
    content = (folder / file).read_bytes()
    for position in torch.randint(len(content), (40,)).tolist():
        damaged = bytearray(content)
        damaged[position] ^= 1
        (folder / file).write_bytes(damaged)
        for reader in (load, read_card, fingerprint):
            with pytest.raises(DataError, match=f"{file} was altered since it was written"):
                reader(folder)
    (folder / file).write_bytes(content[:-1])
    with pytest.raises(DataError, match="altered"):
        load(folder)


@pytest.mark.parametrize("bit", [0, 3, 7])
def test_altered_manifest_is_refused_or_harmless(bit: int, folder: Path) -> None:
    """For every byte: either a DataError, or the same weights."""
    content = (folder / MANIFEST).read_bytes()
    digest = state_digest(load(folder))
    refused = 0
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << bit
        (folder / MANIFEST).write_bytes(damaged)
        try:
            assert state_digest(load(folder)) == digest
        except DataError:
            refused += 1
    assert refused > 120, "it has two digests of 64 digits"


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS, MANIFEST])
def test_missing_file_is_named(file: str, folder: Path) -> None:
    (folder / file).unlink()
    with pytest.raises(DataError, match=f"no finished model folder.*{file} is missing"):
        load(folder)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no finished model folder"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("listed", ["[]", "{}", '{"files": [{}]}', '{"files": 3}', "nonsense", ""])
def test_malformed_manifest_is_refused(listed: str, folder: Path) -> None:
    (folder / MANIFEST).write_text(listed)
    with pytest.raises(DataError, match="no model folder of this version"):
        load(folder)


def test_manifest_must_list_both_files(folder: Path) -> None:
    """Otherwise an altered file would not be noticed."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for left_out in (CONFIG, WEIGHTS):
        files = [file for file in manifest["files"] if file["path"] != left_out]
        (folder / MANIFEST).write_text(json.dumps({"files": files}))
        with pytest.raises(DataError):
            load(folder)


def rewrite(folder: Path, card: dict[str, Any]) -> None:
    """Replace the card, and adapt the manifest as a user with an editor could."""
    (folder / CONFIG).write_text(json.dumps(card))
    manifest = json.loads((folder / MANIFEST).read_text())
    for file in manifest["files"]:
        file["sha256"] = sha256(folder / file["path"])
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_weights_of_another_architecture_are_named_and_refused(folder: Path) -> None:
    card = json.loads((folder / CONFIG).read_text())
    rewrite(folder, {**card, "model": {"kind": "small_cnn", "width": 8}})
    with pytest.raises(DataError, match=r"network\.0\.weight: config \(8, 1, 3, 3\), weights \(4,"):
        load(folder)
    rewrite(folder, {**card, "model": {"kind": "resnet", "depth": 8, "width": 4}})
    with pytest.raises(DataError, match=r"does not fit its config: .*config \(.*weights None"):
        load(folder)
    rewrite(folder, {**card, "class_names": ["a", "b", "c"]})
    with pytest.raises(DataError, match=r"network\.10\.weight: config \(3, 64\), weights \(10, 64"):
        load(folder)
    rewrite(folder, {**card, "shape": [1, 28, 28]})
    with pytest.raises(DataError, match=r"network\.10\.weight"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"kind": "vgg"}}, "describes no valid network"),
        ({"model": {"kind": "resnet", "depth": 9, "width": 4}}, "not 6n"),
        ({"model": {"kind": "small_cnn", "width": 4, "depth": 3}}, "describes no valid network"),
        ({"family": "detector"}, "no model folder of this version"),
        ({"format": 2}, "no model folder of this version"),
        ({"family": "purifier"}, "describes no valid network"),
        ({"shape": [1, 8]}, "describes no valid network"),
    ],
)
def test_invalid_card_is_refused(change: dict[str, Any], message: str, folder: Path) -> None:
    card = json.loads((folder / CONFIG).read_text())
    rewrite(folder, {**card, **change})
    with pytest.raises(DataError, match=message):
        load(folder)


def test_load_purifier_refuses_other_models_and_applies_an_inference(
    folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="holds a small_cnn, which is no purifier by itself"):
        load_purifier(folder)
    save(tmp_path / "gan", build_trained("gan"), card_of("gan"))
    with pytest.raises(DataError, match="holds a gan, which is no purifier by itself"):
        load_purifier(tmp_path / "gan")
    fitted = DefenseGan(kind="defense_gan", iterations=2, restarts=1, rate=10.0)
    assert load_purifier(tmp_path / "gan", inference=fitted)(IMAGES).shape == IMAGES.shape
    save(tmp_path / "purifier", build_trained("conv_autoencoder"), card_of("conv_autoencoder"))
    assert load_purifier(tmp_path / "purifier")(IMAGES).shape == IMAGES.shape


# A hostile folder


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("form", ["pickle", "torch.save", "beside", "state.pt"])
def test_pickle_is_refused_without_being_unpickled(
    form: str, protocol: int, folder: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    bad = pickle.dumps({"network.0.weight": Evil(Path.touch, marker)}, protocol)
    if form == "torch.save":
        buffer = io.BytesIO()
        torch.save({"network.0.weight": Evil(Path.touch, marker)}, buffer, pickle_protocol=protocol)
        bad = buffer.getvalue()
    pickle.loads(pickle.dumps(Evil(Path.touch, tmp_path / "works")))
    assert (tmp_path / "works").exists()
    if form == "beside":
        # Files that are not in the manifest are ignored.
        for name in ("weights.pt", "pytorch_model.bin", "model.pkl"):
            (folder / name).write_bytes(bad)
        load(folder)
    elif form == "state.pt":
        path = tmp_path / "states" / "epoch-000001" / "state.pt"
        path.parent.mkdir(parents=True)
        path.write_bytes(bad)
        (path.parent / MANIFEST).write_text(json.dumps({"sha256": sha256(path)}))
        assert latest_state(tmp_path / "states") is None
    else:
        (folder / WEIGHTS).write_bytes(bad)
        rewrite(folder, json.loads((folder / CONFIG).read_text()))
        with pytest.raises(DataError, match="is not a safetensors file"):
            load(folder)
        manifest = {"files": [{"path": "weights.pt", "sha256": sha256(folder / WEIGHTS)}]}
        (folder / WEIGHTS).rename(folder / "weights.pt")
        (folder / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(DataError, match=r"must list config\.json, "):
            load(folder)
    assert not marker.exists()


# A purifier needs torch, safetensors and `components` only.

SCRIPT = """
import sys
for name in ("ray", "dvc", "mlflow", "ruamel", "ruamel.yaml", "yaml", "pipelines"):
    sys.modules[name] = None
import torch
from components.models.checkpoints import load

purifier = load(sys.argv[1])
theirs = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
images = torch.rand(5, 1, 8, 8)
cleaned = purifier(images)
assert cleaned.shape == images.shape and cleaned.min() >= 0 and cleaned.max() <= 1
assert theirs(cleaned).shape == (5, 3)
assert not torch.equal(cleaned, images)
again = purifier(images)
assert torch.equal(again, cleaned) != purifier.stochastic, "noise is fresh"
loaded = [n for n in ("ray", "dvc", "mlflow", "pipelines") if sys.modules.get(n) is not None]
assert not loaded, loaded
print("done")
"""


@pytest.mark.parametrize("name", ["conv_autoencoder", "random_transform"])
def test_purifier_loads_and_runs_without_ray_dvc_or_mlflow(name: str, tmp_path: Path) -> None:
    save(tmp_path / "model", build_trained(name), card_of(name))
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "model")]
    repository = project.ROOT
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "done"
