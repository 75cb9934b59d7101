"""The report for people: one HTML file that needs no network, no script and no other file.

Every number in it comes from the metrics and what they were counted from. `report.html.j2` beside
this module is its form and holds the words, this module its content. Equal inputs give equal bytes.
"""

import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from components import data
from components.checkpoints import ModelCard, fingerprint, read_card
from components.defense import STAND_INS
from components.detection import CURVE, RATES
from components.evaluation import Effort
from components.shards import DataError, write_bytes
from pipelines.crafting import Subject
from pipelines.curves import (
    HUES,
    Chart,
    longest,
    over_passes,
    over_radius,
    over_rejected,
    radii,
)
from pipelines.microscope import Panel
from pipelines.params import MODES
from pipelines.scoring import Entry, Plan, Result

TEMPLATE = "report.html.j2"
ROLES = ("baseline", "defense", "control")
# Columns of the score table that are there even where nothing was run.
SHOWN = ("classifier", "bpda", "full")
# Classes that fit beside each other; of more, only those that stand worst are listed.
WIDE = 20
BLIND = {
    "transfer": "has only another classifier",
    "classifier": "ignores the purifier",
    "bpda": "takes the purifier for the identity in the backward pass (BPDA)",
}
MEANINGS = {
    "input_convention": "Attacks are given pixels in [0, 1]; normalisation is the classifier's.",
    "logits": "Answers are finite, no softmax, and not the same for every image.",
    "randomness_declared": "The defense answers at random exactly if it is declared stochastic.",
    "batch_independence": "An image is answered alike in any company.",
    "labels_unseen": "The defense answers by the picture, not by whose picture it is.",
    "gradient_present": "The gradient that attacks follow is neither zero nor infinite.",
    "gradient_correct": "The gradient says what differences measure, in halves and whole.",
    "loss_alive": "The cross-entropy has a gradient where the margin has one.",
    "eot_agreement": "Two estimates of the gradient over the noise point one way.",
    "unbounded": "With every image allowed, one of another class is not taken for the true one.",
    "unbounded_by_gradient": "With every image allowed, following the gradient fools the defense.",
    "radius_pays": "A larger radius never protects.",
    "converged": "More steps fool no more of the images that stood.",
    "planted": "The attack finds adversarial examples that are known to exist.",
    "repeatable": "The same seed gives the same bytes; other seeds give about the same accuracy.",
    "chance": "Little of the accuracy is owed to noise the attacker cannot foresee.",
    "eot_enough": "Twice the draws per gradient fool no more images.",
    "state_unchanged": "Scoring and probing changed no weight; everything was in eval mode.",
    "recorded_accuracy": "The bare classifier is as accurate as on the day it was trained.",
    "leakage": "No test image was learnt from.",
    "accounting": "Every test image is in the set exactly once, with its own label.",
    "threat_model": "The stored bytes are in [0, 1] and, where the attack is bounded, in the ball.",
    "provenance": "The set was crafted as params.yaml says, against what it is scored on.",
    "effort": "Images that withstood were attacked for as long as the attack's name promises.",
    "quantisation": "Rounded to 8 bits, the worst examples fool as many.",
    "order_of_strength": "No attack fools what all stronger attacks together leave standing.",
    "white_is_strongest": "Without gradients next to nothing more is fooled.",
    "full_is_strongest": "No weaker rung fools what attacks that see through leave standing.",
    "full_rung": "At least one attack follows the gradient of the defense or of a stand-in.",
    "stand_ins": "What iterates or rounds is attacked through something easier in its place, too.",
    "strong_attack": "At least one attack that sees through has the steps and the reach.",
    "scoring_draws": "A random defense is judged by many draws.",
    "selection": "No single attack does better than the worst of all, chosen image by image.",
    "undefended_falls": "A classifier without a defense is fooled on nearly every image.",
}
SHORT = 12


