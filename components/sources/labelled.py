"""Labelled images that somebody has on disk, all of them: nothing is cut, and none is left out."""

from pathlib import Path

import torch

from components.data import image_set
from components.data.image_set import ImageSet
from components.data.shards import MANIFEST, DataError
from components.sources.folder import classes_of, read_classes
from components.sources.parquet import files_of, read_files
from components.sources.raw import RawSplit

# Files of one of these splits are no images of another.
SPLITS = ("train", "val", "validation", "test")
# How others spell a split.
ALSO = {"val": "validation"}


def read_labelled(path: Path, split: str) -> ImageSet:
    """Return the images of `path`, a folder or a Parquet file.

    A folder is one that `image_set.write` wrote; or it has Parquet files (`ParquetFiles`), or a
    folder of image files for each class (`ImageFolder`). One that holds several splits has them
    under their names, and `split` is read, with the classes of `train`. Ids are those of the
    folder, else positions in it. Raises DataError for anything else, and for an image that cannot
    be used.
    """
    path = path.absolute()
    if not path.exists():
        raise DataError(f"{path} is not there; name a folder of labelled images or a Parquet file")
    for folder in (path, path / split):
        if (folder / MANIFEST).is_file():
            return image_set.read(folder)
    if path.is_file() and path.suffix != ".parquet":
        raise DataError(f"{path} is no .parquet file; name one, or a folder of labelled images")
    if path.is_file():
        files = [path]
    else:
        files = files_of(path, split) or files_of(path, ALSO.get(split, split))
    if not files and not (path / split).is_dir():
        others = [name for name in SPLITS if not name.startswith(split)]
        others = [name for name in others if files_of(path, name)]
        if others or (path / "train").is_dir():
            raise DataError(
                f"{path} has a split `{(others or ['train'])[0]}` and none called `{split}`; name "
                "a folder"
            )
        files = sorted(path.glob("*.parquet"))
    if files:
        return _whole(path, *read_files(files))
    folder = path / split if (path / split).is_dir() else path
    names = classes_of(path / "train" if (path / "train").is_dir() else folder)
    if not names:
        raise DataError(
            f"{folder} has neither Parquet files nor a folder of images for each class, so no "
            "image has a label"
        )
    return _whole(folder, read_classes(folder, names), names)


def _whole(path: Path, raw: RawSplit, names: tuple[str, ...]) -> ImageSet:
    if raw.rejects:
        first = raw.rejects[0]
        where = first.file if first.row is None else f"{first.file}, row {first.row}"
        raise DataError(
            f"{len(raw.rejects)} of {raw.seen} images of {path} cannot be used, and each is "
            f"needed; the first, {where}, {first.reason}"
        )
    return ImageSet(
        torch.from_numpy(raw.images.copy()),
        torch.from_numpy(raw.labels),
        torch.from_numpy(raw.rows),
        names,
    )
