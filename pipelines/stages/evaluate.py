"""Score all defenses; write metrics, scores, plots and the report.

Only forward passes happen here. What params.yaml names is scored, whatever else lies in a folder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import TypeAdapter

from components.attacks import Threat
from components.attacks.contract import SURROGATE
from components.data import digests, image_set
from components.data.shards import DataError, shard_rows, write_shard
from components.evaluation.counting import CLEAN
from components.probes.models import leakage
from components.selftest import Result as Planted
from components.selftest import lacking
from pipelines.config.sections import (
    Baseline,
    Checks,
    Control,
    Defended,
    Published,
    Resolved,
    Scoring,
    usage,
)
from pipelines.config.views import SharedView
from pipelines.reporting.dvc_plots import write_headlines, write_plots
from pipelines.reporting.networks import Model, trained
from pipelines.reporting.registration import image_of, registrations
from pipelines.reporting.report import drawn, first_panels, write_report
from pipelines.runner.context import Context
from pipelines.tasks import metrics, speed
from pipelines.tasks.entries import CheckedSet, Entry, Plan, check_set, probes_of
from pipelines.tasks.ladders import read as read_ladder
from pipelines.tasks.ladders import subject_of
from pipelines.tasks.metrics import EntryRole, Metrics
from pipelines.tasks.scoring import Result, merge, recount, score_sets, score_shard
from pipelines.tasks.subject import Subject
from pipelines.tasks.summary import compared, headline, summary, threat_model
from pipelines.tracking.registry import Registration

# How many images are purified to time one of them.
TIMED = 16
# The name of the headline among the attacks of reports/scores.parquet, and the key of the digest of
# the test images in its metadata.
ROBUST, IMAGES = "robust", b"images"


class EvaluateParams(SharedView):
    """Everything that is scored, and how; the settings of attacks stand in the ladders."""

    threat: Threat
    checks: Checks
    baselines: dict[str, Baseline]
    defenses: dict[str, Defended]
    controls: dict[str, Control]
    published: dict[str, Published]
    scoring: Scoring
    tracks = {
        **SharedView.tracks,
        **{
            n: n
            for n in (
                "threat",
                "checks",
                "baselines",
                "defenses",
                "controls",
                "published",
                "scoring",
            )
        },
    }


def run(
    params: EvaluateParams,
    context: Context,
    *,
    train: Path,
    val: Path,
    test: Path,
    models: Path,
    ladders: Path,
    adversarial: Path,
    selftest: Path,
    out_metrics: Path,
    out_headlines: Path,
    out_scores: Path,
    out_plots: Path,
    out_report: Path,
) -> dict[str, float]:
    """Score every baseline, defense and control on every set of its ladder."""
    tried = _selftest(selftest)
    entries = entries_of(params, models.absolute(), ladders, adversarial.absolute())
    plan = _plan(params, entries, val.absolute(), test.absolute(), models.absolute())
    judged = judge(entries, plan, [train, val], context, tried, params.published)
    found, networks = judged.metrics, list(trained(models, entries, plan))
    judged.write(networks, out_metrics, out_scores, out_report)
    write_headlines(out_headlines, found)
    efforts = {
        entry.name: drawn(entry, found.defenses[entry.name], result)
        for entry, result in zip(entries, judged.results, strict=True)
    }
    panels = first_panels(entries, judged.results, found.defenses, plan)
    write_plots(out_plots, found, efforts, networks, panels)
    for name, per_image in judged.seconds.items():
        context.record_time(image_of(name), per_image)
    return {name: found.defenses[name].headline.accuracy for name in params.defenses}


@dataclass(frozen=True)
class Judged:
    """What was scored, what was counted, the metrics, and the seconds an image takes by defense.

    `ids` (N,) are those of the test images, `digest` is that of `digests.digest`.
    """

    entries: Sequence[Entry]
    plan: Plan
    ids: npt.NDArray[np.int64]
    digest: str
    results: Sequence[Result]
    metrics: Metrics
    seconds: Mapping[str, float]

    def write(
        self, networks: Sequence[Model], out_metrics: Path, out_scores: Path, out_report: Path
    ) -> None:
        """Write the metrics, the scores of every image, and the report with these networks."""
        metrics.write(out_metrics, self.metrics)
        table = _score_table(self.entries, self.results, self.ids)
        write_shard(out_scores, table.replace_schema_metadata({IMAGES: self.digest}))
        write_report(out_report, self.metrics, self.entries, self.results, self.plan, networks)


def judge(
    entries: Sequence[Entry], plan: Plan, learnt: Sequence[Path], context: Context,
    selftest: metrics.Selftest, published: Mapping[str, Published],
) -> Judged:  # fmt: skip
    """Score entries on their stored sets, and judge what was counted.

    `learnt` are the folders of all images that networks learnt from, as far as they are known.
    Raises ValueError where a model does not fit the test images.
    """
    images = image_set.read(plan.test)
    for entry in entries:
        entry.subject.require_fit(images)
    probes = [probes_of(entry, plan) for entry in entries]
    leaked = leakage(images.images, [(one.name, image_set.read(one).images) for one in learnt])
    counted, seconds = count_all(entries, plan, context)
    results = [
        replace(one, findings=[*probed, *one.findings, leaked])
        for probed, one in zip(probes, counted, strict=True)
    ]
    pairs = zip(entries, results, strict=True)
    scored = {entry.name: summary(entry, result, plan, images) for entry, result in pairs}
    found = Metrics(
        seed=plan.seed,
        selftest=selftest,
        threat_model=threat_model(plan.threat, len(images), plan.scoring),
        published={
            name: metrics.PublishedFigures.model_validate(one.model_dump())
            for name, one in published.items()
        },
        defenses=compared(entries, results, scored),
    )
    ids = images.ids.numpy()
    return Judged(entries, plan, ids, digests.digest(images), results, found, seconds)


def _selftest(path: Path) -> metrics.Selftest:
    """Count the cases of the selftest; raise DataError unless all of this version came out right.

    Checks that let a lie get by would call a wrong number valid.
    """
    try:
        results = TypeAdapter(list[Planted]).validate_json(path.read_bytes())
    except (OSError, ValueError):
        raise DataError(f"{path} cannot be read; `limpid selftest` renews it") from None
    wrong = lacking(results)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise DataError(
            f"{path} does not show that these cases of the selftest come out right: "
            f"{', '.join(wrong[:3])}{more}; nothing is scored until `limpid selftest` passes"
        )
    return metrics.Selftest(cases=len(results), caught=len(results))


def _plan(
    params: EvaluateParams, entries: Sequence[Entry], val: Path, test: Path, models: Path
) -> Plan:
    surrogate = params.baselines.get(SURROGATE)
    return Plan(
        threat=params.threat,
        scoring=params.scoring,
        checks=params.checks,
        seed=params.seed,
        batch=params.batch,
        val=val,
        test=test,
        unseen=models / "unseen",
        surrogate=models / surrogate.classifier if surrogate else None,
        baselines=[entry for entry in entries if entry.role == "baseline"],
    )


def count_all(
    entries: Sequence[Entry], plan: Plan, context: Context
) -> tuple[list[Result], dict[str, float]]:
    """Check all sets, count every entry on every shard of the test set, and time the defenses."""
    shards = len(shard_rows(plan.test))
    subjects = {entry.name: entry.subject for entry in entries if entry.role == "defense"}
    classifiers = list({entry.subject.classifier: None for entry in entries})
    with context.session():
        checked = _check_sets(entries, plan, context)
        sound = {
            name: {of: one.digest for of, one in sets.items() if one.sound}
            for name, sets in checked.items()
        }
        tasks = [
            {"entry": entry, "plan": plan, "sound": sound, "shard": shard}
            for entry in entries
            for shard in range(shards)
        ]
        # No worker asks about a clean image before the sets of all entries are scored.
        first = context.map(score_sets, tasks)
        after = [{**task, "attacked": one} for task, one in zip(tasks, first, strict=True)]
        results = context.map(score_shard, after)
        recounted = context.map(
            recount, [{"classifier": folder, "plan": plan} for folder in classifiers]
        )
        # One task times all of them in turn: side by side they would slow each other down.
        (seconds,) = context.map(time_all, [{"subjects": subjects, "test": plan.test}])
    accuracy = dict(zip(classifiers, recounted, strict=True))
    whole = []
    for index, entry in enumerate(entries):
        one = merge(results[index * shards : (index + 1) * shards])
        about = [finding for each in checked[entry.name].values() for finding in each.findings]
        known = accuracy[entry.subject.classifier]
        findings = [*about, *([known] if known else []), *one.findings]
        whole.append(replace(one, findings=findings))
    return whole, seconds


def _check_sets(
    entries: Sequence[Entry], plan: Plan, context: Context
) -> dict[str, dict[str, CheckedSet]]:
    """Check every set of the entries and of the baselines that are tried on them, each once."""
    every = [*entries, *(one for one in plan.baselines if one not in entries)]
    pairs = [(entry, name) for entry in every for name in entry.sets]
    tasks = [{"entry": entry, "name": name, "plan": plan} for entry, name in pairs]
    found: dict[str, dict[str, CheckedSet]] = {entry.name: {} for entry in every}
    for (entry, name), one in zip(pairs, context.map(check_set, tasks), strict=True):
        found[entry.name][name] = one
    return found


def entries_of(
    params: EvaluateParams, models: Path, ladders: Path, adversarial: Path
) -> list[Entry]:
    """List what the parameters score: bare classifiers, defenses, controls.

    Raises DataError where a ladder was resolved from other parameters.
    """
    sections: dict[EntryRole, Mapping[str, Baseline | Defended | Control]] = {
        "baseline": params.baselines, "defense": params.defenses, "control": params.controls
    }  # fmt: skip
    entries = []
    for role, section in sections.items():
        for name, one in section.items():
            resolved = read_ladder(ladders / f"{name}.json")
            _require_resolved(resolved, name, one, params)
            folders = {mode: adversarial / of / "full" for mode, of in resolved.replayed.items()}
            named = [(mode, attack) for mode, some in resolved.ladder.items() for attack in some]
            entries.append(
                Entry(
                    name=name,
                    role=role,
                    subject=subject_of(resolved, models),
                    probes=adversarial / name / "checks.json",
                    sets={
                        f"{mode}/{attack}": folders.get(mode, adversarial / name / mode) / attack
                        for mode, attack in named
                    },
                    attacks={f"{m}/{attack}": resolved.ladder[m][attack] for m, attack in named},
                )
            )
    return entries


def _require_resolved(
    resolved: Resolved, name: str, entry: Baseline | Defended | Control, params: EvaluateParams
) -> None:
    """Raise DataError where a ladder was resolved from other parameters than are evaluated."""
    now = {**usage(entry), "threat": params.threat, "checks": params.checks}
    then = {field: getattr(resolved, field) for field in now}
    if now != then or set(resolved.ladder) != set(entry.ladder):
        raise DataError(
            f"the ladder of {name} was resolved from other parameters: `limpid resolve_ladders` "
            "resolves it again, and `dvc repro` all that follows"
        )


def time_all(subjects: Mapping[str, Subject], test: Path, device: str) -> dict[str, float]:
    """Return the seconds that every trained defense takes for an image; runs in a worker."""
    some = image_set.read(test, range(TIMED))
    return {
        name: speed.seconds_per_image(subject.defense(device), some.pixels(), some.ids)
        for name, subject in subjects.items()
    }


def registered(
    params: EvaluateParams, dataset: str, *, models: Path, out_metrics: Path, **_: object
) -> list[Registration]:
    """Return the defenses to register, once the outputs are in place."""
    return registrations(params.defenses, metrics.read(out_metrics), models, dataset)


def _score_table(
    entries: Sequence[Entry], results: Sequence[Result], ids: npt.NDArray[np.int64]
) -> pa.Table:
    """One row per defense, mode, attack, image and role: draws, and how many were right.

    Clean images and the headline, the attack `robust`, have no mode.
    """
    tables = []
    for entry, result in zip(entries, results, strict=True):
        scores = {**result.scores, ROBUST: headline(result)[1]}
        for name, score in scores.items():
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
