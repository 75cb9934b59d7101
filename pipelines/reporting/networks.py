"""What is scored, and the trained networks behind it: what they were made from, how they learnt."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from components.attacks import L2, Linf, Threat
from components.data.shards import DataError
from components.models.checkpoints import ModelCard, fingerprint, read_card
from pipelines.reporting.wording import settings
from pipelines.tasks.entries import Entry, Plan
from pipelines.tasks.subject import Subject

SHORT = 12


@dataclass(frozen=True)
class Plot:
    """Metrics over epochs, on one axis from 0 to `top`."""

    title: str
    top: float
    series: dict[str, list[float]]


@dataclass(frozen=True)
class Model:
    """A trained network behind the scores, and what it was made from."""

    name: str
    mark: str
    card: ModelCard
    made_from: list[str]
    history: list[dict[str, float]]
    plots: list[Plot]
    terms: dict[str, float]


def trained(models: Path, entries: Sequence[Entry], plan: Plan) -> Iterator[Model]:
    """Yield the models behind the scores and, by their fingerprints, those they were made from.

    Other folders in `models` are ignored.
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


def describe_subject(subject: Subject) -> str:
    """Say what is scored: a bare classifier, or a purifier or control and what it stands before."""
    behind = f"{subject.classifier.name} ({describe_training(subject.classifier)})"
    if subject.bare:
        return f"bare classifier {behind}"
    if subject.control is not None:
        used = settings(subject.control.model_dump(mode="json"))
    elif subject.purifier is not None:
        used = f"purifier {subject.purifier.name}"
        if subject.inference is not None:
            # Without the switches that are off.
            kept = subject.inference.model_dump(mode="json", exclude_defaults=True)
            used += f" used as {settings(kept)}"
    return f"{used}, in front of {behind}"


def describe_training(classifier: Path) -> str:
    """Say how a classifier was trained, from its card."""
    made = read_card(classifier).provenance
    if "objective" not in made:
        return "training unknown"
    kind: str = made["objective"]["kind"]
    if kind == "classification":
        return "trained on clean images"
    ball: Linf | L2 = TypeAdapter(Threat).validate_python(made["threat"])
    return f"trained by {kind.replace('_', ' ')} within {ball.label}"


def _made_from(card: ModelCard) -> dict[str, str]:
    made_from: dict[str, str] = card.provenance.get("made_from", {})
    return made_from


def _model(folder: Path, known: Mapping[str, Path]) -> Model:
    card = read_card(folder)
    path = folder / "history.json"
    history: list[dict[str, float]] = json.loads(path.read_bytes()) if path.is_file() else []
    curves = {name: [epoch[name] for epoch in history] for name in (history or [{}])[0]}
    accuracies = {name: curves.pop(name) for name in sorted(curves) if "accuracy" in name}
    loss = {"loss": curves.pop("loss")} if "loss" in curves else {}
    plots = [
        Plot("loss", _rounded_up(max(max(line) for line in loss.values())) if loss else 1.0, loss),
        Plot("accuracy, %", 100.0, {n: [100 * v for v in line] for n, line in accuracies.items()}),
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
