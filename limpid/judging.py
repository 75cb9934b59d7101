"""`limpid.evaluate`: the verdict on a classifier, and on a purifier in front of it."""

import contextlib
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from components.attacks import L2, Linf
from components.data import image_set
from components.data.draws import Draws
from components.data.image_set import ImageSet, Shape
from components.data.shards import write_bytes
from components.models.checkpoints import ModelCard, save
from components.models.defense import Defense, draws_noise
from components.models.foreign import adopt_classifier, adopt_purifier, resizing
from components.models.given import hold
from components.models.purifiers.contract import Purifier
from limpid import ladders
from limpid.given import as_given, store, with_given
from limpid.inputs import LEAST, as_images, as_threat
from pipelines.commands.scores import score_table
from pipelines.config.resources import Resources, TrainingWorkers, TrialWorkers, Workers
from pipelines.config.sections import Baseline, Checks, Defended, Scoring
from pipelines.errors import ConfigError
from pipelines.layout import CRAFTED, ROOT
from pipelines.reporting.networks import trained
from pipelines.runner.console import ConsoleProgress, show
from pipelines.runner.context import Context
from pipelines.stages import evaluate as stage
from pipelines.stages.resolve_ladders import LaddersParams, resolve
from pipelines.tasks.entries import Plan
from pipelines.tasks.ladders import generate
from pipelines.tasks.metrics import Metrics, Scored, Selftest

# The names of the two rows: the classifier alone, and behind the purifier; and of the networks.
BARE, DEFENSE = "classifier", "defense"
PURIFIER, UNSEEN = "purifier", "unseen"
# Test images that are probed, draws that score a random defense, and images that are shown.
CHECKED, DRAWS, SHOWN = 64, 32, 6
# What an evaluation writes in its folder, and the mark that the folder is one.
FOLDERS, MARK = ("data", "models", "ladders", "adversarial", "given"), ROOT / "evaluation"
# What it says in the end: metrics, scores and the report.
ENDS = ("metrics.json", "scores.parquet", "report.html")
# A defense of these standings is worth nothing beside its rivals.
FALLEN = ("broken", "no better than a control")


@dataclass(frozen=True)
class Verdict:
    """What a classifier or a defense is worth: the metrics of all rows, and the name of its own.

    `scored` has everything about it: rungs, attacks, findings, illusions.
    """

    metrics: Metrics
    name: str

    @property
    def scored(self) -> Scored:
        """The scores of what was judged."""
        return self.metrics.defenses[self.name]

    @property
    def robust_accuracy(self) -> float:
        """The worst of all attacks, image by image; an upper bound where `upper_bound` says so."""
        return self.scored.headline.accuracy

    @property
    def interval(self) -> tuple[float, float]:
        """The Wilson 95 % interval of robust accuracy."""
        return self.scored.headline.low, self.scored.headline.high

    @property
    def upper_bound(self) -> bool:
        """Whether a blocking check failed, or the ladder was quick."""
        return self.scored.headline.upper_bound

    @property
    def failed(self) -> list[str]:
        """The blocking checks that failed."""
        return self.scored.checks.blocking_failed

    @property
    def not_asked(self) -> list[str]:
        """What was not asked for want of validation images or an unseen classifier."""
        found = [finding.name for finding in self.scored.checks.findings if not finding.asked]
        return found + ([] if self.scored.unseen_classifier else ["unseen_classifier"])

    @property
    def candidate(self) -> bool:
        """Whether every check was asked, none that blocks failed, and its rivals are beaten."""
        standing = self.scored.verdict.standing if self.scored.verdict else ""
        return not (self.upper_bound or self.not_asked or standing in FALLEN)


