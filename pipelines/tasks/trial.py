"""One trial of a search: train what its values touch, then attack the defense.

All that is looked at are training and validation images: the test split is no argument here.
Nothing in this module knows what searches.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import TypeAdapter, ValidationError

from components.attacks import L2, Attack, Linf, craft
from components.data import image_set
from components.data.image_set import ImageSet
from components.evaluation.counting import CLEAN, count_score, worst
from components.models.checkpoints import load, read_card
from components.models.defense import Defense, Mode
from components.models.purifiers import Inference, PurifierConfig
from components.probes.statistics import summarise
from pipelines.cluster import trainer
from pipelines.cluster.trainer import TrainingTask
from pipelines.config.resources import Resources
from pipelines.config.schema import explain
from pipelines.config.search_space import Value, put
from pipelines.config.sections import Scoring, Student, Study, Trained
from pipelines.config.views import ThreatView
from pipelines.errors import ConfigError
from pipelines.tasks import speed
from pipelines.tasks.subject import Subject
from pipelines.tasks.training import Recipe, build_task, recipe_of

Figures = dict[str, Any]
# How many images are cleaned to see how long it takes.
TIMED = 32


@dataclass(frozen=True)
class Task:
    """What all trials of a study share.

    `document` holds the sections of params.yaml that a trial may turn, as plain values.
    """

    study: Study
    document: Mapping[str, Any]
    shared: ThreatView
    attacks: Mapping[str, Attack]
    scoring: Scoring
    resources: Resources
    train: Path
    val: Path
    models: Path
    pool: Path

    def sections(self, values: Mapping[str, Value]) -> Trained:
        """Return the sections with `values` in place; ConfigError where they cannot be."""
        try:
            return Trained.model_validate(put(self.document, values))
        except ValidationError as error:
            tried = ", ".join(f"{place} = {value}" for place, value in values.items())
            raise ConfigError(f"a trial with {tried} is none: {explain(error)}") from None

    def retrained(self, sections: Trained) -> list[str]:
        """Return the networks that the study's domains touch, in the order of training."""
        touched: list[str] = []
        for name in sections.lineage(sections.defenses[self.study.defense].model):
            start = f"{sections.section_of(name)}.{name}."
            own = any(place.startswith(start) for place in self.study.space)
            if own or set(sections.lineage(name)) & set(touched):
                touched.append(name)
        return touched

    def epochs(self, sections: Trained) -> int:
        """Return how long the last network of a trial trains; 1 where nothing is trained."""
        retrained = self.retrained(sections)
        if not retrained:
            return 1
        section = getattr(sections, sections.section_of(retrained[-1]))[retrained[-1]]
        return int(section.training.epochs)

    @property
    def device(self) -> str:
        """Where a trial attacks what it trained: where it trains, if that is in its process."""
        return (self.resources.trials if self.resources.train.most else self.resources.train).device

    def judge(self, inference: Inference | None) -> "Judge":
        """Return who judges the networks of this study."""
        standing = (self.models / "standard").absolute()
        return Judge(
            standing, inference, self.val.absolute(), self.study, self.attacks, self.scoring,
            self.shared.threat, self.shared.seed, self.shared.batch,
        )  # fmt: skip


@dataclass(frozen=True)
class Judge:
    """Attacks a purifier on validation images, in front of the classifier it protects."""

    classifier: Path
    inference: Inference | None
    val: Path
    study: Study
    attacks: Mapping[str, Attack]
    scoring: Scoring
    threat: Linf | L2
    seed: int
    batch: int

    def images(self) -> ImageSet:
        """Return the validation images that are looked at."""
        val = image_set.read(self.val)
        return val[torch.arange(min(self.study.images, len(val)))]

    def figures(self, defense: Defense) -> Figures:
        """Return accuracy when clean and under the worst of the ladder, with its interval.

        `right` are the shares of right answers under the worst (N,). As in the headline, the noise
        that chooses the worst does not score it.
        """
        images = self.images()
        sets = {CLEAN: images.pixels()}
        for mode, attacks in self.study.ladder.items():
            for name in attacks:
                crafted = craft(
                    self.attacks[name], defense, cast(Mode, mode), images, self.threat, self.seed,
                    self.batch,
                )  # fmt: skip
                sets[f"{mode}/{name}"] = crafted.images
        scores = {
            name: count_score(
                defense, x, images.labels, images.ids, self.seed,
                "clean" if name == CLEAN else "score",
                self.scoring.select_draws, self.scoring.score_draws, self.batch,
            )
            for name, x in sets.items()
        }  # fmt: skip
        right = worst(scores, list(scores))[1].accuracy()
        found = summarise(right)
        return {
            "robust": found["accuracy"],
            "robust_low": found["low"],
            "robust_high": found["high"],
            "clean": float(scores[CLEAN].accuracy().mean()),
            "right": right.tolist(),
        }

    def seconds(self, defense: Defense) -> float:
        """Return the seconds that cleaning one image takes."""
        some = self.images()[torch.arange(min(TIMED, self.study.images))]
        return speed.seconds_per_image(defense, some.pixels(), some.ids)


