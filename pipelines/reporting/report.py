"""The report for people: one HTML file that needs no network, no script and no other file.

Every number in it comes from the metrics and what they were counted from. The templates beside this
module hold its layout and text, this module its content. Equal inputs give equal bytes.
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from components.attacks.contract import RUNGS
from components.data import image_set
from components.data.shards import write_bytes
from components.evaluation.counting import Effort
from components.evaluation.detection import CURVE, RATES
from components.models.defense import STAND_INS
from pipelines.config.meanings import MEANINGS
from pipelines.reporting.charts import (
    HUES,
    Chart,
    longest,
    over_passes,
    over_radius,
    over_rejected,
)
from pipelines.reporting.claims import claims, compared_baseline, conclusion
from pipelines.reporting.networks import Model, describe_subject
from pipelines.reporting.wording import (
    ROLES,
    describe_radius,
    describe_threat,
    illusion,
    interval,
    no_better,
    not_beaten,
    percent,
    settings,
    verdict,
    written_for,
)
from pipelines.tasks.entries import Entry, Plan
from pipelines.tasks.metrics import (
    AttackScore,
    Detection,
    Estimate,
    Metrics,
    RecordedFinding,
    Scored,
    attack_of,
    rung_of,
)
from pipelines.tasks.panels import Panel
from pipelines.tasks.scoring import Result

TEMPLATE = "report.html.j2"
# Columns of the score table that are shown even if nothing was run there.
SHOWN = ("classifier", "bpda", "full")
# Classes that fit beside each other; of more, only the worst are listed.
WIDE = 20


@dataclass(frozen=True)
class Curve:
    """A detector at every threshold: (clean images rejected, wrong answers let through).

    `marks` are the points of the thresholds that have numbers in the tables.
    """

    points: list[tuple[float, float]]
    marks: dict[str, tuple[float, float]]


@dataclass(frozen=True, eq=False)
class Shown:
    """What the templates show of one entry beside its `scores`; sentences are "" where none fits.

    `ladder` and `sets` hold None where nothing was run or counted, `lacking` the stand-ins that the
    purifier does not have, `lowest` the rung that leaves least, `first` the set to show first.
    """

    name: str
    scores: Scored
    subject: str
    illusion: str
    verdict: str
    written_for: str
    not_beaten: str
    no_better: str
    curve: Curve | None
    ladder: dict[str, Estimate | None]
    lacking: list[str]
    sets: dict[str, AttackScore | None]
    failed: list[RecordedFinding]
    passed: dict[str, list[RecordedFinding]]
    lowest: str
    weakest: list[tuple[str, Estimate]]
    efforts: dict[str, Effort]
    panels: dict[str, Panel]
    first: str


def write_report(
    out: Path, metrics: Metrics, entries: Sequence[Entry], results: Sequence[Result], plan: Plan,
    models: Sequence[Model],
) -> None:  # fmt: skip
    """Write the report on `entries`, what was counted of each, and the `models` behind them."""
    # For its shape and classes: no other image is needed.
    test = image_set.read(plan.test, range(1))
    scored = [
        _shown(entry, metrics.defenses[entry.name], result, plan)
        for entry, result in zip(entries, results, strict=True)
    ]
    curves = [each.curve for each in scored if each.curve]
    best = _best(scored)
    claimed, baseline = claims(entries, metrics.defenses), compared_baseline(metrics.defenses)
    probes = {e.name: e.scores.radius_curve for e in scored if e.scores.radius_curve}
    html = template(TEMPLATE).render(
        threat=describe_threat(metrics.threat_model),
        threat_model=metrics.threat_model,
        selftest=metrics.selftest,
        published=metrics.published,
        claims=claimed,
        conclusion=conclusion(claimed, metrics.defenses),
        reference=next((each for each in scored if each.name == baseline), None),
        shape=test.shape,
        classes=len(test.class_names),
        labels={n: one.label for each in scored for n, one in each.scores.attacks.items()},
        scored=scored,
        columns=[m for m in RUNGS if m in SHOWN or any(each.ladder[m] for each in scored)],
        hue_count=HUES,
        radius=describe_radius(metrics.threat_model),
        probed=sorted({point.n for points in probes.values() for point in points}),
        over_radius=over_radius(probes),
        over_passes=_over_passes(scored),
        class_names=test.class_names,
        wide=WIDE,
        over_rejected=_over_rejected(scored),
        detectors=[each for each in scored if each.scores.detection],
        # One axis for all, so that they can be compared.
        widest=0.5 if all(curve.points[-1][0] <= 0.5 for curve in curves) else 1.0,
        elsewhere=list(dict.fromkeys(name for each in scored for name in each.scores.elsewhere)),
        stand_ins=STAND_INS,
        roles={role: [each for each in scored if each.scores.role == role] for role in ROLES},
        best=best,
        shown_first=next((each for each in [best, *scored] if each and each.panels), None),
        meanings=MEANINGS,
        models=models,
        attacks=_settings(entries),
        plan=plan,
        versions=f"torch {torch.__version__}, Python {platform.python_version()}",
    )
    write_bytes(out, html.encode())


def _settings(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """Return every attack of any ladder as (name, settings), once for all that are alike."""
    named = {
        (attack_of(name), settings(attack.model_dump(mode="json", exclude_none=True)))
        for entry in entries
        for name, attack in entry.attacks.items()
    }
    return sorted(named)


def template(name: str) -> Template:
    """Return a template that lies beside this module."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "interval": interval,
        "settings": settings,
        "rung": rung_of,
        "attack": attack_of,
    }
    return environment.get_template(name)