class _Unlogged:
    """The log of metrics of a call that has none."""

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log nothing."""

    def nested(
        self, name: str, params: Mapping[str, Any], metrics: Mapping[str, float], step: int
    ) -> None:
        """Log nothing."""


def evaluate(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, purifier: nn.Module | None = None,
    threat: str | Linf | L2 = "linf:8/255", ladder: str | Mapping[str, Any] = "standard",
    validation: tuple[Tensor, Tensor] | None = None, unseen: nn.Module | None = None,
    given: Mapping[str, Tensor] | None = None, batch: int = 250, seed: int = 0,
    device: str | None = None, out: str | Path | None = None,
) -> Verdict:  # fmt: skip
    """Attack a classifier, alone and behind a purifier, and say what each is worth.

    `classifier` maps pixels (N,C,H,W) float32 in [0,1] to logits (N,K), `purifier` pixels to pixels
    of the same shape; normalisation lies inside. `images` and `labels` (N,) are test data, judged
    at 8 bits a pixel. `threat` is `linf:RADIUS` or `l2:RADIUS` in pixels of [0,1], a fraction or a
    number. `ladder` is `standard`, `quick` (an upper bound by `a3`), or a dict of rungs
    (`ladders.choose`). `validation` are images and labels that nobody scores, and `unseen` a
    classifier that played no part in training: checks that need them are not asked without them.
    `given` are adversarial images of your own by name, float32 (N,C,H,W), one for each test image,
    inside the threat: they count as one more attack, of which no effort is asked.
    With `out`, metrics, scores, adversarial images and the report are kept there, and the same call
    goes on where it was. The score table is printed.

    It is what the stages of a pipeline run, on the same code. Raises ValueError, in one sentence,
    for anything that cannot be judged.
    """
    test = as_images(images, labels)
    held_out = None if validation is None else as_images(*validation, first_id=len(test))
    networks = {BARE: classifier, PURIFIER: purifier, UNSEEN: unseen}
    settings = (as_threat(threat), ladder, batch, seed, device, out)
    return judge(networks, test, held_out, *settings, given)


def judge(
    networks: Mapping[str, nn.Module | None], test: ImageSet, validation: ImageSet | None,
    threat: Linf | L2, ladder: str | Mapping[str, Any], batch: int, seed: int, device: str | None,
    out: str | Path | None, given: Mapping[str, Tensor] | None = None,
) -> Verdict:  # fmt: skip
    """Do what `evaluate` does, on image sets that have ids of their own: noise goes by them.

    `networks` are the classifier, the purifier and the unseen classifier, by these names.
    """
    examples = as_given(given or {}, test, threat)
    some = test[torch.arange(min(CHECKED, len(test)))].pixels()
    adopted: dict[str, nn.Module] = {}
    for name, network in networks.items():
        if network is not None and name == PURIFIER:
            adopted[name] = adopt_purifier(network, some, "cpu")
        elif network is not None:
            adopted[name] = adopt_classifier(network, some, len(test.class_names), "cpu")
    defense = Defense(adopted[BARE], adopted.get(PURIFIER))  # type: ignore[arg-type]
    with torch.no_grad():
        logits = defense.classify(some[:1], Draws(seed, "clean", test.ids[:1]))
    names = tuple(str(k) for k in range(logits.shape[1]))
    chosen = ladders.choose(ladder, defense, len(names), threat)
    with contextlib.ExitStack() as stack:
        root = Path(out or stack.enter_context(tempfile.TemporaryDirectory())).absolute()
        _clear(root)
        for name, network in adopted.items():
            _store(stack, root / "models" / name, network, test.shape, names)
        verdict = _Job(
            root, threat, chosen, replace(test, class_names=names),
            replace(validation, class_names=names) if validation else None, PURIFIER in adopted,
            UNSEEN in adopted, draws_noise(defense.classifier), examples, batch, seed,
            device or ("cuda" if torch.cuda.is_available() else "cpu"),
        ).run()  # fmt: skip
    for name, network in adopted.items():
        if note := resizing(network):
            print(f"The {name} {note}.")
    return verdict


def _clear(root: Path) -> None:
    """Remove what an earlier evaluation left in a folder, but for the shards that it crafted.

    Raises ConfigError for a folder that holds anything else.
    """
    mark = root / MARK
    if root.exists() and not mark.exists() and any(root.iterdir()):
        raise ConfigError(
            f"{root} holds other files; name a new folder, or one that an evaluation wrote"
        )
    for name in ENDS:
        # Else a call that is interrupted would leave them beside other networks.
        (root / name).unlink(missing_ok=True)
    for name in FOLDERS:
        shutil.rmtree(root / name, ignore_errors=True)
    write_bytes(mark, b"")


def _store(
    stack: contextlib.ExitStack, folder: Path, network: nn.Module, shape: Shape,
    names: tuple[str, ...],
) -> None:  # fmt: skip
    """Write the model folder of a network that is held until the stack ends."""
    given, note = stack.enter_context(hold(network)), resizing(network)
    card = ModelCard(
        format=1, family="purifier" if isinstance(network, Purifier) else "classifier",
        model=given.model_dump(), shape=list(shape), class_names=list(names),
        provenance={"note": note} if note else {},
    )  # fmt: skip
    save(folder, network, card)


@dataclass(frozen=True)
class _Job:
    """One evaluation: its folder, what is judged, and how.

    `random` says whether the classifier draws noise.
    """

    root: Path
    threat: Linf | L2
    chosen: ladders.Ladders
    test: ImageSet
    validation: ImageSet | None
    purified: bool
    unseen: bool
    random: bool
    given: Mapping[str, Tensor]
    batch: int
    seed: int
    device: str

    def run(self) -> Verdict:
        """Craft, probe and score; write everything, print the table."""
        test, val = self.root / "data" / "test", self.root / "data" / "val"
        image_set.write(test, self.test, self.batch)
        if self.validation is not None:
            image_set.write(val, self.validation, self.batch)
        held_out = val if self.validation is not None else None
        params, models = self.params(), self.root / "models"
        attacked = LaddersParams(
            attacks=dict(self.chosen.attacks), threat=params.threat, checks=params.checks,
            baselines=params.baselines, defenses=params.defenses, controls=params.controls,
        )  # fmt: skip
        context = self.context()
        rows: dict[str, Baseline | Defended] = {**params.baselines, **params.defenses}
        for name, entry in rows.items():
            path = self.root / "ladders" / f"{name}.json"
            write_bytes(
                path, resolve(entry, attacked, self.random).model_dump_json(indent=2).encode()
            )
            front = models / PURIFIER if isinstance(entry, Defended) else None
            out = self.root / "adversarial" / name
            generate(path, params, held_out, test, models / BARE, front, out, context)
        given = {name: self.root / "given" / name for name in self.given}
        for name, folder in given.items():
            store(folder, self.given[name], self.test, self.batch)
        own = stage.entries_of(params, models, path.parent, self.root / "adversarial")
        entries = [with_given(entry, given) for entry in own]
        plan = Plan(
            threat=self.threat, scoring=params.scoring, checks=params.checks, seed=self.seed,
            batch=self.batch, val=held_out, test=test,
            unseen=models / UNSEEN if self.unseen else None, surrogate=None,
            baselines=[entry for entry in entries if entry.role == "baseline"],
            quick=self.chosen.quick,
        )  # fmt: skip
        learnt = [held_out] if held_out else []
        judged = stage.judge(entries, plan, learnt, context, Selftest(cases=0, caught=0), {})
        networks = list(trained(models, entries, plan))
        judged.write(networks, *(self.root / name for name in ENDS))
        show(score_table(judged.metrics.defenses))
        return Verdict(judged.metrics, DEFENSE if self.purified else BARE)

    def params(self) -> stage.EvaluateParams:
        """Return what would stand in params.yaml."""
        defense = Defended(classifier=BARE, model=PURIFIER, ladder=dict(self.chosen.defended))
        return stage.EvaluateParams(
            seed=self.seed, batch=self.batch, threat=self.threat,
            checks=Checks(images=max(LEAST, min(CHECKED, len(self.test))), thorough=False),
            baselines={BARE: Baseline(classifier=BARE, ladder=dict(self.chosen.bare))},
            defenses={DEFENSE: defense} if self.purified else {}, controls={}, published={},
            scoring=Scoring(select_draws=DRAWS, score_draws=DRAWS, shown=SHOWN),
        )  # fmt: skip

    def context(self) -> Context:
        """Return a context without Ray and MLflow: this process does all the work, on all cores."""
        gpus = 1.0 if self.device == "cuda" else 0.0
        resources = Resources(
            train=TrainingWorkers(workers=0, cpus=1, gpus=gpus),
            shards=Workers(workers=0, cpus=1, gpus=gpus),
            trials=TrialWorkers(workers=1, cpus=1, gpus=gpus),
            stages={},
        )
        return Context(
            ConsoleProgress("evaluate"), _Unlogged(), resources, self.root / "work",
            lambda name, seconds: None, self.root / CRAFTED, torch.get_num_threads(),
        )  # fmt: skip
