"""Model folders, and the state a training resumes from.

A model folder is `config.json` (what to build, provenance; no times, no run ids),
`weights.safetensors` and `manifest.json` (size and sha256 of both, written last). `load` gives
back a ready module in eval mode and needs torch, safetensors and `components`, nothing else.
Nothing here is ever unpickled: resume states go through `torch.load(weights_only=True)`.
"""

import hashlib
import io
import json
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from components.config import Config
from components.data.image_set import ImageSet, Shape
from components.data.shards import MANIFEST, DataError, sha256, write_bytes, write_json
from components.models.classifiers import ClassifierConfig
from components.models.purifiers import Inference, Purifier, PurifierConfig

CONFIG, WEIGHTS = "config.json", "weights.safetensors"
STATES_KEPT = 2


class ModelCard(Config):
    """What `config.json` holds: enough to rebuild the network, and what it was made from."""

    format: Literal[1]
    family: Literal["classifier", "purifier"]
    model: dict[str, Any]
    shape: list[int]
    class_names: list[str]
    provenance: dict[str, Any]


def build(card: ModelCard) -> nn.Module:
    """Make the untrained network a card describes; ValueError if its config is not valid."""
    channels, height, width = card.shape
    shape: Shape = (channels, height, width)
    if card.family == "classifier":
        classifier = TypeAdapter(ClassifierConfig).validate_python(card.model)
        return classifier.build(shape, len(card.class_names))
    purifier = TypeAdapter(PurifierConfig).validate_python(card.model)
    return purifier.build(shape)


def save(folder: Path, module: nn.Module, card: ModelCard) -> None:
    """Write a model folder; equal weights and card give equal bytes."""
    tensors = {name: tensor.contiguous().cpu() for name, tensor in module.state_dict().items()}
    write_bytes(folder / WEIGHTS, save_tensors(tensors))
    write_json(folder / CONFIG, card.model_dump())
    files = [
        {"path": name, "size": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        for name in (CONFIG, WEIGHTS)
    ]
    write_json(folder / MANIFEST, {"files": files})


def load(folder: Path | str, device: str = "cpu") -> Any:
    """Return the network of a model folder, frozen, in eval mode, on `device`.

    Raises DataError for a folder that is incomplete or altered, or whose weights do not fit the
    network its config describes.
    """
    folder = Path(folder)
    card = read_card(folder)
    try:
        module = build(card)
    except (ValidationError, ValueError) as error:
        raise DataError(f"{folder / CONFIG} describes no network of ours: {error}") from None
    try:
        tensors = load_tensors((folder / WEIGHTS).read_bytes())
    except SafetensorError as error:
        raise DataError(f"{folder / WEIGHTS} is no file of safetensors: {error}") from None
    _fit_weights(module, tensors, folder)
    return module.eval().requires_grad_(False).to(device)


def load_purifier(
    folder: Path, device: str = "cpu", inference: Inference | None = None
) -> Purifier:
    """Return a purifier, or what `inference` makes of the network.

    Raises DataError when the folder holds something else, ValueError when `inference` does not
    fit it.
    """
    module = load(folder, device)
    if inference is not None:
        module = inference.wrap(module).eval()
    if not isinstance(module, Purifier):
        kind = read_card(folder).model["kind"]
        raise DataError(f"{folder} holds a {kind}, which is no purifier by itself")
    return module


def read_card(folder: Path) -> ModelCard:
    """Return the card of a model folder whose files are as they were written, else DataError."""
    try:
        listed = {
            file["path"]: file["sha256"]
            for file in json.loads((folder / MANIFEST).read_bytes())["files"]
        }
        if set(listed) != {CONFIG, WEIGHTS}:
            raise DataError(f"{folder / MANIFEST} must vouch for {CONFIG} and {WEIGHTS}")
        for name, digest in listed.items():
            if sha256(folder / name) != digest:
                raise DataError(f"{folder / name} was altered since it was written")
        return ModelCard.model_validate_json((folder / CONFIG).read_bytes())
    except DataError:
        raise
    except FileNotFoundError as error:
        lost = f"{error.filename} is missing"
        raise DataError(f"{folder} is no finished model folder: {lost}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder} is no model folder of this version: {error}") from None


def require_fit(folder: Path, data: ImageSet) -> None:
    """Raise ValueError where the model of a folder was made for other images or other classes."""
    card = read_card(folder)
    made, given = card.shape, list(data.shape)
    if made != given:
        raise ValueError(f"{folder} was made for images of {made}, but these are of {given}")
    if card.class_names != list(data.class_names):
        odd = [
            n
            for n in (*card.class_names, *data.class_names)
            if (n in card.class_names) != (n in data.class_names)
        ][:5]
        raise ValueError(
            f"{folder} knows {len(card.class_names)} classes, the images have "
            f"{len(data.class_names)}; they differ in {', '.join(odd) or 'their order'}"
        )


def fingerprint(folder: Path) -> str:
    """Return the sha256 over config and weights of a model folder, verified."""
    read_card(folder)
    return sha256(folder / MANIFEST)


def state_digest(module: nn.Module) -> str:
    """Return the sha256 of every parameter and buffer, to see that using them changed nothing."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def pack_state(state: Mapping[str, Any]) -> bytes:
    """Return a copy of a state as `save_state` takes it; training may go on meanwhile."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()


def save_state(folder: Path, epoch: int, packed: bytes) -> None:
    """Store the state after `epoch`, keeping the `STATES_KEPT` newest."""
    path = folder / f"epoch-{epoch:06d}"
    write_bytes(path / "state.pt", packed)
    write_json(path / MANIFEST, {"sha256": sha256(path / "state.pt")})
    for old in sorted(folder.glob("epoch-*"))[:-STATES_KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def latest_state(
    folder: Path, passed_over: Callable[[Path], None] = lambda _: None
) -> dict[str, Any] | None:
    """Return the newest stored state that is whole, or None.

    Damaged ones are passed over, and named; of one without its manifest the writing was broken off.
    """
    for path in sorted(folder.glob("epoch-*"), reverse=True):
        try:
            digest = json.loads((path / MANIFEST).read_bytes())["sha256"]
            if sha256(path / "state.pt") == digest:
                state: dict[str, Any] = torch.load(path / "state.pt", weights_only=True)
                return state
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError):
            pass
        if (path / MANIFEST).exists():
            passed_over(path)
    return None


def _fit_weights(module: nn.Module, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != found:
        odd = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)][:5]
        raise DataError(
            f"{folder / WEIGHTS} does not fit its config: "
            + "; ".join(f"{n}: config {wanted.get(n)}, weights {found.get(n)}" for n in odd)
        )
    module.load_state_dict(tensors)
