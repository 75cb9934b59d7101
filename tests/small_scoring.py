"""A control in small that is scored as the stage does it, with sets that it withstands or not."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch

from components.attacks import Crafted, Linf
from components.attacks.contract import Cost
from components.attacks.gradient import Pgd
from components.attacks.sets import write_crafted, write_crafted_manifest
from components.config import Config
from components.data import image_set, shards
from components.data.image_set import ImageSet
from components.data.shards import shard_name
from components.models.accuracy import count_correct
from components.models.checkpoints import ModelCard, build, save
from components.models.defense import Defense
from pipelines.config.sections import Checks, Scoring
from pipelines.layout import CRAFTED
from pipelines.runner.context import Context
from pipelines.stages.evaluate import count_all
from pipelines.tasks.entries import Entry, Plan, Sound, check_set
from pipelines.tasks.scoring import Result
from pipelines.tasks.subject import Subject

N, VALIDATION, SHAPE, NAMES = 12, 3, (1, 8, 8), ("a", "b")
THREAT = Linf(norm="linf", eps_255=51.0)
PGD = Pgd(
    kind="pgd", steps=1, step=1.0, restarts=1, random_start=False, early_stop=False, eot=1
)  # fmt: skip
RUNGS = ("full/pgd", "bpda/pgd")


def images_of(count: int, first: int) -> ImageSet:
    """Return images of noise; the first one is black, and a threshold does not change it."""
    levels = torch.randint(256, (count, *SHAPE), dtype=torch.uint8)
    levels[0] = 0
    return ImageSet(levels, torch.arange(count) % 2, torch.arange(first, first + count), NAMES)


def save_classifier(folder: Path, val: ImageSet) -> None:
    """Save a classifier of random weights, which knows no favourite, with its true accuracy."""
    card = ModelCard(
        format=1, family="classifier", model={"kind": "small_cnn", "width": 2},
        shape=list(SHAPE), class_names=list(NAMES), provenance={},
    )  # fmt: skip
    model = build(card).eval().requires_grad_(False)
    model.network[-1].bias -= model(val.pixels()).mean(0)
    right = count_correct(
        Defense(model, None).freeze(), val.pixels(), val.labels, val.ids, 0, "clean", 1, 5
    )
    facts = {"validation": {"correct": int(right.sum()), "n": len(val)}}
    save(folder, model, card.model_copy(update={"provenance": facts}))


def made(
    root: Path, control: Config, rows: int, rungs: Sequence[str] = RUNGS, fooled: bool = True,
    cost: Cost | None = None, right: bool = False,
) -> tuple[Entry, Plan]:  # fmt: skip
    """Make a control to be scored; by default its sets cost what their attack promises.

    `right` labels the test images as the classifier does.
    """
    torch.manual_seed(0)
    val, test = images_of(VALIDATION, 100), images_of(N, 0)
    image_set.write(root / "val", val, VALIDATION)
    save_classifier(root / "model", val)
    if right:
        labels = Subject(root / "model").defense()(test.pixels()).argmax(1)
        test = ImageSet(test.images, labels, test.ids, NAMES)
    image_set.write(root / "test", test, rows)
    subject = Subject(root / "model", control=control)
    clean, ones = test.pixels(), torch.ones(N, dtype=torch.int64)
    cost = cost or PGD.effort(len(test.class_names), subject.stochastic())
    for name in rungs:
        moved = THREAT.project(clean + 0.2 * torch.randn_like(clean), clean)
        moved[0] = clean[0]
        crafted = Crafted(
            test.ids,
            test.labels,
            moved,
            ones.bool() & fooled,
            ones,
            cost.forward * ones,
            cost.backward * ones,
            0 * ones,
            ones.bool() & fooled,
            1 - ones,
            -ones.float(),
        )
        write_crafted(root / name / shard_name(0), crafted)
        facts: dict[str, Any] = {
            **subject.facts(), "data": shards.fingerprint(root / "test"), "seed": 0,
            "mode": name.partition("/")[0], "attack": PGD.model_dump(mode="json"),
            "threat": THREAT.model_dump(mode="json"),
        }  # fmt: skip
        write_crafted_manifest(root / name, SHAPE, facts)
    plan = Plan(
        threat=THREAT, seed=0, batch=5, val=root / "val",
        checks=Checks(images=32, thorough=False),
        scoring=Scoring(select_draws=4, score_draws=4, shown=2), test=root / "test",
        unseen=root / "model", surrogate=None,
    )  # fmt: skip
    sets = {name: root / name for name in rungs}
    attacks = dict.fromkeys(sets, PGD)
    return Entry("control", "control", subject, root / "checks.json", sets, attacks), plan


class Alone:
    """A context whose process does all tasks, one by one."""

    session, crafted = nullcontext, CRAFTED

    def map(self, function: Callable[..., Any], tasks: Sequence[Mapping[str, Any]]) -> list[Any]:
        return [function(**task, device="cpu") for task in tasks]


def scored_together(entries: Sequence[Entry], plan: Plan) -> list[Result]:
    """Score entries as the stage does where one process scores them all."""
    return count_all(entries, plan, cast(Context, Alone()))[0]


def sound_sets(entries: Sequence[Entry], plan: Plan) -> Sound:
    """Return the digests of the sets of some entries that pass their checks."""
    found = {e.name: {name: check_set(e, name, plan, "cpu") for name in e.sets} for e in entries}
    return {
        name: {of: one.digest for of, one in sets.items() if one.sound}
        for name, sets in found.items()
    }


def rewrite(folder: Path, crafted: Crafted, rows: int = N) -> None:
    """Put other examples into a set, in shards of `rows`, under the same facts."""
    facts = {k: v for k, v in shards.read_manifest(folder).items() if k not in ("files", "rows")}
    for old in folder.glob("part-*"):
        old.unlink()
    for number, start in enumerate(range(0, len(crafted.ids), rows)):
        part = crafted.pick(torch.arange(start, min(start + rows, len(crafted.ids))))
        write_crafted(folder / shard_name(number), part)
    write_crafted_manifest(folder, SHAPE, facts)
