"""Shards return what was written or raise DataError; strata are cut in proportion."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from components.data import image_set, shards
from components.data.digests import digest
from components.data.image_set import ImageSet, stratified
from components.data.shards import DataError


def small_set(count: int = 25) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 4, 5), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % 3, torch.arange(count) * 7, ("a", "b", "c"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    image_set.write(tmp_path / "set", small_set(), rows_per_part=10)
    return tmp_path / "set"


def test_read_returns_what_was_written(folder: Path) -> None:
    written, read = small_set(), image_set.read(folder)
    assert torch.equal(read.images, written.images) and read.images.dtype == torch.uint8
    assert torch.equal(read.labels, written.labels) and torch.equal(read.ids, written.ids)
    assert read.class_names == written.class_names and read.shape == (3, 4, 5)
    assert read.pixels().max() <= 1
    assert shards.shard_rows(folder) == [range(10), range(10, 20), range(20, 25)]


def test_the_digest_is_that_of_images_labels_and_ids_in_any_order() -> None:
    data = small_set()
    same = replace(data, class_names=("0", "1", "2"))[torch.arange(len(data)).flip(0)]
    assert digest(same) == digest(data)
    images = data.images.clone()
    images[3, 0, 0, 0] ^= 1
    for other in (
        data[torch.arange(24)],
        replace(data, images=images),
        replace(data, labels=data.labels.flip(0)),
        replace(data, ids=data.ids + 1),
    ):
        assert digest(other) != digest(data)


@pytest.mark.parametrize(
    "rows",
    [
        range(10, 20),
        range(3, 4),
        range(8, 23),
        range(25),
        range(20, 99),
        range(7, 7),
        range(30, 40),
    ],
)
def test_some_rows_are_those_of_the_whole(folder: Path, rows: range) -> None:
    some, whole = image_set.read(folder, rows), small_set()
    expected = whole[torch.tensor([row for row in rows if row < len(whole)], dtype=torch.int64)]
    for name in ("images", "labels", "ids"):
        assert torch.equal(getattr(some, name), getattr(expected, name))
    assert some.class_names == whole.class_names and some.images.dtype == torch.uint8
    assert some.shape == whole.shape


def test_only_shards_with_some_of_the_rows_are_read_and_verified(folder: Path) -> None:
    (folder / shards.shard_name(1)).write_bytes(b"damaged")
    assert len(image_set.read(folder, range(10))) == len(image_set.read(folder, range(20, 25))) * 2
    for rows in (range(9, 11), range(19, 20), None):
        with pytest.raises(DataError, match=r"part-00001\.parquet was altered"):
            image_set.read(folder, rows)


def test_a_manifest_with_other_lengths_is_refused(folder: Path) -> None:
    """Rows are found by these lengths: with wrong ones, an image would stand for another."""
    manifest = shards.read_manifest(folder)
    manifest["files"][0]["rows"], manifest["files"][1]["rows"] = 9, 11
    shards.write_json(folder / shards.MANIFEST, manifest)
    with pytest.raises(DataError, match=r"disagree about part-00001\.parquet"):
        image_set.read(folder, range(10, 20))


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    image_set.write(tmp_path / "none", small_set()[torch.arange(0)], rows_per_part=10)
    with pytest.raises(DataError, match="contains no images"):
        image_set.read(tmp_path / "none")


def test_equal_images_give_equal_bytes(folder: Path, tmp_path: Path) -> None:
    image_set.write(tmp_path / "again", small_set(), rows_per_part=10)
    assert shards.fingerprint(folder) == shards.fingerprint(tmp_path / "again")
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_a_subset_is_written_in_its_order(tmp_path: Path) -> None:
    chosen = small_set()[torch.tensor([4, 2])]
    image_set.write(tmp_path / "set", chosen, rows_per_part=10)
    assert torch.equal(image_set.read(tmp_path / "set").images, chosen.images)


def test_every_flipped_bit_is_detected(folder: Path) -> None:
    shard = folder / shards.shard_name(1)
    content = shard.read_bytes()
    for bit in np.random.default_rng(0).integers(len(content) * 8, size=50):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << (bit % 8)
        shard.write_bytes(damaged)
        with pytest.raises(DataError, match=r"part-00001\.parquet was altered"):
            image_set.read(folder)
    shard.write_bytes(content)
    assert len(image_set.read(folder)) == 25


def test_page_checksums_detect_a_flipped_bit(folder: Path) -> None:
    """A bit that flipped before the manifest was written is detected by Parquet itself."""
    shard = folder / shards.shard_name(0)
    content = bytearray(shard.read_bytes())
    content[content.index(small_set().images[3].numpy().tobytes()[:16])] ^= 1
    shard.write_bytes(content)
    shards.write_manifest(folder, {"shape": [3, 4, 5], "class_names": ["a", "b", "c"]})
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        image_set.read(folder)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_truncated_shard_is_refused(folder: Path, length: int) -> None:
    shard = folder / shards.shard_name(2)
    shard.write_bytes(shard.read_bytes()[:length])
    with pytest.raises(DataError, match=r"part-00002\.parquet"):
        image_set.read(folder)


def test_a_missing_shard_is_refused(folder: Path) -> None:
    (folder / shards.shard_name(0)).unlink()
    with pytest.raises(DataError, match=r"disagree about part-00000\.parquet"):
        image_set.read(folder)


def test_an_extra_shard_is_refused(folder: Path) -> None:
    shutil.copy(folder / shards.shard_name(0), folder / shards.shard_name(9))
    with pytest.raises(DataError, match=r"disagree about part-00009\.parquet"):
        image_set.read(folder)


def test_a_shard_altered_with_equal_size_and_time_is_refused(folder: Path) -> None:
    shard = folder / shards.shard_name(0)
    before = shard.stat()
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    shard.write_bytes(content)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (shard.stat().st_size, shard.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(DataError, match="was altered"):
        image_set.read(folder)


def test_an_unfinished_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / shards.MANIFEST).unlink()
    with pytest.raises(DataError, match="never finished"):
        image_set.read(folder)
    with pytest.raises(DataError, match="missing"):
        shards.fingerprint(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": []}'])
def test_a_broken_manifest_is_refused(folder: Path, text: str) -> None:
    (folder / shards.MANIFEST).write_text(text)
    with pytest.raises(DataError):
        image_set.read(folder)


def test_another_schema_is_refused(folder: Path) -> None:
    shards.write_manifest(folder, {"shape": [3, 4, 6], "class_names": ["a", "b", "c"]})
    with pytest.raises(DataError, match="is needed"):
        image_set.read(folder)


def test_labels_outside_the_classes_are_refused(folder: Path) -> None:
    shards.write_manifest(folder, {"shape": [3, 4, 5], "class_names": ["a", "b"]})
    with pytest.raises(DataError, match=r"labels outside 0\.\.1"):
        image_set.read(folder)


def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    shards.write_bytes(path, b"old")

    def fail(*ignored: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="full"):
        shards.write_bytes(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_strata_are_in_proportion() -> None:
    labels = np.repeat(np.arange(4), [100, 50, 30, 20])
    for count in (0, 1, 17, 100, 199, 200):
        chosen = stratified(labels, count, seed=3)
        counts = np.bincount(labels[chosen], minlength=4)
        assert chosen.sum() == count
        assert np.abs(counts - np.array([100, 50, 30, 20]) * count / 200).max() < 1
    assert np.bincount(labels[stratified(labels, 100, 0)]).tolist() == [50, 25, 15, 10]


def test_strata_depend_only_on_labels_count_and_seed() -> None:
    labels = np.arange(90) % 3
    first = stratified(labels, 30, seed=1)
    assert np.array_equal(first, stratified(labels.copy(), 30, seed=1))
    assert not np.array_equal(first, stratified(labels, 30, seed=2))


def test_every_row_of_a_class_is_chosen_equally_often() -> None:
    labels = np.repeat([0, 1], [30, 10])
    frequency = np.mean([stratified(labels, 10, seed) for seed in range(2000)], axis=0)
    # Each row is taken with probability 1/4 or 0.3/0.2 by the largest remainder (7.5 and 2.5).
    assert np.abs(frequency[:30] - frequency[:30].mean()).max() < 0.06
    assert np.abs(frequency[30:] - frequency[30:].mean()).max() < 0.06


@pytest.mark.parametrize("count", [-1, 11])
def test_strata_larger_than_the_set_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"cannot choose {count} of 10 rows"):
        stratified(np.zeros(10, np.int64), count, seed=0)
