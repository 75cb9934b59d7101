"""Networks that are trained under different names are strangers, in the line and in a search."""

from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import project
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from components.data import image_set
from components.data.image_set import ImageSet
from components.models.checkpoints import save
from components.models.classifiers import Classifier
from components.models.identity import state_digest
from components.training.batches import Batches
from pipelines.cluster import trainer
from pipelines.cluster.trainer import TrainingTask
from pipelines.config.schema import Params
from pipelines.stages import distill_purifier, train_purifier
from pipelines.tasks.subject import Subject
from pipelines.tasks.training import Recipe, build_task, recipe_of, seed_of
from pipelines.tasks.trial import StudySetup, _recipe

TEACHERS = ("adversarial_teacher", "normal_teacher")


@pytest.fixture(scope="module")
def params() -> Params:
    return Params.model_validate(project.tiny())


@pytest.fixture(scope="module")
def data(train_set: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    image_set.write(folder / "train", train_set[torch.arange(60)], 60)
    image_set.write(folder / "val", train_set[torch.arange(60, 70)], 60)
    return folder


def recipe(params: Params, data: Path, name: str, like: str, **folders: Path) -> Recipe:
    """Return the recipe of a network called `name` that is otherwise the purifier `like`."""
    section = params.purifiers[like]
    return recipe_of(
        name, "purifier", section.model, section, params, train=data / "train", val=data / "val",
        **folders,
    )  # fmt: skip


def task(params: Params, data: Path, name: str, **folders: Path) -> TrainingTask:
    """Return the training of a network called `name`, of one architecture for all names."""
    return build_task(recipe(params, data, name, "normal_teacher", **folders), "cpu")


def weights(task: TrainingTask) -> Tensor:
    """Return the weights of all convolutions, flattened."""
    return torch.cat([p.flatten() for p in task.model.parameters() if p.dim() == 4])


def batches(task: TrainingTask) -> tuple[list[int], Tensor]:
    """Return the ids of an epoch in order, and the images as they are shown."""
    epoch = Batches(task.data, None, 10, "flip", task.seed, torch.device("cpu")).epoch(0)
    shown = [(draws.ids.tolist(), batch.images) for batch, draws in epoch]
    ids = list(chain.from_iterable(ids for ids, _ in shown))
    return ids, torch.cat([images for _, images in shown])


def test_two_networks_of_one_architecture_start_as_strangers(params: Params, data: Path) -> None:
    first, second = (task(params, data, name) for name in TEACHERS)
    assert abs(F.cosine_similarity(weights(first), weights(second), dim=0).item()) < 0.1
    (order, _), (other, _) = batches(first), batches(second)
    assert order != other and sorted(order) == sorted(other)


def test_their_images_are_flipped_independently(params: Params, data: Path) -> None:
    def flipped(name: str) -> dict[int, bool]:
        ids, images = batches(one := task(params, data, name))
        whole = dict(zip(one.data.ids.tolist(), one.data.pixels(), strict=True))
        return {k: not torch.equal(x, whole[k]) for k, x in zip(ids, images, strict=True)}

    first, second = (flipped(name) for name in TEACHERS)
    assert 10 < sum(first[k] == second[k] for k in first) < 50


def test_the_same_name_trains_from_the_same_bytes(params: Params, data: Path) -> None:
    first, again = (task(params, data, "student_grey") for _ in range(2))
    assert state_digest(first.model) == state_digest(again.model)
    assert batches(first)[0] == batches(again)[0]
    assert torch.equal(batches(first)[1], batches(again)[1])


@pytest.fixture(scope="module")
def standard(params: Params, data: Path) -> Path:
    """Return the folder of an untrained classifier."""
    folder, section = data / "standard", params.classifiers["standard"]
    first = build_task(
        recipe_of(
            "standard", "classifier", section.model, section, params, train=data / "train",
            val=data / "val",
        ), "cpu",
    )  # fmt: skip
    save(folder, first.model, first.card(first.model))
    return folder


def test_no_purifier_is_trained_in_front_of_a_random_classifier(
    params: Params, data: Path, standard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Classifier, "stochastic", True, raising=False)
    with pytest.raises(ValueError, match="standard is random: purifiers are trained in front of a"):
        task(params, data, "masked", classifier=standard)


def test_a_model_of_the_other_half_is_refused_in_one_sentence(
    params: Params, data: Path, standard: Path, tmp_path: Path
) -> None:
    base, images = task(params, data, "masked", classifier=standard), image_set.read(data / "val")
    purifier = tmp_path / "masked"
    save(purifier, base.model, base.card(base.model))
    Subject(standard, purifier).require_fit(images)
    with pytest.raises(ValueError, match="masked holds a purifier, and a classifier is needed"):
        Subject(purifier).require_fit(images)
    with pytest.raises(ValueError, match="standard holds a classifier, and a purifier is needed"):
        Subject(standard, standard).require_fit(images)


def test_a_fine_tuned_network_starts_from_its_base_and_draws_its_own_batches(
    params: Params, data: Path, standard: Path, tmp_path: Path
) -> None:
    base = task(params, data, "masked", classifier=standard)
    save(tmp_path / "masked", base.model, base.card(base.model))
    tuned = task(params, data, "atop", classifier=standard, base=tmp_path / "masked")
    assert torch.equal(weights(tuned), weights(base))
    assert batches(tuned)[0] != batches(base)[0]


def test_the_seed_of_a_network_follows_its_name_and_the_seed_of_the_line() -> None:
    seeds = [seed_of(name, seed) for name in ("standard", "surrogate") for seed in (0, 1, 10)]
    assert len(set(seeds)) == 6 and all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize(
    ("stage", "section", "name", "teachers"),
    [
        (train_purifier, "purifier", "masked", {}),
        (distill_purifier, "student", "student_adaptive",
         {"first_teacher": "defense_teacher", "last_teacher": "normal_teacher"}),
    ],
)  # fmt: skip
def test_a_trial_trains_the_network_that_the_stage_would(
    stage: Any, section: str, name: str, teachers: dict[str, str], params: Params,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    given: list[Recipe] = []
    monkeypatch.setattr(
        trainer, "train", lambda setup, arguments, *_: given.append(arguments["recipe"]) or {}
    )
    root = Path("nowhere").absolute()
    folders = {"train": root / "train", "val": root / "val", "pool": root / "pool"}
    context = SimpleNamespace(
        work=root, resources=params.resources, epoch=lambda _: None,
        progress=SimpleNamespace(say=None),
    )  # fmt: skip
    view = stage.run.__annotations__["params"].of(params, name)
    above = {option: root / teacher for option, teacher in teachers.items()}
    stage.run(view, context, name=name, classifier=root / "standard", out=root / "out", **folders,
              **above)  # fmt: skip
    setup = StudySetup(
        params.tuning.studies["student"], {}, params, params.threat, params.attacks,
        params.scoring, params.resources, models=root, **folders,
    )  # fmt: skip
    tried = _recipe(setup, params, name, {teacher: root / teacher for teacher in teachers.values()})
    assert given == [tried]