@dataclass(frozen=True)
class Curve:
    """A detector at every threshold: (clean images rejected, wrong answers let through).

    `marks` are the points of the thresholds that have numbers in the tables.
    """

    points: list[tuple[float, float]]
    marks: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Plot:
    """Metrics over epochs, on one axis from 0 to `top`."""

    title: str
    top: float
    series: dict[str, list[float]]


@dataclass(frozen=True)
class Model:
    """A trained network that plays a part in the scores, and what it was made from."""

    name: str
    mark: str
    card: ModelCard
    made_from: list[str]
    history: list[dict[str, float]]
    plots: list[Plot]
    terms: dict[str, float]


def write_report(
    out: Path, metrics: Mapping[str, Any], entries: Sequence[Entry], results: Sequence[Result],
    plan: Plan, models: Sequence[Model],
) -> None:  # fmt: skip
    """Write the report on `entries`, what was counted of each, and the `models` behind them."""
    test = data.read(plan.test)
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


def percent(share: float) -> str:
    """Return a share as per cent with one digit: 0.942 is `94.2 %`."""
    return f"{100 * share:.1f} %"


def interval(score: Mapping[str, Any]) -> str:
    """Return the interval of a score in per cent."""
    return f"{100 * score['low']:.1f}\N{EN DASH}{100 * score['high']:.1f}"


def settings(value: Mapping[str, Any]) -> str:
    """Return nested settings on one line, the kind first: `pgd, steps 40, random_start yes`."""

    def text(part: Any) -> str:
        if isinstance(part, Mapping):
            return f"({settings(part)})"
        if part is None:
            return "none"
        return ("no", "yes")[part] if isinstance(part, bool) else str(part)

    kind = [str(value["kind"])] if "kind" in value else []
    return ", ".join([*kind, *(f"{key} {text(value[key])}" for key in value if key != "kind")])


def describe_threat(threat: Mapping[str, Any]) -> str:
    """Say what the attacker may change; the radius in [0,1] and in 255ths."""
    radius = describe_radius(threat)
    if threat["norm"] == "linf":
        return f"L-infinity, radius {radius}: no pixel changes by more"
    return f"L2, radius {radius}: no image moves further, in Euclidean distance over all its pixels"


def describe_radius(threat: Mapping[str, Any]) -> str:
    """Return the radius in 255ths and in [0,1]."""
    if threat["norm"] == "linf":
        eps = float(threat["eps_255"])
        return f"{eps:g}/255 = {eps / 255:.4g}"
    eps = float(threat["eps_l2"])
    return f"{255 * eps:g}/255 = {eps:g}"


def illusion(name: str, found: Mapping[str, Any]) -> str:
    """Say what is left of the rungs that show robustness where there is none; "" if none does."""
    rungs = found["rungs"]
    blind = [text.partition(":")[0] for text in found["illusions"]]
    if not blind:
        return ""
    seen = ", ".join(
        f"{percent(rungs[rung]['accuracy'])} when the attacker {BLIND[rung]}" for rung in blind
    )
    which = ("number is", "two numbers are", "three numbers are")[len(blind) - 1]
    left = percent(found["white_box"]["accuracy"])
    return (
        f"{name} shows {seen}, and {left} when the attacker differentiates through it: "
        f"the first {which} no robustness."
    )


def not_beaten(found: Mapping[str, Any]) -> str:
    """Say which controls and bare classifiers a defense does not beat; "" if it beats them all."""
    rivals = found.get("not_better_than", {})
    said = [
        f"{name} ({100 * rival['difference']:+.1f} points, p = {rival['p']:.2g})"
        for name, rival in rivals.items()
    ]
    return f"does not beat {', '.join(said)}" if said else ""


def no_better(name: str, found: Mapping[str, Any]) -> str:
    """Say on how many sets a detector is no better than the control; "" if it mostly is better.

    Sets of a void rung are passed over: there the attack had nothing to follow.
    """
    if found["detection"] is None:
        return ""
    void = void_rungs(found)
    sets = [
        each
        for attack, each in found["detection"]["attacks"].items()
        if attack.partition("/")[0] not in void
    ]
    as_well = sum(each["control_auc"] >= each["auc"] for each in sets)
    if 2 * as_well <= len(sets):
        return ""
    return f"{name} on {as_well} of {len(sets)} sets"