def drawn(entry: Entry, found: Scored, result: Result) -> dict[str, Effort]:
    """Return the efforts to draw, in the order of the ladder: those of void rungs mean nothing."""
    named = [name for name in entry.sets if rung_of(name) not in found.void_rungs]
    return {name: result.efforts[name] for name in named if name in result.efforts}


def _shown(entry: Entry, found: Scored, result: Result, plan: Plan) -> Shown:
    check = attrgetter("check")
    passed = sorted((f for f in found.checks.findings if f.passed), key=check)
    return Shown(
        name=entry.name,
        scores=found,
        subject=describe_subject(entry.subject),
        illusion=illusion(entry.name, found),
        verdict=verdict(found),
        written_for=written_for(found),
        not_beaten=not_beaten(found),
        no_better=no_better(entry.name, found),
        curve=_curve(found.detection) if found.detection else None,
        ladder={mode: found.rungs.get(mode) for mode in RUNGS},
        lacking=[kind for kind in STAND_INS if kind not in entry.subject.stand_ins()],
        sets={name: found.attacks.get(name) for name in entry.sets},
        failed=found.checks.failed(),
        passed={name: list(group) for name, group in groupby(passed, key=check)},
        lowest=_lowest(found),
        weakest=sorted(found.per_class.items(), key=lambda each: each[1].accuracy),
        efforts=drawn(entry, found, result),
        panels={name: result.panels[name] for name in entry.sets if name in result.panels},
        first=first_shown(entry, found, plan),
    )


def _curve(detection: Detection) -> Curve:
    points = detection.curve
    return Curve(points, {name: points[CURVE.index(rate)] for name, rate in RATES.items()})


def _best(scored: Sequence[Shown]) -> Shown | None:
    """Return the defense with the highest lower bound among those without a blocking failure."""
    sound = [
        each
        for each in scored
        if each.scores.role == "defense" and not each.scores.headline.upper_bound
    ]
    return max(sound, key=lambda each: each.scores.headline.low, default=None)


def _lowest(found: Scored) -> str:
    """Return the rung with the lowest accuracy, void ones aside; "" where nothing was run."""
    sound = [mode for mode in RUNGS if mode in found.rungs and mode not in found.void_rungs]
    return min(sound, key=lambda mode: found.rungs[mode].accuracy, default="")


def _over_passes(scored: Sequence[Shown]) -> dict[str, Chart]:
    """Draw the images still right over passes, of every entry on the same axis, in like colours."""
    most = longest([each.efforts for each in scored])
    hues = list(dict.fromkeys(name for each in scored for name in each.efforts))
    return {
        each.name: over_passes(each.name, each.efforts, most, hues)
        for each in scored
        if each.efforts
    }


def _over_rejected(scored: Sequence[Shown]) -> dict[str, Chart]:
    """Draw the ROC curves of every detector, void rungs left out, in like colours."""
    sets = {
        each.name: {
            name: one
            for name, one in each.scores.detection.attacks.items()
            if rung_of(name) not in each.scores.void_rungs
        }
        for each in scored
        if each.scores.detection
    }
    hues = list(dict.fromkeys(name for each in sets.values() for name in each))
    return {name: over_rejected(name, each, hues) for name, each in sets.items()}


def first_shown(entry: Entry, found: Scored, plan: Plan) -> str:
    """Return the set to show first: of those that stay in the ball the one that leaves least.

    Of equal ones it is the one that carries most. The set that carries most of all may be a weak
    one: an image that many attacks fool is credited to the first. Outside the ball an example
    counts as clean, so a bounded attack shows better what was counted.
    """

    def strength(name: str) -> tuple[bool, float, int]:
        alone = found.attacks[name].accuracy
        return entry.attacks[name].inside(plan.threat), -alone, found.carried_by.get(name, 0)

    return max((name for name in entry.sets if name in found.attacks), key=strength, default="")


def first_panels(
    entries: Sequence[Entry],
    results: Sequence[Result],
    scored: Mapping[str, Scored],
    plan: Plan,
) -> dict[str, Panel]:
    """Return the panel that is shown first, of every entry that has one."""
    pairs = zip(entries, results, strict=True)
    found = {e.name: r.panels.get(first_shown(e, scored[e.name], plan)) for e, r in pairs}
    return {name: panel for name, panel in found.items() if panel}
