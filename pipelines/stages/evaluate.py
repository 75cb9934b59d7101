"""Reads all sets, models and data, writes the scores, the metrics, the plots and the report.

Only forward passes happen here. What is scored is what params.yaml names, never what happens to
lie in a folder.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from components.attacks.ladder import MODES, REPLAYED, SURROGATE
from components.checks.scores import not_beaten
from components.data import image_set
from components.data.shards import write_json, write_shard
from components.evaluation.counting import CLEAN
from components.probes.models import leakage
from pipelines.config.sections import Baseline, Control, Defended, Ladder, Published, Scoring
from pipelines.config.views import CraftingView
from pipelines.reporting.dvc_plots import write_headlines, write_plots
from pipelines.reporting.networks import trained
from pipelines.reporting.registration import image_of, registrations
from pipelines.reporting.report import drawn, first_panels, write_report
from pipelines.runner.context import Context
from pipelines.tasks import speed
from pipelines.tasks.scoring import Entry, Plan, Result, headline, merge, score_shard, summary
from pipelines.tasks.subject import Subject
from pipelines.tracking.registry import Registration

# How many images are cleaned to see how long it takes.
TIMED = 16


class EvaluateParams(CraftingView):
    """Everything that is scored, and how."""

    baselines: dict[str, Baseline]
    defenses: dict[str, Defended]
    controls: dict[str, Control]
    published: dict[str, Published]
    scoring: Scoring
    tracks = {
        **CraftingView.tracks,
        **{n: n for n in ("baselines", "defenses", "controls", "published", "scoring")},
    }


def run(
    params: EvaluateParams,
    context: Context,
    *,
    train: Path,
    val: Path,
    test: Path,
    models: Path,
    adversarial: Path,
    selftest: Path,
    out_metrics: Path,
    out_headlines: Path,
    out_scores: Path,
    out_plots: Path,
    out_report: Path,
) -> dict[str, float]:
    """Score every baseline, defense and control on every set of its ladder."""
    entries = _entries(params, models.absolute(), adversarial.absolute())
    plan = Plan(
        threat=params.threat,
        attacks=params.attacks,
        scoring=params.scoring,
        seed=params.seed,
        batch=params.batch,
        val=val.absolute(),
        test=test.absolute(),
        unseen=(models / "unseen").absolute(),
        surrogate=(models / params.baselines[SURROGATE].classifier).absolute()
        if SURROGATE in params.baselines
        else None,
    )
    images = image_set.read(test)
    for entry in entries:
        entry.subject.require_fit(images)
    learnt = [(folder.name, image_set.read(folder).images) for folder in (train, val)]
    leaked = leakage(images.images, learnt)
    parts = range(len(image_set.read_by_shard(test)))
    tasks = [{"entry": entry, "plan": plan, "part": p} for entry in entries for p in parts]
    with context.session():
        pieces = context.map(score_shard, tasks)
        subjects = {entry.name: entry.subject for entry in entries if entry.role == "defense"}
        # All in one task, one after the other: they would slow each other down.
        (seconds,) = context.map(time_all, [{"subjects": subjects, "test": test.absolute()}])
    results = [merge(pieces[i : i + len(parts)]) for i in range(0, len(pieces), len(parts))]
    cases = json.loads(selftest.read_text())
    metrics: dict[str, Any] = {
        "selftest": {"cases": len(cases), "caught": sum(case["caught"] for case in cases)},
        "seed": params.seed,
        "threat_model": {
            **params.threat.model_dump(),
            "n": len(images),
            "select_draws": params.scoring.select_draws,
            "score_draws": params.scoring.score_draws,
        },
        "published": {name: one.model_dump() for name, one in params.published.items()},
        "defenses": {
            entry.name: summary(
                entry, replace(result, findings=[*result.findings, leaked]), plan, images
            )
            for entry, result in zip(entries, results, strict=True)
        },
    }
    _compare(entries, results, metrics["defenses"])
    scored = metrics["defenses"]
    behind = list(trained(models, entries, plan))
    efforts = {e.name: drawn(e, scored[e.name], r) for e, r in zip(entries, results, strict=True)}
    write_json(out_metrics, metrics)
    write_headlines(out_headlines, metrics)
    write_shard(out_scores, _score_table(entries, results, images.ids.numpy()))
    panels = first_panels(entries, results, scored, plan)
    write_plots(out_plots, metrics, efforts, behind, panels)
    write_report(out_report, metrics, entries, results, plan, behind)
    for name, per_image in seconds.items():
        context.record_time(image_of(name), per_image)
    return {name: scored[name]["headline"]["accuracy"] for name in params.defenses}


def _entries(params: EvaluateParams, models: Path, adversarial: Path) -> list[Entry]:
    """List what params.yaml scores: bare classifiers, defenses, controls."""
    standard = models / "standard"
    subjects: list[tuple[str, str, Subject, Path, Ladder]] = [
        ("baseline", name, Subject(models / section.classifier), adversarial / name, section.ladder)
        for name, section in params.baselines.items()
    ]
    subjects += [
        (
            "defense",
            name,
            Subject(standard, models / section.model, inference=section.inference),
            adversarial / name,
            section.ladder,
        )
        for name, section in params.defenses.items()
    ]
    subjects += [
        (
            "control",
            name,
            Subject(standard, control=section.purifier),
            adversarial / "controls" / name,
            section.ladder,
        )
        for name, section in params.controls.items()
    ]
    return [
        Entry(
            name=name,
            role=role,
            subject=subject,
            probes=folder / "checks.json",
            sets={
                f"{mode}/{attack}": (
                    adversarial / REPLAYED[mode] / "full" if mode in REPLAYED else folder / mode
                )
                / attack
                for mode in MODES
                for attack in params.attacks
                if attack in ladder.get(mode, [])
            },
        )
        for role, name, subject, folder, ladder in subjects
    ]


def time_all(subjects: Mapping[str, Subject], test: Path, device: str) -> dict[str, float]:
    """Return the seconds that every trained defense takes for an image; runs in a worker."""
    images = image_set.read(test)
    some = images[torch.arange(min(TIMED, len(images)))]
    return {
        name: speed.seconds_per_image(subject.defense(device), some.pixels(), some.ids)
        for name, subject in subjects.items()
    }


def registered(
    params: EvaluateParams, dataset: str, *, models: Path, out_metrics: Path, **_: object
) -> list[Registration]:
    """Return the defenses to register, once the outputs are in place."""
    metrics = json.loads(out_metrics.read_text())
    return registrations(params.defenses, metrics, models, dataset)


def _compare(entries: Sequence[Entry], results: Sequence[Result], scored: dict[str, Any]) -> None:
    """Say of every defense which controls and bare classifiers it does not beat."""
    shares = {e.name: headline(r)[1].accuracy() for e, r in zip(entries, results, strict=True)}
    rivals = {entry.name: shares[entry.name] for entry in entries if entry.role != "defense"}
    for entry in entries:
        if entry.role == "defense":
            scored[entry.name]["not_better_than"] = {
                rival: {"difference": difference, "p": p}
                for rival, (difference, p) in not_beaten(shares[entry.name], rivals).items()
            }


def _score_table(
    entries: Sequence[Entry], results: Sequence[Result], ids: npt.NDArray[np.int64]
) -> pa.Table:
    """One row per defense, mode, attack, image and role: draws, and how many were right."""
    tables = []
    for entry, result in zip(entries, results, strict=True):
        for name, score in result.scores.items():
            mode, _, attack = name.rpartition("/")
            for role, correct in (("select", score.select), ("score", score.score)):
                columns = {
                    "defense": [entry.name] * len(ids),
                    "mode": [mode] * len(ids),
                    "attack": [attack] * len(ids),
                    "id": ids,
                    "role": ["clean" if name == CLEAN and role == "score" else role] * len(ids),
                    "draws": np.full(len(ids), score.draws),
                    "correct": correct,
                }
                tables.append(pa.table(columns))
    return pa.concat_tables(tables)
