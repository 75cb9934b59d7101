"""All labelled images of a folder, whatever its form; adversarial images of one Parquet file."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from toys import png

from components.data import image_set
from components.data.image_set import ImageSet
from components.data.shards import DataError
from components.sources.examples import read_examples
from components.sources.labelled import read_labelled

SHAPE = (1, 2, 3)
LEVELS = np.arange(6, dtype=np.uint8)
PICTURES = [png(np.full(SHAPE[1:], level, np.uint8)) for level in LEVELS]


def folders(root: Path, *classes: str) -> Path:
    """Write two images into a folder for each class; their grey is their number."""
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in (0, 1):
            (root / name / f"{index}.png").write_bytes(PICTURES[2 * number + index])
    return root


def parquet(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": PICTURES, "label": [0, 1, 2, 0, 1, 2], **columns}), path)
    return path


def grey(data: ImageSet) -> list[int]:
    return data.images[:, 0, 0, 0].tolist()


def test_a_folder_that_was_prepared_keeps_its_ids(tmp_path: Path) -> None:
    data = ImageSet(
        torch.zeros(4, *SHAPE).byte(), torch.arange(4) % 2, torch.arange(4) + 9, ("a", "b")
    )
    image_set.write(tmp_path / "data/test", data, 3)
    image_set.write(tmp_path / "data/val", data[torch.arange(2)], 3)
    for path in (tmp_path / "data/test", tmp_path / "data"):
        assert read_labelled(path, "test").ids.tolist() == [9, 10, 11, 12]
    assert len(read_labelled(tmp_path / "data", "val")) == 2


def test_folders_of_classes_are_read_in_order(tmp_path: Path) -> None:
    found = read_labelled(folders(tmp_path / "mine", "cat", "dog", "eel"), "test")
    assert grey(found) == list(range(6)) == found.ids.tolist()
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert found.class_names == ("cat", "dog", "eel") and found.shape == SHAPE


def test_a_test_split_has_the_classes_of_its_training_images(tmp_path: Path) -> None:
    folders(tmp_path / "train", "cat", "dog", "eel")
    folders(tmp_path / "test", "cat", "dog", "eel")
    (tmp_path / "train/ant").mkdir()
    (tmp_path / "test/ant").mkdir()
    (tmp_path / "test/ant/0.png").write_bytes(PICTURES[0])
    found = read_labelled(tmp_path, "test")
    assert found.class_names == ("ant", "cat", "dog", "eel")
    assert found.labels.tolist() == [0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("name", ["any.parquet", "test.parquet", "test-00000-of-00001.parquet"])
def test_parquet_files_are_read_in_order(name: str, tmp_path: Path) -> None:
    path = parquet(tmp_path / "mine" / name)
    for given in (path, path.parent):
        found = read_labelled(given, "test")
        assert grey(found) == list(range(6)) == found.ids.tolist()
        assert found.labels.tolist() == [0, 1, 2, 0, 1, 2] and len(found.class_names) == 3


def test_the_files_of_the_split_are_read_and_no_others(tmp_path: Path) -> None:
    parquet(tmp_path / "train.parquet", label=[0] * 6)
    with pytest.raises(DataError, match="has a split `train` and none called `test`"):
        read_labelled(tmp_path, "test")
    parquet(tmp_path / "test.parquet")
    assert read_labelled(tmp_path, "test").labels.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("name", "split"),
    [("val", "test"), ("validation-00000-of-00001", "test"), ("train", "val"), ("test", "val")],
)
def test_files_of_another_split_are_none_of_this_one(name: str, split: str, tmp_path: Path) -> None:
    parquet(tmp_path / f"{name}.parquet")
    other = name.partition("-")[0]
    with pytest.raises(DataError, match=f"has a split `{other}` and none called `{split}`"):
        read_labelled(tmp_path, split)
    assert len(read_labelled(tmp_path / f"{name}.parquet", split)) == 6
    assert other != "validation" or len(read_labelled(tmp_path, "val")) == 6


def test_validation_files_are_val_beside_others(tmp_path: Path) -> None:
    for name in ("test-0", "validation-0"):
        parquet(tmp_path / f"{name}.parquet")
    assert len(read_labelled(tmp_path, "val")) == 6


def _reject(root: Path) -> None:
    folders(root, "cat")
    (root / "cat/notes.txt").write_text("mine")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda root: None, "is not there; name a folder of labelled images or a Parquet file"),
        (lambda root: root.mkdir(), "neither Parquet files nor a folder of images for each class"),
        (lambda root: folders(root / "train", "cat"), "has a split `train` and none called `test`"),
        (lambda root: root.write_text("mine"), "is no .parquet file; name one, or a folder"),
        (_reject, "1 of 3 images of .* cannot be used, and each is needed; the first, .*notes.txt"),
        (lambda root: parquet(root / "a.parquet", label=["a"] * 6), "label: an integer; it has"),
        (lambda root: folders(root, "cat", "dog") and (root / "eel").mkdir(), "eel is empty, but"),
    ],
)
def test_what_has_no_labels_is_refused(make: Any, sentence: str, tmp_path: Path) -> None:
    make(tmp_path / "mine")
    with pytest.raises(DataError, match=sentence) as caught:
        read_labelled(tmp_path / "mine", "test")
    assert "\n" not in str(caught.value)


# Adversarial images

FLOATS = (np.random.default_rng(0).random((6, *SHAPE))).astype(np.float32)
BYTES = (255 * FLOATS).round().astype(np.uint8)
FORMS: list[tuple[Any, Any]] = [
    ([one.tobytes() for one in FLOATS], FLOATS),
    ([one.tobytes() for one in BYTES], BYTES / np.float32(255)),
    (pa.array([one.tobytes() for one in FLOATS], pa.binary(24)), FLOATS),
    (pa.array([one.tobytes() for one in BYTES], pa.binary(6)), BYTES / np.float32(255)),
    (pa.array([one.ravel() for one in FLOATS], pa.list_(pa.float32())), FLOATS),
    ([one.ravel().astype(np.float64) for one in FLOATS], FLOATS),
    (pa.array([one.ravel() for one in BYTES], pa.list_(pa.uint8(), 6)), BYTES / np.float32(255)),
    ([png(one[0]) for one in BYTES], BYTES / np.float32(255)),
    ([{"bytes": png(one[0])} for one in BYTES], BYTES / np.float32(255)),
]


@pytest.mark.parametrize(("column", "expected"), FORMS)
def test_examples_are_read_as_they_are_stored(column: Any, expected: Any, tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": column, "id": [5, 4, 3, 2, 1, 0]}), tmp_path / "a.parquet")
    ids, images = read_examples(tmp_path / "a.parquet", SHAPE, 6)
    assert ids is not None and ids.tolist() == [5, 4, 3, 2, 1, 0]
    assert images.dtype == torch.float32 and images.shape == (6, *SHAPE)
    assert np.array_equal(images.numpy(), expected)
    pq.write_table(pa.table({"image": column}), tmp_path / "a.parquet")
    assert read_examples(tmp_path / "a.parquet", SHAPE, 9)[0] is None


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"picture": PICTURES}, "has the columns picture, and none called image"),
        ({"image": PICTURES * 2}, "has 12 images, and there are 6 test images"),
        (
            {"image": [b"abc"] * 6},
            r"an image of 3 bytes, which .* \(1, 2, 3\) are 6 bytes \(uint8\)",
        ),
        ({"image": [[0.5] * 5] * 6}, "has lists of 5 values double; images are"),
        ({"image": [["a"] * 6] * 6}, "has lists of 6 values string; images are"),
        ({"image": [1, 2]}, "has images of type int64; give bytes, or lists of numbers"),
        ({"image": [None, PICTURES[0]]}, "has rows without a value"),
        ({"image": [png(np.zeros((3, 3), np.uint8))]}, r"has images \(1, 3, 3\), and the test"),
        ({"image": pa.array([], pa.binary())}, "has no images"),
        ({"image": PICTURES, "id": [*"abcdef"]}, "a column id of type string; ids are the integ"),
        ({"image": PICTURES, "id": [0.0] * 6}, "a column id of type double; ids are the integers"),
    ],
)
def test_examples_that_are_none_are_refused(columns: Any, sentence: str, tmp_path: Path) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=sentence) as caught:
        read_examples(tmp_path / "a.parquet", SHAPE, 6)
    assert "\n" not in str(caught.value)


def test_a_file_of_examples_that_is_none_or_unpacks_to_much_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("mine")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_examples(tmp_path / "a.parquet", SHAPE, 6)
    pq.write_table(pa.table({"image": [bytes(20_000_000)]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="bytes, too many for the test images"):
        read_examples(tmp_path / "a.parquet", SHAPE, 6)