def void_rungs(found: Mapping[str, Any]) -> list[str]:
    """Return the rungs without a usable gradient: what was run there proves nothing."""
    failed = {*found["checks"]["blocking_failed"], *found["checks"]["warnings"]}
    return [mode for mode in MODES if f"gradient_present/{mode}" in failed]


def drawn(entry: Entry, found: Mapping[str, Any], result: Result) -> dict[str, Effort]:
    """Return what the sets cost whose passes say something, in the order of the ladder."""
    void = void_rungs(found)
    named = [name for name in entry.sets if name.partition("/")[0] not in void]
    return {name: result.efforts[name] for name in named if name in result.efforts}


def describe_subject(subject: Subject) -> str:
    """Say what is scored: a bare classifier, a purifier and how it is used, or a control."""
    if subject.control is not None:
        return settings(subject.control.model_dump(mode="json"))
    if subject.purifier is None:
        return f"bare classifier {subject.classifier.name}"
    if subject.inference is None:
        return f"purifier {subject.purifier.name}"
    used = settings(subject.inference.model_dump(mode="json"))
    return f"purifier {subject.purifier.name} used as {used}"


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


def trained(models: Path, entries: Sequence[Entry], plan: Plan) -> Iterator[Model]:
    """Yield the models behind the scores and, by their fingerprints, those they were made from.

    What merely lies in the folder is passed over.
    """
    known: dict[str, Path] = {}
    for folder in sorted(path for path in models.iterdir() if path.is_dir()):
        try:
            known[fingerprint(folder)] = folder
        except DataError:
            continue
    subjects = [entry.subject for entry in entries]
    folders = [plan.unseen, *(s.classifier for s in subjects), *(s.purifier for s in subjects)]
    waiting = [folder for folder in folders if folder is not None]
    found: dict[str, Model] = {}
    while waiting:
        folder = waiting.pop()
        if folder.name not in found:
            model = found[folder.name] = _model(folder, known)
            waiting += [known[mark] for mark in _made_from(model.card).values() if mark in known]
    yield from sorted(found.values(), key=lambda model: (model.card.family, model.name))


def _made_from(card: ModelCard) -> dict[str, str]:
    made_from: dict[str, str] = card.provenance.get("made_from", {})
    return made_from


def _model(folder: Path, known: Mapping[str, Path]) -> Model:
    card = read_card(folder)
    path = folder / "history.json"
    history: list[dict[str, float]] = json.loads(path.read_bytes()) if path.is_file() else []
    curves = {name: [epoch[name] for epoch in history] for name in (history or [{}])[0]}
    shares = {name: curves.pop(name) for name in sorted(curves) if "accuracy" in name}
    loss = {"loss": curves.pop("loss")} if "loss" in curves else {}
    plots = [
        Plot("loss", _rounded_up(max(max(line) for line in loss.values())) if loss else 1.0, loss),
        Plot("accuracy, %", 100.0, {n: [100 * v for v in line] for n, line in shares.items()}),
    ]
    return Model(
        name=folder.name,
        mark=fingerprint(folder)[:SHORT],
        card=card,
        made_from=[
            f"{role}: {known[mark].name if mark in known else 'no longer there'} {mark[:SHORT]}"
            for role, mark in _made_from(card).items()
        ],
        history=history,
        plots=[plot for plot in plots if plot.series],
        terms={name: line[-1] for name, line in curves.items()},
    )


def _rounded_up(value: float) -> float:
    """Return the least of 1, 2, 5 times a power of ten that is not below `value`."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(float(f"{m * power:.6g}") for m in (1, 2, 5, 10) if m * power >= value * 0.999999)
