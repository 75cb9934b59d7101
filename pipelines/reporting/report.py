"""The report for people: one HTML file that needs no network, no script and no other file.

Every number in it comes from the metrics and what they were counted from. `report.html.j2` beside
this module is its form and holds the words, this module its content. Equal inputs give equal bytes.
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from components.attacks.ladder import MODES
from components.data import image_set
from components.data.shards import write_bytes
from components.evaluation.counting import Effort
from components.evaluation.detection import CURVE, RATES
from components.models.defense import STAND_INS
from pipelines.reporting.charts import (
    HUES,
    Chart,
    longest,
    over_passes,
    over_radius,
    over_rejected,
    radii,
)
from pipelines.reporting.networks import Model
from pipelines.reporting.wording import (
    MEANINGS,
    ROLES,
    describe_radius,
    describe_subject,
    describe_threat,
    illusion,
    interval,
    no_better,
    not_beaten,
    percent,
    settings,
    void_rungs,
)
from pipelines.tasks.panels import Panel
from pipelines.tasks.scoring import Entry, Plan, Result

TEMPLATE = "report.html.j2"
# Columns of the score table that are there even where nothing was run.
SHOWN = ("classifier", "bpda", "full")
# Classes that fit beside each other; of more, only those that stand worst are listed.
WIDE = 20


@dataclass(frozen=True)
class Curve:
    """A detector at every threshold: (clean images rejected, wrong answers let through).

    `marks` are the points of the thresholds that have numbers in the tables.
    """

    points: list[tuple[float, float]]
    marks: dict[str, tuple[float, float]]


def write_report(
    out: Path, metrics: Mapping[str, Any], entries: Sequence[Entry], results: Sequence[Result],
    plan: Plan, models: Sequence[Model],
) -> None:  # fmt: skip
    """Write the report on `entries`, what was counted of each, and the `models` behind them."""
    test = image_set.read(plan.test)
    found = metrics["defenses"]
    scored = [
        _scored(entry, found[entry.name], result, plan)
        for entry, result in zip(entries, results, strict=True)
    ]
    curves = [each["curve"] for each in scored if each["curve"]]
    best = _best(scored)
    html = form(TEMPLATE).render(
        threat=describe_threat(metrics["threat_model"]),
        threat_model=metrics["threat_model"],
        selftest=metrics["selftest"],
        published=metrics["published"],
        shape=test.shape,
        classes=len(test.class_names),
        scored=scored,
        columns=[m for m in MODES if m in SHOWN or any(each["ladder"][m] for each in scored)],
        hue_count=HUES,
        radius=describe_radius(metrics["threat_model"]),
        probed=sorted({score["n"] for e in scored for score in e["radii"].values()}),
        over_radius=over_radius({e["name"]: e["radii"] for e in scored if e["radii"]}),
        over_passes=_over_passes(scored),
        class_names=test.class_names,
        wide=WIDE,
        over_rejected=_over_rejected(scored),
        detectors=[each for each in scored if each["detection"]],
        # One axis for all, so that they can be compared.
        widest=0.5 if all(curve.points[-1][0] <= 0.5 for curve in curves) else 1.0,
        stand_ins=STAND_INS,
        roles={role: [each for each in scored if each["role"] == role] for role in ROLES},
        best=best,
        shown_first=next((each for each in [best, *scored] if each and each["panels"]), None),
        meanings=MEANINGS,
        models=models,
        attacks={name: attack.model_dump(mode="json") for name, attack in plan.attacks.items()},
        plan=plan,
        versions=f"torch {torch.__version__}, Python {platform.python_version()}",
    )
    write_bytes(out, html.encode())


def form(name: str) -> Template:
    """Return a template that lies beside this module."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "interval": interval, "settings": settings}
    return environment.get_template(name)


def drawn(entry: Entry, found: Mapping[str, Any], result: Result) -> dict[str, Effort]:
    """Return what the sets cost whose passes say something, in the order of the ladder."""
    void = void_rungs(found)
    named = [name for name in entry.sets if name.partition("/")[0] not in void]
    return {name: result.efforts[name] for name in named if name in result.efforts}


