"""Model folders, and the states that a training resumes from.

A model folder holds `config.json` (what to build, and provenance; no times, no run ids),
`weights.safetensors` and `manifest.json` (size and sha256 of both, written last). A network that a
user wrote has its files in `code/` too, which run where the folder is loaded. `load` returns a
module in eval mode; it needs torch, safetensors and `components` only. Nothing is ever unpickled:
states are read by `torch.load(weights_only=True)`.
"""

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

from components import plugins
from components.config import Config
from components.data.image_set import ImageSet, Shape
from components.data.shards import MANIFEST, DataError, sha256, write_bytes, write_json
from components.models import classifiers, purifiers
from components.models.external import External, read_code, write_code
from components.models.given import Given
from components.models.purifiers import Inference, Purifier, PurifierSection

CONFIG, WEIGHTS, CODE = "config.json", "weights.safetensors", "code"
GIVEN, EXTERNAL = "given", "external"
# A second state, in case the newest is damaged.
STATES_KEPT = 2


class ModelCard(Config):
    """The content of `config.json`: how to build the network, and its provenance."""

    format: Literal[1]
    family: Literal["classifier", "purifier"]
    model: dict[str, Any]
    shape: list[int]
    class_names: list[str]
    provenance: dict[str, Any]


def build(card: ModelCard, folder: Path | None = None) -> nn.Module:
    """Make the untrained network of a card; raise ValueError if its config is not valid.

    `folder` is the model folder: a network that a user wrote has its code there.
    """
    channels, height, width = card.shape
    shape: Shape = (channels, height, width)
    if card.model.get("kind") == GIVEN:
        return Given.model_validate(card.model).build()
    if card.model.get("kind") == EXTERNAL:
        code = read_code((folder or Path()) / CODE)
        # As JSON, in which a pair is a list.
        return External.model_validate_json(json.dumps(card.model)).build(code, card.family)
    # The unions are those of the modules: plugins are loaded when they are first asked for.
    if card.family == "classifier":
        classifier = TypeAdapter(classifiers.ClassifierConfig).validate_python(card.model)
        return classifier.build(shape, len(card.class_names))
    purifier = TypeAdapter(purifiers.PurifierConfig).validate_python(card.model)
    return purifier.build(shape)


