"""A folder of image files: `train/<class>/*.png`, and the same under `test` if it exists.

A class is a folder in `train`, and no symbolic link to one; an image is a file directly in it.
Hidden files are skipped; everything else is listed among the rejects.
"""

from pathlib import Path
from typing import Literal

from components.data.shards import DataError
from components.sources.images import ALL, MAX_BYTES, EncodedSource, SplitBuilder
from components.sources.raw import Progress, RawData, RawSplit, silent

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class ImageFolder(EncodedSource):
    """Image files in one folder per class; the sorted names of the folders are the classes."""

    kind: Literal["image_folder"]

    def load(self, scratch: Path, progress: Progress = silent) -> RawData:
        """Read `train` and, if it exists, `test`."""
        root = Path(self.path)
        if not (root / "train").is_dir():
            raise DataError(f"{root} has no folder `train` with one folder of images per class")
        names = classes_of(root / "train")
        train = self._read(root, "train", names, None)
        if not (root / "test").exists():
            return RawData(train, None, names)
        unknown = {path.name for path in _classes(root / "test")} - set(names)
        if unknown:
            raise DataError(
                f"{root / 'test'} has the class {min(unknown)}, which `train` does not have"
            )
        height, width = train.images.shape[2:]
        return RawData(train, self._read(root, "test", names, (height, width)), names)

    def _read(
        self, root: Path, split: str, names: tuple[str, ...], shape: tuple[int, int] | None
    ) -> RawSplit:
        builder = SplitBuilder(str(root / split), self, shape)
        for path in _entries(root / split):
            if path.name not in names or path.is_symlink():
                builder.reject(_name(root, path), None, "is not a folder of a class")
                continue
            images = _entries(path)
            if not images:
                raise DataError(f"{path} is empty, but every class needs images")
            for image in images:
                _add(builder, image, names.index(path.name), _name(root, image))
        return builder.build()


def read_classes(path: Path, names: tuple[str, ...]) -> RawSplit:
    """Read one folder that has a folder of images for each of some classes."""
    source = ImageFolder(**ALL, kind="image_folder", path=str(path))
    return source._read(path.parent, path.name, names, None)


def classes_of(path: Path) -> tuple[str, ...]:
    """Return the sorted names of the classes in a folder."""
    return tuple(one.name for one in _classes(path))


def _entries(folder: Path) -> list[Path]:
    """Return the sorted entries of a folder, without hidden ones."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error.strerror}") from None


def _classes(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.is_dir() and not path.is_symlink()]


def _name(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _add(builder: SplitBuilder, path: Path, label: int, name: str) -> None:
    if path.is_dir():
        return builder.reject(name, None, "is a folder inside a class and is not entered")
    if path.suffix.lower() not in SUFFIXES or not path.is_file():
        return builder.reject(name, None, f"is not a file named {', '.join(SUFFIXES)}")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        return builder.reject(name, None, f"cannot be read: {error.strerror}")
    builder.packed += len(content)
    builder.add(content, label, name)