def _scored(entry: Entry, found: Mapping[str, Any], result: Result, plan: Plan) -> dict[str, Any]:
    """Return what the template shows of one entry."""
    findings = found["checks"]["findings"]
    failed = sorted((f for f in findings if not f["passed"]), key=lambda f: str(f["level"]))
    passed = sorted((f for f in findings if f["passed"]), key=_check)
    lacking = set(STAND_INS) - set(entry.subject.stand_ins())
    return {
        **found,
        "name": entry.name,
        "what": describe_subject(entry.subject),
        "illusion": illusion(entry.name, found),
        "not_beaten": not_beaten(found),
        "no_better": no_better(entry.name, found),
        "curve": _curve(found["detection"]) if found["detection"] else None,
        "ladder": {mode: found["rungs"].get(mode) for mode in MODES},
        "lacking": lacking,
        "void": void_rungs(found),
        "sets": {name: found["attacks"].get(name) for name in entry.sets},
        "failed": failed,
        "passed": {check: list(group) for check, group in groupby(passed, key=_check)},
        "lowest": _lowest(found),
        "weakest": sorted(found["per_class"].items(), key=lambda each: each[1]["accuracy"]),
        "radii": radii(found),
        "efforts": drawn(entry, found, result),
        "panels": {name: result.panels[name] for name in entry.sets if name in result.panels},
        "first": first_shown(entry, found, plan),
    }


def _check(finding: Mapping[str, Any]) -> str:
    return str(finding["name"]).partition("/")[0]


def _curve(detection: Mapping[str, Any]) -> Curve:
    points = [(float(rejected), float(passed)) for rejected, passed in detection["curve"]]
    return Curve(points, {name: points[CURVE.index(rate)] for name, rate in RATES.items()})


def _best(scored: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the defense with the highest lower bound among those without a blocking failure."""
    sound = [s for s in scored if s["role"] == "defense" and not s["headline"]["upper_bound"]]
    return max(sound, key=lambda each: float(each["headline"]["low"]), default=None)


def _lowest(found: Mapping[str, Any]) -> str:
    """Return the rung that leaves least, void ones aside; "" where nothing was run."""
    void = void_rungs(found)
    rungs = {mode: found["rungs"][mode] for mode in MODES if mode in found["rungs"]}
    sound = [mode for mode in rungs if mode not in void]
    return min(sound, key=lambda mode: float(rungs[mode]["accuracy"]), default="")


def _over_passes(scored: Sequence[Mapping[str, Any]]) -> dict[str, Chart]:
    """Draw what is left standing over passes, of every entry on the same axis, in like colours."""
    most = longest([each["efforts"] for each in scored])
    hues = list(dict.fromkeys(name for each in scored for name in each["efforts"]))
    return {
        each["name"]: over_passes(each["name"], each["efforts"], most, hues)
        for each in scored
        if each["efforts"]
    }


def _over_rejected(scored: Sequence[Mapping[str, Any]]) -> dict[str, Chart]:
    """Draw the ROC curves of every detector, void rungs left out, in like colours."""
    sets = {
        each["name"]: {
            name: seen
            for name, seen in each["detection"]["attacks"].items()
            if name.partition("/")[0] not in each["void"]
        }
        for each in scored
        if each["detection"]
    }
    hues = list(dict.fromkeys(name for each in sets.values() for name in each))
    return {name: over_rejected(name, each, hues) for name, each in sets.items()}


def first_shown(entry: Entry, found: Mapping[str, Any], plan: Plan) -> str:
    """Return the set to show first: of those that stay in the ball the one that carries most.

    Outside the ball an example counts as clean: a bounded attack shows better what was counted.
    """
    counted = [name for name in entry.sets if name in found["attacks"]]
    carried = found["carried_by"]
    return max(counted, key=lambda name: (plan.bounded(name), carried.get(name, 0)), default="")


def first_panels(
    entries: Sequence[Entry], results: Sequence[Result], scored: Mapping[str, Any], plan: Plan
) -> dict[str, Panel]:
    """Return the panel that is shown first, of every entry that has one."""
    pairs = zip(entries, results, strict=True)
    found = {e.name: r.panels.get(first_shown(e, scored[e.name], plan)) for e, r in pairs}
    return {name: panel for name, panel in found.items() if panel}