def save(
    folder: Path, module: nn.Module, card: ModelCard, code: Mapping[str, bytes] | None = None
) -> None:
    """Write a model folder; equal weights, cards and `code` (files by path) give equal bytes."""
    # Cloned: tensors that share their memory cannot be stored.
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in module.state_dict().items()
    }
    write_bytes(folder / WEIGHTS, save_tensors(tensors))
    write_json(folder / CONFIG, card.model_dump())
    write_code(folder / CODE, code or {})
    files = [
        {"path": name, "size": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        for name in (CONFIG, WEIGHTS, *(f"{CODE}/{file}" for file in sorted(code or {})))
    ]
    write_json(folder / MANIFEST, {"files": files})


def load(folder: Path | str, device: str = "cpu") -> Any:
    """Return the network of a model folder, frozen, in eval mode, on `device`.

    Raises DataError if the folder is incomplete or altered, its weights do not fit its config, or
    its plugin is not installed as it was when the folder was written.
    """
    folder = Path(folder)
    card = read_card(folder)
    try:
        module = build(card, folder)
    except ValidationError as error:
        raise _refusal(folder, error) from None
    except ValueError as error:
        raise DataError(f"{folder / CONFIG} describes no valid network: {error}") from None
    try:
        tensors = load_tensors((folder / WEIGHTS).read_bytes())
    except SafetensorError as error:
        raise DataError(f"{folder / WEIGHTS} is not a safetensors file: {error}") from None
    _load_weights(module, tensors, folder)
    return module.eval().requires_grad_(False).to(device)


def load_purifier(
    folder: Path, device: str = "cpu", inference: Inference | None = None
) -> Purifier:
    """Return the purifier of a model folder, or the purifier that `inference` makes of its network.

    Raises DataError if the folder holds no purifier, ValueError if `inference` does not fit it.
    """
    module = load(folder, device)
    if inference is not None:
        module = inference.wrap(module).eval()
    if not isinstance(module, Purifier):
        kind = read_card(folder).model["kind"]
        raise DataError(f"{folder} holds a {kind}, which is no purifier by itself")
    return module


def read_section(folder: Path) -> PurifierSection:
    """Return the section of the network in a purifier's folder; DataError as in `load`."""
    try:
        section: PurifierSection = TypeAdapter(purifiers.PurifierConfig).validate_python(
            read_card(folder).model
        )
    except ValidationError as error:
        raise _refusal(folder, error) from None
    return section


def read_card(folder: Path) -> ModelCard:
    """Return the card of a model folder; raise DataError if the folder is not as it was written."""
    try:
        listed = {
            file["path"]: file["sha256"]
            for file in json.loads((folder / MANIFEST).read_bytes())["files"]
        }
        code = {f"{CODE}/{file.relative_to(folder / CODE)}" for file in _code_of(folder)}
        if set(listed) != {CONFIG, WEIGHTS} | code:
            raise DataError(
                f"{folder / MANIFEST} must list {CONFIG}, {WEIGHTS} and what is in {CODE}, and "
                "only these"
            )
        for name, digest in listed.items():
            if sha256(folder / name) != digest:
                raise DataError(f"{folder / name} was altered since it was written")
        return ModelCard.model_validate_json((folder / CONFIG).read_bytes())
    except DataError:
        raise
    except FileNotFoundError as error:
        missing = f"{error.filename} is missing"
        raise DataError(f"{folder} is no finished model folder: {missing}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder} is no model folder of this version: {error}") from None


def _code_of(folder: Path) -> list[Path]:
    return [path for path in (folder / CODE).rglob("*") if path.is_file()]


def require_fit(folder: Path, data: ImageSet) -> None:
    """Raise ValueError if the model of a folder has another image shape or other classes."""
    card = read_card(folder)
    expected, given = card.shape, list(data.shape)
    if expected != given:
        raise ValueError(
            f"{folder} was trained on images of shape {expected}, but these have shape {given}"
        )
    if card.class_names != list(data.class_names):
        different = [
            name
            for name in (*card.class_names, *data.class_names)
            if (name in card.class_names) != (name in data.class_names)
        ][:5]
        raise ValueError(
            f"{folder} has {len(card.class_names)} classes, the images have "
            f"{len(data.class_names)}; they differ in {', '.join(different) or 'their order'}"
        )


def fingerprint(folder: Path) -> str:
    """Verify a model folder and return the sha256 of its manifest, which covers its other files."""
    read_card(folder)
    return sha256(folder / MANIFEST)


def pack_state(state: Mapping[str, Any]) -> bytes:
    """Return a copy of a state as bytes for `save_state`; training may go on meanwhile."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()


def save_state(folder: Path, epoch: int, packed: bytes) -> None:
    """Write the state after `epoch` and keep only the `STATES_KEPT` newest states."""
    path = folder / f"epoch-{epoch:06d}"
    write_bytes(path / "state.pt", packed)
    write_json(path / MANIFEST, {"sha256": sha256(path / "state.pt")})
    for old in sorted(folder.glob("epoch-*"))[:-STATES_KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def latest_state(
    folder: Path, on_damaged: Callable[[Path], None] = lambda _: None
) -> dict[str, Any] | None:
    """Return the newest state that is intact, or None.

    A damaged state is skipped and reported to `on_damaged`. A state without a manifest is skipped
    silently: its writing was interrupted.
    """
    for path in sorted(folder.glob("epoch-*"), reverse=True):
        try:
            digest = json.loads((path / MANIFEST).read_bytes())["sha256"]
            if sha256(path / "state.pt") == digest:
                # The device that wrote it may not be here.
                state: dict[str, Any] = torch.load(
                    path / "state.pt", map_location="cpu", weights_only=True
                )
                return state
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError):
            pass
        if (path / MANIFEST).exists():
            on_damaged(path)
    return None


def _refusal(folder: Path, error: ValidationError) -> DataError:
    """Return the error for a section that cannot be built here: one sentence."""
    first, message = plugins.in_words(error)
    if first["type"] == plugins.OTHER:
        return DataError(
            f"{folder / CONFIG}: the plugin of its network {message}: install the one that it "
            "names, or train the network again"
        )
    kind = read_card(folder).model.get("kind")
    # The tag of a union is no key.
    where = ".".join(str(part) for part in first["loc"] if part != kind)
    return DataError(
        f"{folder / CONFIG} describes no valid network: {where + ': ' if where else ''}{message}"
    )


def _load_weights(module: nn.Module, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != found:
        names = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)][:5]
        raise DataError(
            f"{folder / WEIGHTS} does not fit its config: "
            + "; ".join(f"{n}: config {wanted.get(n)}, weights {found.get(n)}" for n in names)
        )
    module.load_state_dict(tensors)
