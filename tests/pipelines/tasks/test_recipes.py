"""A recipe becomes a training: which networks it learns with, and what they are given."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from toys import LINF, head
from training_toys import AUTOENCODER, CONFIG, IN_LOOP, TEACHER, parse, untrained

from components.data import image_set
from components.data.image_set import ImageSet
from components.models.checkpoints import ModelCard, save
from components.models.classifiers import Classifier, SmallCnn
from components.models.purifiers import PurifierConfig
from components.training.contract import Frozen
from components.training.koo import Distillation
from pipelines.tasks.training import Recipe, build_task

CLEAN = {"kind": "none"}


@pytest.fixture
def folders(train_set: ImageSet, classifier: Classifier, tmp_path: Path) -> Path:
    """Return a folder with some images, and the classifier."""
    image_set.write(tmp_path / "data", head(train_set, 64), 32)
    store(tmp_path / "standard", classifier, SmallCnn(kind="small_cnn", width=8), train_set, {})
    return tmp_path


def store(
    folder: Path, network: Any, config: Any, data: ImageSet, objective: Mapping[str, Any]
) -> None:
    """Write the folder of a network that was trained by this objective."""
    card = ModelCard(
        format=1, family="classifier" if isinstance(network, Classifier) else "purifier",
        model=config.model_dump(mode="json"), shape=list(data.shape),
        class_names=list(data.class_names), provenance={"objective": dict(objective)},
    )  # fmt: skip
    save(folder, network, card)


@pytest.mark.parametrize(
    ("objective", "normal"),
    [
        ({"kind": "normal_teacher"}, True),
        ({"kind": "denoising", "sigma_max": 0.1}, True),
        ({**TEACHER, "adversary": CLEAN}, True),
        (TEACHER, False),
        ({**TEACHER, "adversary": {"kind": "defense", **IN_LOOP}}, False),
    ],
    ids=["normal", "denoising", "no adversary", "pool", "defense"],
)
def test_a_teacher_that_never_saw_an_attack_is_a_normal_one(
    objective: dict[str, Any], normal: bool, folders: Path, train_set: ImageSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = TypeAdapter(PurifierConfig).validate_python(AUTOENCODER)
    store(folders / "teacher", untrained(AUTOENCODER).eval(), model, train_set, objective)
    bound: list[Frozen] = []
    bind = Distillation.bind
    monkeypatch.setattr(
        Distillation, "bind", lambda self, frozen: bound.append(frozen) or bind(self, frozen)
    )
    recipe = Recipe(
        "purifier", model, parse("distillation", adversary=CLEAN), CONFIG, LINF, 0, 32,
        train=folders / "data", val=folders / "data", classifier=folders / "standard",
        teachers=(folders / "teacher",),
    )  # fmt: skip
    build_task(recipe, "cpu")
    assert [teacher.normal for teacher in bound[0].teachers] == [normal]
    assert not any(teacher.purifier.training for teacher in bound[0].teachers)
