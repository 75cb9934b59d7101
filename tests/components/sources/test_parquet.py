"""Parquet files are read if they are sound; errors name the file and the row."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toys import png

from components.data.shards import DataError
from components.sources.parquet import ParquetFiles
from components.sources.raw import RawData

COMMON = {"val": 1, "test": 0, "train_limit": None, "test_limit": None, "max_reject_fraction": 0.5}


GOOD = [png(np.full((2, 3), value, np.uint8)) for value in range(6)]
LABELS = [0, 1, 2, 0, 1, 2]


def write(
    path: Path, images: Any = GOOD, labels: Any = LABELS, metadata: Any = None, **facts: Any
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": images, "label": labels}).replace_schema_metadata(metadata)
    pq.write_table(table, path, **facts)


def load_parquet(root: Path, **facts: Any) -> RawData:
    facts = {"path": str(root), "channels": 1, "size": None, **facts}
    return ParquetFiles.model_validate({"kind": "parquet", **COMMON, **facts}).load(root)


def structs(contents: list[bytes | None]) -> pa.Array:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.array([{"bytes": content, "path": "x.png"} for content in contents], kind)


@pytest.mark.parametrize("images", [GOOD, structs(list(GOOD)), pa.array(GOOD, pa.large_binary())])
@pytest.mark.parametrize("kind", [pa.int64(), pa.int8(), pa.uint8(), pa.uint64()])
def test_images_and_labels_are_read_in_order(tmp_path: Path, images: Any, kind: Any) -> None:
    write(tmp_path / "train.parquet", images, pa.array(LABELS, kind))
    raw = load_parquet(tmp_path)
    assert raw.train.images[:, 0, 0, 0].tolist() == list(range(6))
    assert raw.train.images.shape == (6, 1, 2, 3) and raw.train.labels.tolist() == LABELS
    assert raw.class_names == ("0", "1", "2") and raw.test is None
    assert load_parquet(tmp_path, size=[5, 4], channels=3).train.images.shape == (6, 3, 5, 4)


@pytest.mark.parametrize("form", ["{}.parquet", "{}-0000{}-of-00002.parquet", "{}/{}.parquet"])
def test_every_layout_is_found(tmp_path: Path, form: str) -> None:
    for split in ("train", "test"):
        for part in range(1 if form.count("{}") == 1 else 2):
            write(tmp_path / form.format(split, part), GOOD[3 * part :][:3], LABELS[:3])
    raw = load_parquet(tmp_path)
    assert raw.test is not None and len(raw.test.labels) == len(raw.train.labels)
    assert raw.train.images[:, 0, 0, 0].tolist() == list(range(len(raw.train.labels)))


def test_files_that_may_be_incomplete_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no train\.parquet"):
        load_parquet(tmp_path)
    write(tmp_path / "train-00000-of-00002.parquet")
    with pytest.raises(DataError, match="has 1 files of train, but their names say 2"):
        load_parquet(tmp_path)
    write(tmp_path / "train-00001-of-00002.parquet")
    write(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"has both train\.parquet and train-00000"):
        load_parquet(tmp_path)


def hugging_face(names: Any) -> dict[str, str]:
    return {"huggingface": json.dumps({"info": {"features": {"label": {"names": names}}}})}


@pytest.mark.parametrize(
    ("metadata", "names"),
    [
        ({"label_names": "cat,dog,eel"}, ("cat", "dog", "eel")),
        (hugging_face(["cat", "dog", "eel"]), ("cat", "dog", "eel")),
        ({"huggingface": "{"}, ("0", "1", "2")),
        ({"huggingface": '{"info": null}'}, ("0", "1", "2")),
        ({"other": "x"}, ("0", "1", "2")),
    ],
)
def test_class_names_come_from_the_metadata(tmp_path: Path, metadata: Any, names: Any) -> None:
    write(tmp_path / "train.parquet", metadata=metadata)
    assert load_parquet(tmp_path).class_names == names


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ({"label_names": "a,b,c"}, {"label_names": "a,c,b"}, "differ in their class names"),
        ({"label_names": "a,b,c"}, None, "differ in their class names"),
        ({"label_names": "a,b,b"}, {"label_names": "a,b,b"}, "needs a list of distinct names"),
        (hugging_face("abc"), hugging_face("abc"), "needs a list of distinct names"),
        ({"label_names": "a,b"}, {"label_names": "a,b"}, r"train\.parquet, row 2: the label is 2"),
    ],
)
def test_class_names_that_disagree_are_refused(
    tmp_path: Path, train: Any, test: Any, message: str
) -> None:
    write(tmp_path / "train.parquet", metadata=train)
    write(tmp_path / "test.parquet", metadata=test)
    with pytest.raises(DataError, match=message):
        load_parquet(tmp_path)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, -1, 0, 1, 2], "row 2: the label is -1, allowed is 0 or more"),
        ([0, 1, 2, 0, 1, -100], "row 5: the label is -100"),
        ([0, None, 2, 0, 1, 2], "row 1: the label is None"),
        ([0, 1, 2, 0, 1, 10**15], "has the label 1000000000000000 but only 6 images"),
        (pa.array([0, 1, 2, 0, 1, 2**64 - 1], pa.uint64()), "has the label 18446744073709551615"),
        ([0.0, 1.0, 2.0, 0.0, 1.0, 2.0], "label: an integer; it has image: binary, label: double"),
        (list("012012"), "label: string"),
        ([[0]] * 6, "label: list"),
    ],
)
def test_bad_labels_are_refused(tmp_path: Path, labels: Any, message: str) -> None:
    write(tmp_path / "train.parquet", labels=labels)
    with pytest.raises(DataError, match=message):
        load_parquet(tmp_path)


def test_labels_of_test_must_be_known_to_train(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet")
    write(tmp_path / "test.parquet", labels=[0, 1, 2, 3, 0, 1])
    with pytest.raises(DataError, match=r"test\.parquet, row 3: the label is 3, allowed is 0 to 2"):
        load_parquet(tmp_path)


class Strange(pa.ExtensionType):  # type: ignore[misc]
    """An extension type that the reader may or may not know."""

    def __init__(self) -> None:
        super().__init__(pa.binary(), "test.strange")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: Any, serialized: bytes) -> "Strange":
        return cls()


@pytest.mark.parametrize("known", [False, True])
def test_extension_types_are_refused(tmp_path: Path, known: bool) -> None:
    write(tmp_path / "train.parquet", pa.ExtensionArray.from_storage(Strange(), pa.array(GOOD)))
    if known:
        pa.register_extension_type(Strange())
    try:
        with pytest.raises(DataError, match="must have the columns"):
            load_parquet(tmp_path)
    finally:
        if known:
            pa.unregister_extension_type("test.strange")


@pytest.mark.parametrize(
    "images",
    [
        [[0.5, float("nan")]] * 6,
        np.arange(6.0),
        [list(content) for content in GOOD],
        ["text"] * 6,
        [{"path": "x.png"}] * 6,
        [{"bytes": "text", "path": "x.png"}] * 6,
    ],
)
def test_images_of_another_type_are_refused(tmp_path: Path, images: Any) -> None:
    write(tmp_path / "train.parquet", images)
    with pytest.raises(DataError, match=r"must have the columns image: .*; it has image: "):
        load_parquet(tmp_path)


def test_missing_and_repeated_columns_are_refused(tmp_path: Path) -> None:
    for table in (
        pa.table({"img": GOOD, "label": LABELS}),
        pa.table({"image": GOOD}),
        pa.Table.from_arrays([pa.array(GOOD), pa.array(LABELS), pa.array(LABELS)],
                             names=["image", "label", "label"]),
    ):  # fmt: skip
        pq.write_table(table, tmp_path / "train.parquet")
        with pytest.raises(DataError, match="must have the columns"):
            load_parquet(tmp_path)


@pytest.mark.parametrize("images", [structs([*GOOD[:4], None, GOOD[5]]), [*GOOD[:4], None, b""]])
def test_nulls_are_refused_with_their_row(tmp_path: Path, images: Any) -> None:
    write(tmp_path / "train.parquet", images)
    with pytest.raises(DataError, match=r"train\.parquet, row 4: the image has no bytes"):
        load_parquet(tmp_path)


def test_a_null_struct_is_refused_with_its_row(tmp_path: Path) -> None:
    images = structs(list(GOOD)).to_pylist()
    images[1] = None
    write(tmp_path / "train.parquet", images)
    with pytest.raises(DataError, match="row 1: the image has no bytes"):
        load_parquet(tmp_path)


def test_single_bad_images_are_rejects(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [GOOD[0], b"text", GOOD[2], b"", *GOOD[4:]])
    raw = load_parquet(tmp_path)
    assert [(r.file, r.row) for r in raw.train.rejects] == [
        ("train.parquet", 1),
        ("train.parquet", 3),
    ]
    assert raw.train.rows.tolist() == [0, 2, 4, 5] and raw.train.labels.tolist() == [0, 2, 1, 2]


def test_other_columns_are_not_read(tmp_path: Path) -> None:
    table = pa.table({"image": GOOD, "label": LABELS, "extra": [b"x" * 50] * 6})
    pq.write_table(table, tmp_path / "train.parquet", compression="none", use_dictionary=False)
    content = (tmp_path / "train.parquet").read_bytes()
    (tmp_path / "train.parquet").write_bytes(content.replace(b"x" * 50, b"y" * 50))
    assert load_parquet(tmp_path).train.labels.tolist() == LABELS


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    write(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 50):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"train\.parquet cannot be read as Parquet"):
            load_parquet(tmp_path)


def test_flipped_bits_are_found_where_pages_carry_checksums(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    write(path, write_page_checksum=True, use_dictionary=False, compression="none")
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[whole.index(GOOD[2]) + 20] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"train\.parquet is damaged in or after row 0"):
        load_parquet(tmp_path)
