"""A part of the test set costs the same however many there are, and sets are checked whole."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, cast

import pytest
import torch
from small_scoring import (
    PGD,
    RUNGS,
    THREAT,
    Alone,
    N,
    made,
    rewrite,
    scored_together,
    sound_sets,
)
from torch import Tensor
from toys import failed

from components.attacks import Crafted, craft
from components.attacks.a3 import A3
from components.attacks.sets import read_crafted
from components.config import Config
from components.data import image_set, shards
from components.data.draws import NoiseStream
from components.data.shards import DataError, shard_name, shard_rows
from components.models.purifiers import Purifier
from components.models.purifiers.controls import Identity
from pipelines.runner.context import Context
from pipelines.stages.evaluate import count_all
from pipelines.tasks.crafting import SetSpec, craft_all
from pipelines.tasks.entries import Entry, Plan
from pipelines.tasks.ladders import _stored
from pipelines.tasks.scoring import score_sets, score_shard

IDENTITY = Identity(kind="identity")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[Path]]:
    """Count how often every shard is read."""
    counted: Counter[Path] = Counter()
    read = shards._read_shard

    def counting(path: Path, *rest: Any) -> Any:
        counted[path] += 1
        return read(path, *rest)

    monkeypatch.setattr(shards, "_read_shard", counting)
    return counted


def in_parts(root: Path, rows: int) -> tuple[Entry, Plan]:
    """Make a control whose test set and sets have shards of `rows` images, tried as a baseline."""
    entry, plan = made(root, IDENTITY, rows)
    for folder in entry.sets.values():
        rewrite(folder, read_crafted(folder), rows)
    classifier = root / "copy"
    classifier.symlink_to(root / "model")
    other = replace(entry.subject, classifier=classifier)
    return entry, replace(plan, baselines=[replace(entry, name="other", subject=other)])


def test_no_shard_is_read_more_often_because_there_are_more_of_them(
    tmp_path: Path, reads: Counter[Path]
) -> None:
    most = {}
    for rows in (6, 2):
        entry, plan = in_parts(tmp_path / str(rows), rows)
        reads.clear()
        (result,) = scored_together([entry], plan)
        assert set(result.transferred) == {"other"}
        for name, folder in {"test": plan.test, **entry.sets}.items():
            counted = {reads[folder / shard_name(part)] for part in range(N // rows)}
            assert len(counted) == 1, "every part costs the same"
            most[rows, name] = counted.pop()
        assert reads[plan.val / shard_name(0)] <= 4, "a part reads its own validation images"
    # Two sets of two entries are checked; a part is scored twice, and some images are timed.
    assert most[6, "test"] == most[2, "test"] == 4 + 2 + 1
    # Checked for two entries, and scored twice; one set is tried as that of another baseline, too.
    assert most[6, RUNGS[0]] == most[2, RUNGS[0]] == 2 + 2 + 1
    assert most[6, RUNGS[1]] == most[2, RUNGS[1]] == 2 + 2


class Alert(Purifier):
    """Notes that it was asked."""

    asked: ClassVar[list[int]] = []

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        self.asked.append(len(x))
        return x


class Alerts(Config):
    kind: Literal["alerts"]

    def build(self, shape: tuple[int, int, int]) -> Purifier:
        return Alert()


def test_no_model_is_asked_before_the_sets_and_no_clean_image_before_all_sets(
    tmp_path: Path,
) -> None:
    order: list[tuple[str, int]] = []

    class Watched(Alone):
        def map(
            self, function: Callable[..., Any], tasks: Sequence[Mapping[str, Any]]
        ) -> list[Any]:
            found = []
            for task in tasks:
                found += super().map(function, [task])
                order.append((function.__name__, len(Alert.asked)))
            return found

    Alert.asked.clear()
    entry, plan = made(tmp_path, Alerts(kind="alerts"), 4)
    count_all([entry, replace(entry, name="again")], plan, cast(Context, Watched()))
    assert [name for name, _ in order] == [
        *["check_set"] * 4, *["score_sets"] * 6, *["score_shard"] * 6, "recount", "time_all"
    ]  # fmt: skip
    assert {asked for name, asked in order if name == "check_set"} == {0}


def change_one(crafted: Crafted, row: int, **columns: Any) -> Crafted:
    """Change some columns of one image."""
    changed = {}
    for name, value in columns.items():
        changed[name] = getattr(crafted, name).clone()
        changed[name][row] = value
    return replace(crafted, **changed)


every = torch.arange(N)
FAULTS: dict[str, tuple[str, Callable[[Crafted], Crafted]]] = {
    "outside the ball, first part": ("threat_model", lambda c: change_one(c, 0, images=0.9)),
    "outside the ball, last part": ("threat_model", lambda c: change_one(c, N - 1, images=0.9)),
    "no number": ("threat_model", lambda c: change_one(c, N - 1, images=torch.nan)),
    "another label": ("accounting", lambda c: change_one(c, N - 1, labels=7)),
    "another id, first part": ("accounting", lambda c: change_one(c, 0, ids=7777)),
    "another id, last part": ("accounting", lambda c: change_one(c, N - 1, ids=7777)),
    "one missing": ("accounting", lambda c: c.pick(every[:-1])),
    "a part missing": ("accounting", lambda c: c.pick(every[:-4])),
    "one twice": ("accounting", lambda c: c.pick(torch.cat([every, every[-1:]]))),
    "parts exchanged": ("accounting", lambda c: c.pick(every.roll(4))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_set_with_a_fault_in_one_part_is_counted_in_none(fault: str, tmp_path: Path) -> None:
    check, plant = FAULTS[fault]
    entry, plan = in_parts(tmp_path, 4)
    folder = entry.sets[RUNGS[0]]
    rewrite(folder, plant(read_crafted(folder)), 4)
    (result,) = scored_together([entry], plan)
    assert set(result.scores) == {"clean", RUNGS[1]}
    assert f"{check}/{RUNGS[0]}" in failed(result.findings)
    assert all(not name.endswith(RUNGS[1]) for name in failed(result.findings))
    # The other baseline has the same set, and no other of the rung `full`.
    assert not result.transferred


def test_short_effort_in_one_part_is_reported_with_the_figures_of_all(tmp_path: Path) -> None:
    entry, plan = in_parts(tmp_path, 4)
    folder = entry.sets[RUNGS[0]]
    rewrite(folder, change_one(read_crafted(folder), N - 1, forward=0, fooled=False), 4)
    (result,) = scored_together([entry], plan)
    assert failed(result.findings) == [f"effort/{RUNGS[0]}"]
    assert set(result.scores) == {"clean", *RUNGS}
    details = {finding.name: finding.detail for finding in result.findings}
    assert details[f"accounting/{RUNGS[1]}"] == f"{N} stored images against {N} test images"


@pytest.mark.parametrize("of", ["test", "val", RUNGS[0]])
def test_a_changed_byte_is_found(of: str, tmp_path: Path) -> None:
    entry, plan = in_parts(tmp_path, 4)
    shard = sorted((tmp_path / of).glob("part-*"))[-1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match="was altered"):
        scored_together([entry], plan)


def test_a_set_that_is_exchanged_after_its_check_is_refused(tmp_path: Path) -> None:
    entry, plan = in_parts(tmp_path, 4)
    sound = sound_sets([entry, *plan.baselines], plan)
    counted = score_sets(entry, plan, sound, 1, "cpu")
    score_shard(entry, plan, sound, 1, counted, "cpu")
    folder = entry.sets[RUNGS[0]]
    rewrite(folder, change_one(read_crafted(folder), 5, images=0.9), 4)
    with pytest.raises(DataError, match="has changed since it was checked"):
        score_sets(entry, plan, sound, 1, "cpu")
    with pytest.raises(DataError, match="has changed since it was checked"):
        score_shard(entry, plan, sound, 1, counted, "cpu")


# Crafting


def test_what_is_kept_of_sets_to_probe_is_their_probed_images(tmp_path: Path) -> None:
    entry, plan = made(tmp_path, IDENTITY, N)
    resolved = cast(
        Any,
        SimpleNamespace(threat=plan.threat, checks=plan.checks.model_copy(update={"images": 5})),
    )
    ids, attacks = image_set.read(plan.test).ids, {RUNGS[0]: PGD}
    found = _stored(entry.subject, resolved, attacks, entry.sets, ids, 0)
    whole = read_crafted(entry.sets[RUNGS[0]])
    (kept,) = found.sets
    assert len(kept.ids) == 5 and found.answers == float((whole.forward + 2 * whole.backward).sum())
    assert torch.equal(kept.images, whole.pick(torch.isin(whole.ids, kept.ids)).images)
    rewrite(entry.sets[RUNGS[0]], whole, 5)
    parted = _stored(entry.subject, resolved, attacks, entry.sets, ids, 0)
    assert parted.answers == found.answers and len(parted.sets[0].ids) == 5


def test_the_driver_of_crafting_reads_no_image(
    tmp_path: Path, reads: Counter[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, plan = made(tmp_path, IDENTITY, 5)
    monkeypatch.chdir(tmp_path)
    spec = SetSpec(entry.subject, "full", PGD, plan.test, THREAT, 0, 5, tmp_path / "one")
    craft_all([spec], cast(Context, Alone()))
    assert [reads[plan.test / shard_name(part)] for part in range(3)] == [1, 1, 1]
    reads.clear()
    craft_all([replace(spec, out=tmp_path / "two")], cast(Context, Alone()))
    assert not reads, "all shards were crafted before"
    assert shard_rows(tmp_path / "two") == [range(5), range(5, 10), range(10, N)]
    made_of = [shards.fingerprint(tmp_path / name) for name in ("one", "two")]
    assert made_of[0] == made_of[1]


class Reversed(Alone):
    """The same, the last task first, as another cluster might do them."""

    def map(self, function: Callable[..., Any], tasks: Sequence[Mapping[str, Any]]) -> list[Any]:
        return super().map(function, tasks[::-1])[::-1]


def test_an_attack_that_ranks_images_ranks_those_of_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part is a batch of a shard: both are parameters, and no worker sees another part."""
    entry, plan = made(tmp_path, IDENTITY, 5, right=True)
    monkeypatch.chdir(tmp_path)
    attack, ball = A3(kind="a3"), THREAT.scaled(0.1)
    spec = SetSpec(entry.subject, "full", attack, plan.test, ball, 0, 3, tmp_path / "one")
    craft_all([spec], cast(Context, Reversed()))
    found, defense = read_crafted(tmp_path / "one"), entry.subject.defense()
    data, parts = image_set.read(plan.test), [range(3), range(3, 5), range(5, 8), range(8, 10)]
    for part in (*parts, range(10, N)):
        rows = torch.tensor(part)
        alone = craft(attack, defense, "full", data[rows], ball, 0, 3)
        assert torch.equal(found.images[rows], alone.images)
        assert torch.equal(found.backward[rows], alone.backward)
    whole = craft(attack, defense, "full", data, ball, 0, N)
    assert not torch.equal(found.backward, whole.backward), "the part made no difference"