def attempt(
    task: Task, values: Mapping[str, Value], work: Path, report: Callable[[Figures], None]
) -> None:
    """Run the trial of `values` under `work`, where it also goes on after an interruption.

    `report` is called with the figures at every rung of the study, `epoch` among them, and at the
    end with all of them, `seconds_per_image` and `right` too.
    """
    sections = task.sections(values)
    defended = sections.defenses[task.study.defense]
    retrained, epochs = task.retrained(sections), task.epochs(sections)
    judge = task.judge(defended.inference)
    folders = {n: task.models / n for n in sections.lineage(defended.model)}
    for name in retrained:
        recipe = _recipe(task, sections, name, folders)
        folders[name] = work / "models" / name
        if folders[name].exists():
            continue
        last = name == retrained[-1]
        rungs = _rungs(task.study, epochs) if last else frozenset()

        def seen(index: int, metrics: Mapping[str, float]) -> None:
            if "robust" in metrics:
                figures = {n: v for n, v in metrics.items() if n in ("robust", "clean")}
                report({"epoch": index + 1, **figures})

        part = folders[name].with_name(f".{name}.part")
        trainer.train(
            build_judged_task, {"recipe": recipe, "judge": judge, "rungs": rungs}, part,
            work / "training" / name, task.resources.train, seen, lambda _: None,
        )  # fmt: skip
        part.rename(folders[name])
    model = folders[defended.model]
    subject = Subject(judge.classifier, model.absolute(), inference=defended.inference)
    defense = subject.defense(task.device)
    seconds = judge.seconds(defense)
    report({"epoch": epochs, **judge.figures(defense), "seconds_per_image": seconds})


def build_judged_task(
    recipe: Recipe, judge: Judge, rungs: frozenset[int], device: str
) -> TrainingTask:
    """Build the job of a recipe whose network is judged after the epochs in `rungs`, too."""
    job = build_task(recipe, device)
    classifier = load(judge.classifier, device)

    def validate(network: Any, epoch: int) -> dict[str, float]:
        seen = dict(job.validate(network, epoch))
        if epoch + 1 in rungs:
            # On a copy: judging freezes, and calibrates what it judges.
            still = copy.deepcopy(network)
            job.finish(still)
            purifier = judge.inference.wrap(still) if judge.inference else still
            figures = judge.figures(Defense(classifier, purifier).freeze())
            seen |= {name: figures[name] for name in ("robust", "clean")}
        return seen

    return TrainingTask(**{**vars(job), "validate": validate})


def _recipe(task: Task, sections: Trained, name: str, folders: Mapping[str, Path]) -> Recipe:
    section = getattr(sections, sections.section_of(name))[name]
    extra: dict[str, Any] = {}
    if isinstance(section, Student):
        extra["teachers"] = [
            folders[t] for t in (section.adversarial_teacher, section.normal_teacher)
        ]
    if name in sections.atop:
        extra["base"] = folders[sections.atop[name].base]
        card = read_card(extra["base"]).model
        model = TypeAdapter(PurifierConfig).validate_python(card)
    else:
        model = sections.model_of(name)
    return recipe_of(
        "purifier", model, section, task.shared, train=task.train, val=task.val,
        classifier=task.models / "standard", pool=task.pool, **extra,
    )  # fmt: skip


def _rungs(study: Study, epochs: int) -> frozenset[int]:
    """Return after how many epochs a trial is compared with others; never at its end."""
    if study.goal == "pareto":
        return frozenset()
    rungs, rung = [], study.grace
    while rung < epochs:
        rungs.append(rung)
        rung *= study.reduction
    return frozenset(rungs)
