"""The report for people: one HTML file that needs no network, no script and no other file.

Every number in it comes from the metrics; only pictures are made here. `report.html.j2` beside this
module is its form, this module its content. The same inputs give the same bytes.
"""

import base64
import io
import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from torch import Tensor

from components import data
from components.adversarial import read_crafted
from components.checkpoints import ModelCard, fingerprint, read_card
from components.data import ImageSet
from components.defense import Defense
from components.draws import Draws
from components.shards import DataError, write_bytes
from pipelines.scoring import CLEAN, MODES, Entry, Plan

TEMPLATE = "report.html.j2"
ROLES = {
    "baseline": "Baselines: bare classifiers",
    "defense": "Defenses",
    "control": "Controls: purifiers without training",
}
RUNGS = {"classifier": "grey box", "bpda": "BPDA", "full": "full gradient"}
BLIND = {
    "classifier": "ignores the purifier",
    "bpda": "takes the purifier for the identity in the backward pass (BPDA)",
}
MEANINGS = {
    "input_convention": "Attacks are given pixels in [0, 1]; normalisation is inside the classifier.",
    "logits": "Answers are finite, no softmax, and not the same for every image.",
    "randomness_declared": "The defense answers at random if, and only if, it is declared stochastic.",
    "gradient_present": "The gradient that attacks follow is neither zero nor infinite.",
    "unbounded": "With every image allowed, one of another class is taken for that other class.",
    "unbounded_by_gradient": "With every image allowed, following the gradient fools the defense.",
    "state_unchanged": "Scoring and probing changed no weight; everything was in eval mode.",
    "recorded_accuracy": "The bare classifier is as accurate as on the day it was trained.",
    "accounting": "Every test image is in the set exactly once, with its own label.",
    "threat_model": "The stored bytes are in [0, 1] and, where the attack is bounded, in the ball.",
    "provenance": "The set was crafted against the very models and images it is scored on.",
    "order_of_strength": "No attack fools what all stronger attacks together leave standing.",
    "full_is_strongest": "No weaker rung of the ladder fools what the full gradient leaves standing.",
    "full_rung": "At least one attack follows the exact gradient of the whole defense.",
}
# Width and height of a plot, and of the margins left of and below it, in SVG units.
PLOT, MARGIN = (250, 104), (42, 20)
TILE_PX = 76


@dataclass(frozen=True)
class Tile:
    """One picture of a panel: where it lies in the sprite (in %), and what is said under it."""

    x: float
    y: float
    words: str
    right: bool | None


@dataclass(frozen=True)
class Panel:
    """Pictures of one defense: rows of tiles over one sprite, a PNG as data URI.

    `labels` are the true classes of the columns; `side` is (width, height) of a tile in pixels.
    """

    source: str
    sprite: str
    grid: tuple[int, int]
    side: tuple[int, int]
    labels: list[str]
    rows: dict[str, list[Tile]]


@dataclass(frozen=True)
class Plot:
    """Curves over epochs on one axis; `series` maps a name to (last value, its y, SVG points)."""

    title: str
    top: str
    middle: str
    epochs: int
    series: dict[str, tuple[str, float, str]]


@dataclass(frozen=True)
class Model:
    """A trained network that plays a part in the scores, with what it was made from."""

    name: str
    card: ModelCard
    made_from: list[str]
    plots: list[Plot]
    terms: str


def write_report(
    out: Path, metrics: Mapping[str, Any], entries: Sequence[Entry], plan: Plan, models: Path,
    shown: int,
) -> None:  # fmt: skip
    """Write the report on `entries`, with the first `shown` test images each gets right."""
    test = data.read(plan.test)
    scored = [_scored(entry, metrics["defenses"][entry.name], plan, test, shown) for entry in entries]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "interval": interval, "settings": settings}
    html = environment.get_template(TEMPLATE).render(
        threat=describe_threat(metrics["threat_model"]),
        threat_model=metrics["threat_model"],
        shape=" x ".join(str(side) for side in test.shape),
        classes=len(test.class_names),
        roles={
            title: [each for each in scored if each["role"] == role] for role, title in ROLES.items()
        },
        scored=scored,
        best=_best(scored),
        rungs=RUNGS,
        meanings=MEANINGS,
        models=list(_models(models, entries, plan)),
        plot=PLOT,
        margin=MARGIN,
        attacks={name: attack.model_dump(mode="json") for name, attack in plan.attacks.items()},
        facts={"seed": plan.seed, "batch": plan.batch, "torch": version("torch"),
               "python": platform.python_version()},
    )  # fmt: skip
    write_bytes(out, html.encode())


def percent(share: float) -> str:
    """Return a share as per cent with one digit: 0.942 is `94.2 %`."""
    return f"{100 * share:.1f} %"


def interval(score: Mapping[str, Any]) -> str:
    """Return the interval of a score in per cent."""
    return f"{100 * score['low']:.1f}\N{EN DASH}{100 * score['high']:.1f}"


