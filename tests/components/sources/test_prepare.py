"""Splits keep the class ratios, ids are stable, and unusable sources are refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from toys import random_bytes, same_images

from components.data.shards import DataError
from components.sources import DataConfig, Prepared, prepare
from components.sources.raw import (
    Progress,
    RawData,
    RawSplit,
    Reject,
    SourceConfig,
    complete,
    silent,
)

COMMON = {"val": 20, "test": 0, "train_limit": None, "test_limit": None, "max_reject_fraction": 0.0}


class Given(SourceConfig):
    """A source that holds what a test gives it."""

    raw: Any

    def load(self, scratch: Path, progress: Progress = silent) -> RawData:
        result: RawData = self.raw
        return result


def given(raw: RawData, **facts: Any) -> Prepared:
    return prepare(Given(**{**COMMON, "raw": raw, **facts}), 0, Path("unused"))


def split(count: int, seed: int = 0, classes: int = 4) -> RawSplit:
    return complete(random_bytes(count, (1, 3, 3), seed), np.arange(count) % classes)


NAMES = ("a", "b", "c", "d")
RAW = RawData(split(80), split(20, seed=1), NAMES)


def test_splits_and_limits_keep_the_ratios_of_the_classes() -> None:
    made = given(replace(RAW, test=None), val=12, test=20, train_limit=16, test_limit=8)
    for part, count in ((made.train, 4), (made.val, 3), (made.test, 2)):
        assert torch.bincount(part.labels).tolist() == [count] * 4
    assert len(set(torch.cat([made.train.ids, made.val.ids, made.test.ids]).tolist())) == 36
    more = given(replace(RAW, test=None), val=12, test=20, train_limit=32)
    assert set(made.train.ids.tolist()) <= set(more.train.ids.tolist())
    assert same_images(made.val, more.val)


def test_ids_are_positions_in_the_source_with_rejects_counted() -> None:
    reject = (Reject("train/x.png", 1, "is broken"),)
    rows = np.delete(np.arange(81), 1)
    train = replace(RAW.train, rows=rows, rejects=reject)
    made = given(replace(RAW, train=train), max_reject_fraction=0.02)
    assert made.rejects == reject
    assert made.test.ids.tolist() == list(range(81, 101))
    assert sorted(made.train.ids.tolist() + made.val.ids.tolist()) == rows.tolist()
    with pytest.raises(
        DataError, match=r"1 of 81 images of train .* train/x.png, row 1, is broken"
    ):
        given(replace(RAW, train=train), max_reject_fraction=0.01)


@pytest.mark.parametrize(
    ("raw", "facts", "error", "message"),
    [
        (RAW, {"test": 5}, ValueError, "the source has its own: it must be 0"),
        (replace(RAW, test=None), {"test": 0}, ValueError, "test is 0, but 1 to 79"),
        (RAW, {"val": 80}, ValueError, "val is 80, but 1 to 79 of the 80 images"),
        (RAW, {"val": 20, "train_limit": 61}, ValueError, "train_limit is 61, but there are 60"),
        (RAW, {"test_limit": 21}, ValueError, "test_limit is 21, but there are 20"),
        (RAW, {"train_limit": 3}, ValueError, "leave no image of d in train"),
        (replace(RAW, class_names=(*NAMES, "e")), {}, DataError, "no image of the class e"),
        (replace(RAW, class_names=NAMES[:3]), {}, DataError, "train, image 3: the label is 3"),
        (replace(RAW, test=split(0)), {}, DataError, "test has no images"),
        (
            replace(RAW, test=complete(random_bytes(4, (1, 3, 4), 0), np.arange(4))),
            {},
            DataError,
            "differ in shape",
        ),
    ],
)
def test_unusable_sources_and_impossible_splits_are_refused(
    raw: RawData, facts: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        given(raw, **facts)
    assert isinstance(caught.value, DataError) == (error is DataError)


def test_images_in_two_splits_are_reported_and_kept() -> None:
    test = split(20, seed=1)
    test.images[[2, 5, 7]] = RAW.train.images[[0, 0, 1]]
    made = given(replace(RAW, test=test), val=4)
    assert len(made.test) == 20
    assert any("images of test are byte for byte in" in text for text in made.warnings)
    assert sum(int(text.split()[0]) for text in made.warnings) == 3


def test_a_class_missing_in_a_small_split_is_reported() -> None:
    assert given(RAW, val=4, test_limit=2).warnings == ("test has no image of c, d",)


@pytest.mark.parametrize(
    "change",
    [{"val": 0}, {"val": 2.0}, {"val": "2"}, {"test": -1}, {"train_limit": 0}, {"vall": 1},
     {"max_reject_fraction": 1.5}, {"max_reject_fraction": float("nan")}, {"kind": "digit"},
     {"channels": 1}],
)  # fmt: skip
def test_impossible_settings_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(DataConfig).validate_python({"kind": "digits", **COMMON, "test": 9, **change})
