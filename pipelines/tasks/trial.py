"""One trial of a search: train the networks its values change, then attack the defense.

A trial uses training and validation images alone: the test split is no argument here. How values
are chosen is not known here either.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError

from components.attacks import L2, Attack, Linf, craft
from components.attacks.contract import Rung
from components.data import image_set
from components.data.image_set import ImageSet
from components.evaluation.counting import CLEAN, count_score, worst
from components.models.checkpoints import load, read_section
from components.models.defense import Defense
from components.models.purifiers import Inference
from components.probes.statistics import summarise
from pipelines.cluster import trainer
from pipelines.cluster.trainer import TrainingTask
from pipelines.config.resources import Resources
from pipelines.config.schema import explain, require_fit
from pipelines.config.search_space import Value, put
from pipelines.config.sections import Defended, Scoring, Student, Study, Trained
from pipelines.config.views import TrainingView
from pipelines.errors import ConfigError
from pipelines.tasks import speed
from pipelines.tasks.subject import Subject
from pipelines.tasks.training import Recipe, build_task, recipe_of

Figures = dict[str, Any]
# What a search calls robust accuracy: short ladders, and `a3` above all, leave images that longer
# attacks fool.
ROBUST = "robust_upper_bound"
# How many images the time of one is measured on.
TIMED = 32


@dataclass(frozen=True)
class StudySetup:
    """What all trials of a study share.

    `document` holds the sections of params.yaml that a trial may change, as plain values; `train`,
    `val`, `models` and `pool` are absolute folders.
    """

    study: Study
    document: Mapping[str, Any]
    shared: TrainingView
    threat: Linf | L2
    attacks: Mapping[str, Attack]
    scoring: Scoring
    resources: Resources
    train: Path
    val: Path
    models: Path
    pool: Path

    def sections(self, values: Mapping[str, Value]) -> Trained:
        """Return the sections with `values` in place; ConfigError where they are not valid."""
        tried = ", ".join(f"{key} = {value}" for key, value in values.items())
        try:
            sections = Trained.model_validate(put(self.document, values))
            # A value may make the defense random.
            random = sections.stochastic(self.study.defense)
            require_fit("its ladder", self.study.ladder, self.attacks, random, self.threat)
        except ValueError as error:
            reason = explain(error) if isinstance(error, ValidationError) else error
            raise ConfigError(f"a trial with {tried} is not valid: {reason}") from None
        return sections

    def retrained(self, sections: Trained) -> list[str]:
        """Return the networks that each trial trains, in training order.

        These are the networks with a parameter in the space of the study, and those made from them.
        """
        names: list[str] = []
        for name in sections.lineage(sections.defenses[self.study.defense].model):
            start = f"{sections.section_of(name)}.{name}."
            own = any(key.startswith(start) for key in self.study.space)
            if own or set(sections.lineage(name)) & set(names):
                names.append(name)
        return names

    def epochs(self, sections: Trained) -> int:
        """Return the epochs of the last network that a trial trains; 1 where it trains none."""
        retrained = self.retrained(sections)
        if not retrained:
            return 1
        section = getattr(sections, sections.section_of(retrained[-1]))[retrained[-1]]
        return int(section.training.epochs)

    @property
    def device(self) -> str:
        """The device of its attacks: its own if it trains in workers, else the one it trains on."""
        return (self.resources.trials if self.resources.train.most else self.resources.train).device

    def scorer(self, defended: Defended) -> "TrialScorer":
        """Return what scores the networks of this study, used and placed as in this defense."""
        classifier = (self.models / defended.classifier).absolute()
        return TrialScorer(
            classifier, defended.inference, self.val.absolute(), self.study, self.attacks,
            self.scoring, self.threat, self.shared.seed, self.shared.batch,
        )  # fmt: skip


@dataclass(frozen=True)
class TrialScorer:
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
        """Return the first validation images, as many as the study says."""
        val = image_set.read(self.val)
        return val[torch.arange(min(self.study.images, len(val)))]

    def score(self, defense: Defense) -> Figures:
        """Return the clean accuracy and that under the worst attack of the ladder, with interval.

        `right` is the fraction of draws right under the worst attack, by image (N,). As in the
        headline, the noise that selects the worst attack is not the noise that scores it.
        """
        images = self.images()
        sets = {CLEAN: images.pixels()}
        for mode, attacks in self.study.ladder.items():
            for name in attacks:
                crafted = craft(
                    self.attacks[name], defense, cast(Rung, mode), images, self.threat, self.seed,
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
            ROBUST: found["accuracy"],
            f"{ROBUST}_low": found["low"],
            f"{ROBUST}_high": found["high"],
            "clean": float(scores[CLEAN].accuracy().mean()),
            "right": right.tolist(),
        }

    def seconds(self, defense: Defense) -> float:
        """Return the seconds that purifying one image takes."""
        some = self.images()[torch.arange(min(TIMED, self.study.images))]
        return speed.seconds_per_image(defense, some.pixels(), some.ids)


def run_trial(
    setup: StudySetup, values: Mapping[str, Value], work: Path, report: Callable[[Figures], None]
) -> None:
    """Run the trial of `values`; after an interruption it continues from what is under `work`.

    `report` is called with the figures at every rung of the study, `epoch` among them, and at the
    end with all of them, `seconds_per_image` and `right` too.
    """
    sections = setup.sections(values)
    defended = sections.defenses[setup.study.defense]
    retrained, epochs = setup.retrained(sections), setup.epochs(sections)
    scorer = setup.scorer(defended)
    folders = {n: setup.models / n for n in sections.lineage(defended.model)}
    for name in retrained:
        recipe = _recipe(setup, sections, name, folders)
        folders[name] = work / "models" / name
        if folders[name].exists():
            continue
        last = name == retrained[-1]
        compared = rungs(setup.study, epochs) if last else frozenset()

        def seen(index: int, metrics: Mapping[str, float]) -> None:
            if ROBUST in metrics:
                figures = {n: v for n, v in metrics.items() if n in (ROBUST, "clean")}
                report({"epoch": index + 1, **figures})

        part = folders[name].with_name(f".{name}.part")
        trainer.train(
            build_scored_task, {"recipe": recipe, "scorer": scorer, "rungs": compared}, part,
            work / "training" / name, setup.resources.train, seen, lambda _: None,
        )  # fmt: skip
        part.rename(folders[name])
    model = folders[defended.model]
    subject = Subject(scorer.classifier, model.absolute(), inference=defended.inference)
    defense = subject.defense(setup.device)
    seconds = scorer.seconds(defense)
    report({"epoch": epochs, **scorer.score(defense), "seconds_per_image": seconds})


def build_scored_task(
    recipe: Recipe, scorer: TrialScorer, rungs: frozenset[int], device: str
) -> TrainingTask:
    """Build the training of a recipe whose network is also scored after the epochs in `rungs`."""
    task = build_task(recipe, device)
    classifier = load(scorer.classifier, device)

    def validate(network: Any, epoch: int) -> dict[str, float]:
        metrics = dict(task.validate(network, epoch))
        if epoch + 1 in rungs:
            # On a copy: scoring freezes and calibrates the network.
            copied = copy.deepcopy(network)
            task.finish(copied)
            purifier = scorer.inference.wrap(copied) if scorer.inference else copied
            figures = scorer.score(Defense(classifier, purifier).freeze())
            metrics |= {name: figures[name] for name in (ROBUST, "clean")}
        return metrics

    return TrainingTask(**{**vars(task), "validate": validate})


def rungs(study: Study, epochs: int) -> frozenset[int]:
    """Return after how many epochs a trial is compared with others; never at its end."""
    if study.goal == "pareto":
        return frozenset()
    found, rung = [], study.grace
    while rung < epochs:
        found.append(rung)
        rung *= study.reduction
    return frozenset(found)


def _recipe(setup: StudySetup, sections: Trained, name: str, folders: Mapping[str, Path]) -> Recipe:
    section = getattr(sections, sections.section_of(name))[name]
    extra: dict[str, Any] = {}
    if isinstance(section, Student):
        extra["teachers"] = [folders[teacher] for teacher in section.teachers]
    if name in sections.atop:
        extra["base"] = folders[sections.atop[name].base]
        model = read_section(extra["base"])
    else:
        model = sections.model_of(name)
    return recipe_of(
        name, "purifier", model, section, setup.shared, train=setup.train, val=setup.val,
        classifier=setup.models / "standard", pool=setup.pool, **extra,
    )  # fmt: skip