def settings(value: Mapping[str, Any]) -> str:
    """Return nested settings on one line: `kind pgd, steps 40`."""

    def text(part: Any) -> str:
        return f"({settings(part)})" if isinstance(part, Mapping) else str(part)

    return ", ".join(f"{key} {text(part)}" for key, part in value.items())


def describe_threat(threat: Mapping[str, Any]) -> str:
    """Say what the attacker may change; the radius in [0,1] and in 255ths."""
    if threat["norm"] == "linf":
        eps = float(threat["eps_255"])
        return (
            f"L-infinity, radius {eps:g}/255 = {eps / 255:.4g}: every pixel may change by that much"
        )
    eps = float(threat["eps_l2"])
    return (
        f"L2, radius {eps:g} = {255 * eps:g}/255: the whole image may move that far, in Euclidean "
        "distance over all its pixels"
    )


def illusions(name: str, found: Mapping[str, Any]) -> list[str]:
    """Say of every rung that shows robustness where there is none how much of it is left."""
    rungs = found["rungs"]
    return [
        f"{name} shows {percent(rungs[rung]['accuracy'])} when the attacker {BLIND[rung]}, and "
        f"{percent(rungs['full']['accuracy'])} when the attacker differentiates through it: "
        "the first number is no robustness."
        for rung in (illusion.partition(":")[0] for illusion in found["illusions"])
    ]


def _scored(
    entry: Entry, found: Mapping[str, Any], plan: Plan, test: ImageSet, shown: int
) -> dict[str, Any]:
    """Return what the template shows of one entry."""
    findings = found["checks"]["findings"]
    failed = {finding["name"] for finding in findings if not finding["passed"]}
    passed = sorted((f for f in findings if f["passed"]), key=lambda f: _check(f))
    control = entry.subject.control
    what = f"bare classifier {entry.subject.classifier.name}"
    if entry.subject.purifier is not None:
        what = f"purifier {entry.subject.purifier.name}"
    elif control is not None:
        what = settings(control.model_dump(mode="json"))
    return {
        **found,
        "name": entry.name,
        "what": what,
        "illusions": illusions(entry.name, found),
        "ladder": {mode: found["rungs"].get(mode) for mode in MODES},
        "void": {mode: f"gradient_present/{mode}" in failed for mode in MODES},
        "sets": {name: found["attacks"].get(name) for name in entry.sets},
        "failed": sorted((f for f in findings if not f["passed"]), key=lambda f: f["level"]),
        "passed": {check: list(group) for check, group in groupby(passed, key=_check)},
        "panel": _panel(entry, found, plan, test, shown),
    }


def _check(finding: Mapping[str, Any]) -> str:
    return str(finding["name"]).partition("/")[0]


