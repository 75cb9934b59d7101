"""What DVC shows: a few numbers of every defense, tables of its curves, a picture of the ladder.

Tables are CSV, one file per curve; the pages that DVC makes of them load Vega from the network. The
picture, `ladder.svg`, needs no network.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from components.attacks.contract import MODES
from components.data.shards import write_bytes, write_json
from components.evaluation.counting import Effort
from components.models.defense import STAND_INS
from pipelines.reporting.networks import Model
from pipelines.reporting.report import template
from pipelines.tasks.metrics import Metrics, RadiusPoint, Scored
from pipelines.tasks.panels import Panel, enlarged

PICTURE = "plots.svg.j2"


def write_plots(
    out: Path, metrics: Metrics, efforts: Mapping[str, Mapping[str, Effort]],
    models: Sequence[Model], panels: Mapping[str, Panel],
) -> None:  # fmt: skip
    """Write into the folder `out`; `efforts` are those to draw of every entry, by its sets.

    `compute/` holds the fraction of images that all of these sets together have not fooled within
    so many passes each, `pictures/` the panel of every entry that has one.
    """
    scored = metrics.defenses
    ladders = {name: list(_ladder(name, scored[name])) for name in efforts}
    _table(out / "ladder.csv", [step for ladder in ladders.values() for step in ladder])
    write_bytes(out / "ladder.svg", _picture(ladders, scored, metrics.threat_model.n))
    for name, sets in efforts.items():
        # DVC refuses an empty plot: where nothing was probed, the curve is its left end.
        one = scored[name].clean
        clean = RadiusPoint(accuracy=one.accuracy, low=one.low, high=one.high, n=one.n, radius=0.0)
        probe = scored[name].radius_curve or [clean]
        columns = ("radius", "accuracy", "low", "high", "n")
        rows = [{column: getattr(point, column) for column in columns} for point in probe]
        _table(out / "radius" / f"{name}.csv", rows)
        if sets:
            curve = Effort.together(list(sets.values())).curve()
            rows = [{"passes": passes, "standing": standing} for passes, standing in curve]
            _table(out / "compute" / f"{name}.csv", rows)
    for name, panel in panels.items():
        write_bytes(out / "pictures" / f"{name}.png", enlarged(panel))
    for model in models:
        if model.history:
            epochs = [{"epoch": at + 1, **epoch} for at, epoch in enumerate(model.history)]
            _table(out / "training" / f"{model.name}.csv", epochs)


def write_headlines(out: Path, metrics: Metrics) -> None:
    """Write into the folder `out` the few numbers of every entry that `dvc metrics` prints."""
    for name, found in metrics.defenses.items():
        few = {
            "clean": found.clean.accuracy,
            "robust_accuracy": found.headline.accuracy,
            "low": found.headline.low,
            "high": found.headline.high,
            "blocking_failed": len(found.checks.blocking_failed),
            "warnings": len(found.checks.warnings),
        }
        if found.white_box is not None:
            few["white_box"] = found.white_box.accuracy
        write_json(out / f"{name}.json", few)


def _ladder(name: str, found: Scored) -> Iterable[dict[str, Any]]:
    """Yield the clean accuracy, every rung and the robust accuracy of one entry."""
    rungs = {mode: found.rungs[mode] for mode in MODES if mode in found.rungs}
    for rung, score in {"clean": found.clean, **rungs, "robust accuracy": found.headline}.items():
        counted = {key: getattr(score, key) for key in ("low", "high", "n", "accuracy")}
        yield {"step": f"{name}, {rung}", "defense": name, "rung": rung, **counted}


def _picture(
    ladders: Mapping[str, Sequence[Mapping[str, Any]]], scored: Mapping[str, Scored], n: int
) -> bytes:
    rungs = {str(step["rung"]) for ladder in ladders.values() for step in ladder}
    used = [rung for rung in ("clean", *MODES) if rung in rungs and rung not in STAND_INS]
    svg = template(PICTURE).render(
        ladders=ladders,
        n=n,
        used=[*used, *(["stand-in"] if rungs & set(STAND_INS) else [])],
        bounds=[name for name in ladders if scored[name].headline.upper_bound],
        void={name: scored[name].void_rungs for name in ladders},
    )
    return svg.encode()


def _table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, text.getvalue().encode())
