"""A finished evaluation in small, for tests of the report and of all that reads metrics."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from components.attacks import Crafted, Linf
from components.attacks.distance.cw import CwL2
from components.attacks.gradient import Pgd
from components.attacks.sets import read_crafted, write_crafted, write_crafted_manifest
from components.attacks.square import Square
from components.config import Config
from components.data import image_set
from components.data.image_set import ImageSet
from components.data.shards import shard_name, write_json
from components.evaluation.counting import Effort, Score
from components.evaluation.detection import DetectorScores
from components.models.checkpoints import ModelCard, build, fingerprint, save
from components.models.classifiers import SmallCnn
from components.models.purifiers.autoencoder import ConvAutoencoder
from components.models.purifiers.controls import BitDepth, GaussianNoise
from components.probes import Finding
from pipelines.config import sections
from pipelines.config.sections import Scoring
from pipelines.reporting.networks import trained
from pipelines.reporting.report import write_report
from pipelines.tasks.entries import Entry, Plan
from pipelines.tasks.metrics import (
    Checks,
    CleanScore,
    Estimate,
    Headline,
    Metrics,
    Retries,
    Scored,
    Selftest,
    UnseenClassifier,
    attack_of,
)
from pipelines.tasks.panels import render
from pipelines.tasks.scoring import Result
from pipelines.tasks.subject import Subject
from pipelines.tasks.summary import compared, summary, threat_model

N, SHAPE, CLASSES = 12, (1, 8, 8), ("0", "1", "<b>2</b>")
EVIL = "<script>alert(1)</script>"
THREAT = Linf(norm="linf", eps_255=51.0)


class _Both(Pgd):
    """PGD in place of two attacks, one on either family of losses."""

    losses = ("cross-entropy", "margin")


PGD = _Both(
    kind="pgd", steps=10, step=0.2, restarts=1, random_start=True, early_stop=True, eot=1
)  # fmt: skip
CW = CwL2(kind="cw_l2", c=1.0, searches=1, steps=2, learning_rate=0.1, confidence=0.0, eot=1)
SQUARE = Square(kind="square", queries=100, eot=1)
ATTACKS = {"pgd": PGD, "cw": CW, "square": SQUARE}
# How many of the images are right, by mode/attack, for every scored defense.
RIGHT = {
    "none": {"full/pgd": 0},
    "student_grey": {"classifier/pgd": 11, "bpda/pgd": 12, "full/pgd": 0, "full/cw": 3},
    "student_adaptive": {"classifier/pgd": 8, "bpda/pgd": 8, "full/pgd": 7},
    "noisy": {"classifier/pgd": 12, "full/pgd": 1},
    "rounded": {"bpda/pgd": 4, "bpda/square": 6, "soft/pgd": 3, "full/pgd": 12},
    EVIL: {"full/pgd": 12},
}
# Four images fall after 1, 10, 10 and 100 passes, eight stand after 200.
EFFORT = Effort(np.array([1, 10, 10, 100] + [200] * 8), np.arange(N) < 4)
# Accuracies right at multiples of the radius, of the entries that were probed.
PROBES = {
    "none": {"0": 1.0, "0.25": 0.5, "1": 0.0, "4": 0.0},
    "noisy": {"0": 1.0, "0.25": 0.875, "1": 0.25, "4": 0.0},
}
ROLES = {"none": "baseline", "noisy": "control", "rounded": "control", EVIL: "control"}


class FakeEvaluation:
    """An evaluation in small: models of random weights, adversarial sets, made-up counts."""

    def __init__(self, root: Path) -> None:
        torch.manual_seed(0)
        self.models, self.root = root / "models", root
        blocks = ConvAutoencoder(
            kind="conv_autoencoder", blocks=2, width=2, strided=[], residual="global"
        )
        self._model("standard", SmallCnn(kind="small_cnn", width=2), {})
        made_from = {"classifier": fingerprint(self.models / "standard")}
        self._model("unseen", SmallCnn(kind="small_cnn", width=2), {})
        self._model("forgotten", SmallCnn(kind="small_cnn", width=1), {})
        self._model("teacher", blocks, made_from)
        made_from |= {"teacher 0": fingerprint(self.models / "teacher"), "gone": "f" * 64}
        for name in ("student_grey", "student_adaptive"):
            self._model(name, blocks, made_from)
        standard = Subject(self.models / "standard")
        images = torch.randint(256, (N, *SHAPE), dtype=torch.uint8)
        with torch.no_grad():
            labels = standard.defense()(images / 255).argmax(1)
        self.test = ImageSet(images, labels, torch.arange(N), CLASSES)
        image_set.write(root / "test", self.test, 5)
        self.plan = Plan(
            threat=THREAT,
            scoring=Scoring(select_draws=32, score_draws=32, shown=3),
            checks=sections.Checks(images=32, thorough=False),
            seed=0,
            batch=5,
            val=root / "test",
            test=root / "test",
            unseen=self.models / "unseen",
            surrogate=None,
        )
        self.entries = [self._entry(name) for name in RIGHT]
        self.results = [self._result(entry) for entry in self.entries]
        self.metrics = Metrics(
            seed=0,
            selftest=Selftest(cases=34, caught=34),
            threat_model=threat_model(THREAT, N, self.plan.scoring),
            published={},
            defenses=self._scored(),
        )

    def _scored(self) -> dict[str, Scored]:
        pairs = zip(self.entries, self.results, strict=True)
        scored = {e.name: summary(e, r, self.plan, self.test) for e, r in pairs}
        return compared(self.entries, self.results, scored)

    def values(self) -> dict[str, Any]:
        """Return the metrics as a file has them, to be changed at will."""
        return self.metrics.model_dump(mode="json")

    def html(
        self, values: Mapping[str, Any] | None = None, results: Sequence[Result] | None = None
    ) -> str:
        """Return the report; of the given metrics and results where there are any."""
        out = self.root / "report.html"
        results, metrics = results or self.results, self.metrics
        if values:
            metrics = Metrics.model_validate_json(json.dumps(values))
        models = list(trained(self.models, self.entries, self.plan))
        write_report(out, metrics, self.entries, results, self.plan, models)
        return out.read_text()

    def _model(self, name: str, model: Config, made_from: Mapping[str, str]) -> None:
        card = ModelCard(
            format=1,
            family="classifier" if isinstance(model, SmallCnn) else "purifier",
            model=model.model_dump(mode="json"),
            shape=list(SHAPE),
            class_names=list(CLASSES),
            provenance={
                "objective": {"kind": "classification"},
                "training": {"epochs": 2},
                "seed": 0,
                "made_from": dict(made_from),
            },
        )
        save(self.models / name, build(card).eval(), card)
        history = [{"loss": 2.0, "val_accuracy": 0.25}, {"loss": 0.125, "val_accuracy": 0.875}]
        write_json(self.models / name / "history.json", history)

    def _entry(self, name: str) -> Entry:
        standard = self.models / "standard"
        subject = Subject(standard)
        if name.startswith("student"):
            subject = Subject(standard, self.models / name)
        elif name == "noisy":
            subject = Subject(standard, control=GaussianNoise(kind="gaussian_noise", sigma=0.1))
        elif name == "rounded":
            subject = Subject(standard, control=BitDepth(kind="bit_depth", bits=1))
        folder = self.root / "adversarial" / str(list(RIGHT).index(name))
        for attack in RIGHT[name]:
            self._set(folder / attack)
        sets = {attack: folder / attack for attack in RIGHT[name]}
        attacks = {attack: ATTACKS[attack_of(attack)] for attack in sets}
        return Entry(
            name, ROLES.get(name, "defense"), subject, folder / "checks.json", sets, attacks
        )

    def _set(self, folder: Path) -> None:
        clean = self.test.pixels()
        moved = THREAT.project(clean + 0.2 * torch.randn_like(clean), clean)
        ones = torch.ones(N, dtype=torch.int64)
        fooled = ones.bool()
        crafted = Crafted(
            self.test.ids, self.test.labels, moved, fooled, ones, ones, ones, 0 * ones, fooled,
            1 - ones, -ones.float(),
        )  # fmt: skip
        write_crafted(folder / shard_name(0), crafted)
        write_crafted_manifest(folder, SHAPE, {})

    def _result(self, entry: Entry) -> Result:
        draws = 32 if entry.name == "noisy" else 1

        def score(right: int) -> Score:
            counts = np.where(np.arange(N) < right, draws, 0)
            return Score(draws, counts, counts)

        right = RIGHT[entry.name]
        inside = {
            name: np.full(N, name != "full/cw" or entry.name == "none")
            for name in ("clean", *right)
        }
        findings = [
            Finding(name=f"accounting/{name}", level="block", passed=True, detail="all there")
            for name in right
        ]
        if entry.name in PROBES:
            figures = {**PROBES[entry.name], "n": 16.0}
            radius = {"name": "radius_pays", "level": "block", "passed": True, "detail": "falls"}
            findings.append(Finding(**radius, figures=figures))
        if entry.name == EVIL:
            detail = "100.0% of 12 images have a zero gradient <i>"
            lie = Finding(name="gradient_present/full", level="block", passed=False, detail=detail)
            findings.append(lie)
        if entry.name == "rounded":
            void = {"name": "gradient_present/full", "level": "warn", "passed": False}
            findings.append(Finding(**void, detail="100.0% of 12 images have a zero gradient"))
        distance = {name: np.full(N, 1.25) for name in right}
        scored = {"clean": score(N), **{name: score(count) for name, count in right.items()}}
        # On the first image the classifier was wrong, and a right answer does not agree.
        agreed = {n: one.accuracy() * (np.arange(N) > 0) for n, one in scored.items()}
        detector = _detector(entry.name, list(right))
        first = self.test[torch.arange(3)]
        sets = {name: read_crafted(folder).images[:3] for name, folder in entry.sets.items()}
        panels = render(entry.subject.defense(), first, sets, 0, 5)
        unseen = (score(N), score(9))
        efforts = {"full/pgd": EFFORT} if entry.name in ("none", "rounded", "student_grey") else {}
        rounded = score(N if entry.name == EVIL else 6)
        return Result(
            scored, agreed, inside, {}, distance, findings, unseen, rounded, detector, panels,
            efforts, {}, {},
        )  # fmt: skip


def _detector(name: str, sets: list[str]) -> DetectorScores | None:
    """Detector scores by image: student_adaptive is a good detector, and noisy is none."""
    clean = np.arange(N) / 16
    lifted = {"student_adaptive": 0.5, "noisy": 0.0}
    if name not in lifted:
        return None
    seen = dict.fromkeys(sets, clean + lifted[name])
    control = dict.fromkeys(sets, clean + 0.25)
    validation = np.append(np.arange(18) / 32, [0.65, 0.7])
    all_ = {"clean": clean, **seen}
    return DetectorScores(all_, all_, {"clean": clean, **control}, validation)


def bare_scores(accuracy: float, **changes: Any) -> Scored:
    """Return the scores of a defense of one accuracy, with nothing that the form does not need."""
    one = Estimate(accuracy=accuracy, low=0.0, high=1.0, n=50)
    values: dict[str, Any] = {
        "role": "defense",
        "digest": "",
        "stochastic": False,
        "quick": False,
        "clean": CleanScore(**dict(one), agreement=accuracy),
        "headline": Headline(**dict(one), upper_bound=False),
        "per_class": {},
        "carried_by": {},
        "rungs": {},
        "void_rungs": [],
        "white_box": None,
        "attacks": {},
        "elsewhere": {},
        "detection": None,
        "retries": Retries(
            worst_of_10=one, majority_of_10=one, clean_worst_of_10=one, clean_majority_of_10=one
        ),
        "unseen_classifier": UnseenClassifier(clean=one, worst_examples=one),
        "illusions": [],
        "illusory_rungs": [],
        "radius_curve": [],
        "checks": Checks(blocking_failed=[], warnings=[], findings=[]),
        "certificate": {},
        "written_for": [],
    }
    return Scored(**values | changes)


def fail_checks(scored: dict[str, Any], *names: str, level: str = "block") -> None:
    """Let these checks alone fail on an entry of `FakeEvaluation.values`, of those of a level."""
    checks = scored["checks"]
    others = [f for f in checks["findings"] if f["passed"] or f["level"] != level]
    about = [(name, *name.partition("/")[::2]) for name in names]
    checks["findings"] = others + [
        {
            "name": name, "check": check, "about": rung, "level": level, "passed": False,
            "detail": "planted", "figures": {}, "asked": True,
        }
        for name, check, rung in about
    ]  # fmt: skip
    checks["blocking_failed" if level == "block" else "warnings"] = list(names)
    if level == "block":
        scored["headline"]["upper_bound"] = bool(names)
