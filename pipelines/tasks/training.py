"""Training one network: what all training stages do alike.

A `Recipe` says what to train on which folders. Inside each training worker, `build_task` reads the
folders and turns the recipe into a `trainer.TrainingTask`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from components.attacks import L2, Linf
from components.attacks.sets import read_crafted
from components.config import Config
from components.data import image_set
from components.data.image_set import ImageSet
from components.data.shards import DataError
from components.models.accuracy import count_correct
from components.models.checkpoints import (
    ModelCard,
    build,
    fingerprint,
    load,
    load_purifier,
    read_card,
    require_fit,
)
from components.models.classifiers import Classifier
from components.models.defense import Defense, channels_last, draws_noise
from components.models.purifiers import Purifier
from components.training.contract import Frozen, Teacher, takes_pool
from components.training.loop import Training
from pipelines.cluster import trainer
from pipelines.cluster.trainer import TrainingTask
from pipelines.config.sections import Section
from pipelines.config.views import TrainingView
from pipelines.runner.context import Context


@dataclass(frozen=True)
class Recipe:
    """One training: the network, its data folders, and the frozen networks it learns with.

    `seed` is the network's own (`seed_of`).
    """

    family: Literal["classifier", "purifier"]
    model: Config
    objective: Any
    training: Training
    threat: Linf | L2
    seed: int
    batch: int
    train: Path
    val: Path
    classifier: Path | None = None
    pool: Path | None = None
    teachers: tuple[Path, ...] = ()
    base: Path | None = None


def train(
    name: str,
    family: Literal["classifier", "purifier"],
    model: Config,
    section: Section,
    shared: TrainingView,
    context: Context,
    out: Path,
    *,
    teachers: Sequence[Path] = (),
    **folders: Path,
) -> dict[str, float]:
    """Train the network called `name` into the folder `out`; `folders` are fields of `Recipe`."""
    recipe = recipe_of(name, family, model, section, shared, teachers=teachers, **folders)
    return trainer.train(
        build_task, {"recipe": recipe}, out, context.work, context.resources.train,
        context.epoch(section.training.epochs), context.progress.say,
    )  # fmt: skip


def recipe_of(
    name: str,
    family: Literal["classifier", "purifier"],
    model: Config,
    section: Section,
    shared: TrainingView,
    *,
    teachers: Sequence[Path] = (),
    **folders: Path,
) -> Recipe:
    """Return the recipe of the network called `name`.

    Its folders are absolute: workers run in other folders.
    """
    return Recipe(
        family=family,
        model=model,
        objective=section.objective,
        training=section.training,
        threat=shared.training_threat,
        seed=seed_of(name, shared.seed),
        batch=shared.batch,
        teachers=tuple(teacher.absolute() for teacher in teachers),
        **{name: folder.absolute() for name, folder in folders.items()},
    )


def seed_of(name: str, seed: int) -> int:
    """Return the seed of the network called `name`, below 2**32, under the `seed` of params.yaml.

    It seeds first weights, order of the images, augmentation and noise. Networks of one
    architecture that shared a seed would be siblings: two teachers would agree by their start, and
    an attack on a surrogate would be nearly one on the original.
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def build_task(recipe: Recipe, device: str) -> TrainingTask:
    """Build the training of a recipe on a device.

    Raises ValueError where folders do not fit together, or the frozen classifier draws noise.
    """
    train, val = image_set.read(recipe.train), image_set.read(recipe.val)
    for folder in (recipe.classifier, recipe.base, *recipe.teachers):
        if folder is not None:
            require_fit(folder, train)
    torch.manual_seed(recipe.seed)
    blank = _card(recipe, train, {})
    model = load(recipe.base).requires_grad_(True) if recipe.base else build(blank)
    if isinstance(model, Classifier):
        model.normalise_by(train.pixels())
    classifier = load(recipe.classifier, device) if recipe.classifier else None
    if draws_noise(classifier):
        raise ValueError(
            f"{recipe.classifier} is random: purifiers are trained in front of a deterministic "
            "classifier"
        )
    teachers = [_teacher(folder, device) for folder in recipe.teachers]
    model.to(device)
    for network in (model, classifier, *(teacher.purifier for teacher in teachers)):
        if network is not None:
            channels_last(network)
    objective = recipe.objective.bind(Frozen(classifier, teachers, recipe.threat))

    def count_right(network: Any) -> int:
        defense = Defense(classifier, network) if classifier else Defense(network, None)
        counts = count_correct(
            defense, val.pixels(), val.labels, val.ids, recipe.seed, "train", 1, recipe.batch
        )
        return int(counts.sum())

    # A generative network classifies nothing by itself; the defenses that use it are scored.
    scored = isinstance(model, Classifier | Purifier)

    def facts(network: Any) -> dict[str, Any]:
        return {"validation": {"correct": count_right(network), "n": len(val)}} if scored else {}

    def validate(network: Any, epoch: int) -> dict[str, float]:
        return {"val_accuracy": count_right(network) / len(val)} if scored else {}

    def finish(network: Any) -> None:
        if isinstance(network, Purifier):
            network.calibrate(train.pixels(), recipe.batch)

    return TrainingTask(
        model=model,
        objective=objective,
        data=train,
        attacked=_read_pool(recipe, train),
        training=recipe.training,
        seed=recipe.seed,
        validate=validate,
        finish=finish,
        card=lambda network: _card(recipe, train, facts(network)),
    )


def _card(recipe: Recipe, train: ImageSet, facts: Mapping[str, Any]) -> ModelCard:
    folders = {"classifier": recipe.classifier, "base": recipe.base}
    folders |= {f"teacher {index}": folder for index, folder in enumerate(recipe.teachers)}
    made_from = {name: fingerprint(folder) for name, folder in folders.items() if folder}
    return ModelCard(
        format=1,
        family=recipe.family,
        model=recipe.model.model_dump(mode="json"),
        shape=list(train.shape),
        class_names=list(train.class_names),
        provenance={
            "objective": recipe.objective.model_dump(mode="json", by_alias=True),
            "threat": recipe.threat.model_dump(mode="json"),
            "training": recipe.training.model_dump(mode="json"),
            "seed": recipe.seed,
            "made_from": made_from,
            **facts,
        },
    )


def _teacher(folder: Path, device: str) -> Teacher:
    """Return the purifier of a folder; its objective says whether it was trained on x'."""
    adversary = read_card(folder).provenance["objective"].get("adversary")
    normal = adversary is None or adversary["kind"] == "none"
    return Teacher(load_purifier(folder, device), normal)


def _read_pool(recipe: Recipe, train: ImageSet) -> Tensor | None:
    """Return x' of the pool, as large as all images in float32, where the objective takes it."""
    if recipe.pool is None or not takes_pool(recipe.objective):
        return None
    crafted = read_crafted(recipe.pool)
    if not torch.equal(crafted.ids, train.ids):
        raise DataError(f"{recipe.pool} was not crafted on these training images")
    return crafted.images
