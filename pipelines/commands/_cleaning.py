"""Image files become what a trained purifier makes of them: `limpid purify` with its options."""

import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from components.data.shards import DataError, write_bytes
from components.models.checkpoints import CODE, EXTERNAL, build, load, read_card
from components.models.purifiers import Inference, Purifier
from components.models.purifiers.contract import mean_squared_error
from components.sources.folder import SUFFIXES
from components.sources.images import MAX_BYTES, decode
from pipelines.config import schema
from pipelines.errors import ConfigError, Failed
from pipelines.layout import MODELS, PARAMS
from pipelines.runner.console import ConsoleProgress

SIDE_BY_SIDE = "side-by-side"
GAP = 2


def clean(
    model: Path | None, defense: str | None, images: Sequence[Path], out: Path, side_by_side: bool
) -> None:
    """Clean image files, or all of a folder, into `out`.

    The purifier is that of a model folder, or that of a defense in params.yaml. Raises where it, an
    image or a folder cannot be used.
    """
    inference = None
    if defense is not None:
        model, inference = _defense(defense)
    assert model is not None
    purifier = Model(model, inference)
    targets = _targets(_files(images), out)
    _clean_all(purifier, targets, out if side_by_side else None)


def require_no_code(folder: Path) -> None:
    """Raise ConfigError where loading a model folder would run code that lies in it."""
    if read_card(folder).model.get("kind") == EXTERNAL:
        raise ConfigError(
            f"{folder} holds code, which runs when it is loaded; read {folder / CODE}, and say "
            "--trust-code if you trust it"
        )


class Model:
    """A trained purifier, rebuilt for the size of each image where its weights allow that."""

    def __init__(self, folder: Path, inference: Inference | None) -> None:
        self.folder, self.inference, self.card = folder, inference, read_card(folder)
        network, kind = load(folder), self.card.model["kind"]
        if inference is not None:
            inference.wrap(network)  # Raises now if it does not fit.
        elif not isinstance(network, Purifier):
            raise DataError(
                f"{folder} holds a {kind}, which is no purifier by itself; --defense NAME takes a "
                f"network with its inference from {PARAMS}"
            )
        self.weights, self.channels = network.state_dict(), self.card.shape[0]
        if self.channels not in (1, 3):
            raise DataError(f"{folder} takes {self.channels} channels, image files have 1 or 3")
        # The images of one folder mostly have one size.
        self.fitted = lru_cache(maxsize=4)(self._fitted)

    def _fitted(self, height: int, width: int) -> Purifier:
        """Return the purifier for images of a size; raise DataError where it takes no such size."""
        given, taken = f"{height} x {width}", " x ".join(map(str, self.card.shape[1:]))
        kind = self.card.model["kind"]
        try:
            network = build(
                self.card.model_copy(update={"shape": [self.channels, height, width]}), self.folder
            )
            network.load_state_dict(self.weights)
        except ValueError as error:
            raise DataError(f"is {given}, but {error}") from None
        except RuntimeError:  # What torch raises for weights of another shape.
            raise DataError(f"is {given}, but this {kind} takes {taken} alone") from None
        purifier = network if self.inference is None else self.inference.wrap(network)
        assert isinstance(purifier, Purifier)
        return purifier.eval().requires_grad_(False)


def _defense(name: str) -> tuple[Path, Inference | None]:
    """Return the model folder and the inference of a defense in params.yaml."""
    defenses = schema.load().defenses
    if name not in defenses:
        raise ConfigError(
            f"{PARAMS} has no defense {name}; there are {', '.join(defenses) or 'none'}"
        )
    return MODELS / defenses[name].model, defenses[name].inference


def _files(given: Sequence[Path]) -> list[Path]:
    """Return the files to clean, each once; of a folder, the images directly in it."""
    files: dict[Path, Path] = {}
    for path in given:
        inside = [path]
        if path.is_dir():
            inside = sorted(
                file
                for file in path.iterdir()
                if file.suffix.lower() in SUFFIXES and file.is_file() and file.name[0] != "."
            )
            if not inside:
                raise ValueError(f"{path} holds no file named {', '.join(SUFFIXES)}")
        for file in inside:
            files.setdefault(file.resolve(), file)
    return list(files.values())


def _targets(files: Sequence[Path], out: Path) -> dict[Path, Path]:
    """Return the source of each target; raise ValueError where a file would be overwritten."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is not a folder")
    if {out.resolve(), (out / SIDE_BY_SIDE).resolve()} & {file.resolve().parent for file in files}:
        raise ValueError(f"--out {out} holds images that are to be cleaned: give another folder")
    targets: dict[Path, Path] = {}
    for file in files:
        target = out / f"{file.stem}.png"
        if target in targets:
            raise ValueError(
                f"{targets[target]} and {file} would both become {target}: "
                "clean them into two folders"
            )
        targets[target] = file
    return targets


def _clean_all(model: Model, targets: dict[Path, Path], out: Path | None) -> None:
    """Clean every file, then raise Failed if some could not be.

    With `out`, images side by side with their purified ones are written there.
    """
    progress = ConsoleProgress("purify")
    errors: list[float] = []
    failed: dict[Path, str] = {}
    try:
        for target, file in targets.items():
            try:
                x, purified = _clean(model, file)
            except DataError as error:
                failed[file] = str(error)
            else:
                write_bytes(target, _png(purified))
                if out is not None:
                    gap = torch.ones(*x.shape[:2], GAP)
                    picture = _png(torch.cat([x, gap, purified], dim=2))
                    write_bytes(out / SIDE_BY_SIDE / target.name, picture)
                errors.append(mean_squared_error(x[None], purified[None]).item())
            progress.advance(len(errors) + len(failed), len(targets), "images")
    finally:
        progress.close()
    if errors:
        mean = sum(errors) / len(errors)
        print(f"{len(errors)} images cleaned, mean reconstruction error {mean:.3g}")
    if failed:
        listed = "".join(f"\n  {file} {reason}" for file, reason in failed.items())
        raise Failed(3, f"{len(failed)} of {len(targets)} images could not be cleaned:{listed}")


def _clean(model: Model, file: Path) -> tuple[Tensor, Tensor]:
    """Return an image and its purified one (C,H,W) in [0,1]; raise DataError with the reason."""
    if not file.is_file():
        raise DataError("is not a file" if file.exists() else "does not exist")
    try:
        with file.open("rb") as content:
            pixels = decode(content.read(MAX_BYTES + 1), model.channels, None)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}") from None
    if isinstance(pixels, str):
        raise DataError(pixels)
    x = torch.tensor(pixels).float() / 255
    purifier = model.fitted(*x.shape[1:])
    try:
        with torch.no_grad():
            purified: Tensor = purifier(x[None])[0]
    except RuntimeError as error:  # What torch raises for too little memory, too.
        reason = str(error).splitlines()[0]
        raise DataError(f"is {x.shape[1]} x {x.shape[2]}, which failed: {reason}") from None
    if not purified.isfinite().all():
        raise DataError("becomes an image with values that are no numbers")
    return x, purified


def _png(image: Tensor) -> bytes:
    """Return an image (C,H,W) in [0,1] as 8-bit PNG."""
    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return file.getvalue()