def _best(scored: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the defense of the highest lower bound among those no blocking check speaks against."""
    sound = [s for s in scored if s["role"] == "defense" and not s["headline"]["upper_bound"]]
    return max(sound, key=lambda each: float(each["headline"]["low"]), default=None)


def _panel(
    entry: Entry, found: Mapping[str, Any], plan: Plan, test: ImageSet, shown: int
) -> Panel | None:
    """Picture the first images `entry` gets right when clean, under the attack that hurts most.

    Words under a picture are what the bare classifier says of that very picture.
    """
    carriers = {n: count for n, count in found["carried_by"].items() if n != CLEAN}
    # Outside the ball an example counts as clean, so a bounded attack shows better what was counted.
    source = max(carriers, key=lambda n: (plan.bounded(n), carriers[n]), default=None)
    defense = entry.subject.defense()
    rows = _right(defense, test, plan, shown)
    if source is None or not len(rows):
        return None
    chosen = test[rows]
    clean, attacked = chosen.pixels(), read_crafted(entry.sets[source]).images[rows]
    with torch.no_grad():
        purified = defense.purify(attacked, Draws(plan.seed, "score", chosen.ids))
    change = (attacked - clean).abs()
    gain = max(1, math.floor(1 / max(float(change.max()), 1e-6)))
    pictures = {"clean": clean, "adversarial": attacked, "purified": purified}
    if defense.purifier is None:
        del pictures["purified"]
    count, (_, height, width) = len(rows), test.shape
    scale = max(1, round(TILE_PX / max(height, width)))
    tiles = {
        name: _tiles(_say(defense, x, chosen), _percentage(row, len(pictures) + 1))
        for row, (name, x) in enumerate(pictures.items())
    }
    distances = [(f"L2 {float(part.norm()):.2f}", None) for part in change]
    return Panel(
        source=f"{source} (carries {carriers[source]} of {found['headline']['n']} images)",
        sprite=_sprite([*pictures.values(), gain * change]),
        grid=(100 * count, 100 * (len(pictures) + 1)),
        side=(scale * width, scale * height),
        labels=[chosen.class_names[int(label)] for label in chosen.labels],
        rows={**tiles, f"|difference| x {gain}": _tiles(distances, 100.0)},
    )


def _right(defense: Defense, test: ImageSet, plan: Plan, shown: int) -> Tensor:
    """Return the rows of the first `shown` test images that are classified right when clean."""
    found: list[int] = []
    for start in range(0, len(test), plan.batch):
        rows = torch.arange(start, min(start + plan.batch, len(test)))
        images = test[rows]
        with torch.no_grad():
            logits = defense(images.pixels(), Draws(plan.seed, "score", images.ids))
        found += rows[logits.argmax(1) == images.labels].tolist()
        if len(found) >= shown:
            break
    return torch.tensor(found[:shown], dtype=torch.int64)


def _say(defense: Defense, x: Tensor, images: ImageSet) -> list[tuple[str, bool | None]]:
    """Return what the bare classifier says of every picture, and whether it is right."""
    with torch.no_grad():
        confidence, answer = defense.classifier(x).softmax(1).max(1)
    names = [images.class_names[int(index)] for index in answer]
    right = (answer == images.labels).tolist()
    said = [f"{n} ({100 * c:.0f} %)" for n, c in zip(names, confidence.tolist(), strict=True)]
    return list(zip(said, right, strict=True))


def _tiles(said: Sequence[tuple[str, bool | None]], y: float) -> list[Tile]:
    return [
        Tile(_percentage(column, len(said)), y, words, right)
        for column, (words, right) in enumerate(said)
    ]


def _percentage(index: int, count: int) -> float:
    """Return the CSS background position of one of `count` tiles."""
    return round(100 * index / max(count - 1, 1), 4)


def _sprite(rows: Sequence[Tensor]) -> str:
    """Return a PNG of rows of images (S,C,H,W) in [0,1], as a data URI."""
    whole = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    pixels = (whole.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _models(models: Path, entries: Sequence[Entry], plan: Plan) -> Iterator[Model]:
    """Yield the models behind the scores and, by their fingerprints, those they were made from.

    What merely lies in the folder is passed over.
    """
    known = {}
    for folder in sorted(path for path in models.iterdir() if path.is_dir()):
        try:
            known[fingerprint(folder)] = folder
        except DataError:
            continue
    subjects = [entry.subject for entry in entries]
    waiting = [plan.unseen, *(s.classifier for s in subjects), *(s.purifier for s in subjects)]
    found: dict[str, Model] = {}
    while waiting:
        folder = waiting.pop()
        if folder is None or folder.name in found:
            continue
        found[folder.name] = _model(folder, known)
        made_from = found[folder.name].card.provenance.get("made_from", {})
        waiting += [known.get(mark) for mark in made_from.values()]
    yield from sorted(found.values(), key=lambda model: (model.card.family, model.name))


def _model(folder: Path, known: Mapping[str, Path]) -> Model:
    card = read_card(folder)
    path = folder / "history.json"
    history: list[dict[str, float]] = json.loads(path.read_bytes()) if path.is_file() else []
    accuracies = {name for epoch in history for name in epoch if "accuracy" in name}
    plots, last = [], history[-1] if history else {}
    if history:
        plots.append(_plot("loss", history, ["loss"], None))
        plots.append(_plot("accuracy, %", history, sorted(accuracies), 1.0))
    terms = [name for name in last if name != "loss" and name not in accuracies]
    return Model(
        name=folder.name,
        card=card,
        made_from=[
            f"{role}: {known[mark].name if mark in known else 'no longer there'} {mark[:12]}"
            for role, mark in card.provenance.get("made_from", {}).items()
        ],
        plots=[plot for plot in plots if plot.series],
        terms=", ".join(f"{name} {last[name]:.3g}" for name in terms),
    )


def _plot(
    title: str, history: Sequence[Mapping[str, float]], names: Sequence[str], top: float | None
) -> Plot:
    """Draw metrics over epochs from 0 to `top` (None: to the first round number above them)."""
    values = {n: [epoch[n] for epoch in history] for n in names if all(n in e for e in history)}
    high = top or _rounded_up(max((max(line) for line in values.values()), default=1.0))
    scale = 100.0 if top else 1.0
    (width, height), (left, _) = PLOT, MARGIN

    def y(value: float) -> float:
        return round(height * (1 - min(max(value / high, 0.0), 1.0)) + 6, 1)

    def points(line: Sequence[float]) -> str:
        step = width / max(len(line) - 1, 1)
        start = left if len(line) > 1 else left + width
        return " ".join(f"{start + step * i:.1f},{y(value)}" for i, value in enumerate(line))

    return Plot(
        title=title,
        top=f"{scale * high:g}",
        middle=f"{scale * high / 2:g}",
        epochs=len(history),
        series={
            name.replace("_", " "): (
                percent(line[-1]) if top else f"{line[-1]:.3g}", y(line[-1]), points(line)
            )
            for name, line in values.items()
        },
    )  # fmt: skip


def _rounded_up(value: float) -> float:
    """Return the least of 1, 2, 5 times a power of ten that is not below `value`."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(float(f"{m * power:.6g}") for m in (1, 2, 5, 10) if m * power >= value * 0.999999)
