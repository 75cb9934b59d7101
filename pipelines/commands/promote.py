"""List the registered defenses, and make one the champion: limpid promote.

Without arguments it lists what is registered, best headline first. `promote atop --reason TEXT`, or
a version number in place of the name, makes one the champion; `promote --by worst --min-clean 0.9`
takes the one with the highest lower bound under the worst of all attacks. What failed a blocking
check, or is not byte for byte what was scored, is refused. `--sync` registers what was evaluated
here, where the store has not heard of it: a fresh one, or results that came from a cache.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from pipelines.config.schema import Params, load
from pipelines.errors import ConfigError
from pipelines.reporting.registration import registrations
from pipelines.runner.console import refuse, show
from pipelines.tracking import registry
from pipelines.tracking.registry import CHAMPION, Version
from pipelines.tracking.tracker import Tracker

METRICS, MODELS = Path("reports/metrics.json"), Path("models")
ORDERS = {"worst": "headline_low", "clean": "clean_low"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 2 for what cannot be promoted, 3 without metrics, 4 without a store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("defense", nargs="?", help="a version number, or the name of a defense")
    parser.add_argument("--by", choices=sorted(ORDERS), help="take the best by this")
    parser.add_argument("--min-clean", type=float, default=0.0, help="clean accuracy, 0 to 1")
    parser.add_argument("--reason", help="why; kept with the version")
    parser.add_argument("--sync", action="store_true", help="register what was evaluated here")
    parser.add_argument("--model", help="the registered model, by default that of params.yaml")
    options = parser.parse_args(argv)
    if options.defense and options.by:
        return refuse(f"say {options.defense} or --by {options.by}, not both")
    try:
        params = load()
        name = options.model or f"limpid-{params.data.kind}"
        if options.sync and (problem := _sync(params)):
            return refuse(problem, 3)
        client = registry.connect()
        found = registry.versions(client, name)
    except ConfigError as error:
        return refuse(str(error))
    except Exception as error:  # Whatever a store may raise.
        first = (str(error).splitlines() or [""])[0][:200]
        return refuse(f"the store at {registry.tracking_uri()} does not answer: {first}", 4)
    if not found:
        return refuse(f"there is no version of {name}; `dvc repro` or --sync registers them")
    if not options.defense and not options.by:
        _print(found, name)
        return 0
    return _promote(client, name, found, options)


def _promote(client: Any, name: str, found: Sequence[Version], options: Any) -> int:
    try:
        chosen = _chosen(found, options)
    except ValueError as error:
        return refuse(str(error))
    title = f"version {chosen.number} ({chosen.defense}) of {name}"
    if chosen.failed:
        failed = ", ".join(chosen.failed)
        return refuse(f"{title} failed {failed}: its number is an upper bound, it stays what it is")
    if math.isnan(chosen.figure("headline")):
        return refuse(f"{title} has no headline: register it by --sync")
    if chosen.figure("clean") < options.min_clean:
        return refuse(
            f"{title} gets {chosen.figure('clean'):.1%} of clean images right, less than "
            f"{options.min_clean:.1%}"
        )
    if problem := registry.damage(chosen):
        return refuse(f"{title} is refused: {problem}", 3)
    before = next((version for version in found if CHAMPION in version.aliases), None)
    reason = options.reason or (
        f"best by {options.by}, clean at least {options.min_clean:.1%}" if options.by else ""
    )
    if not reason:
        return refuse("say why: --reason TEXT is kept with the champion")
    registry.promote(client, name, chosen, reason)
    instead = "" if before is None else f" instead of version {before.number} ({before.defense})"
    print(
        f"{CHAMPION} of {name} is now version {chosen.number} ({chosen.defense}){instead}: {reason}"
    )
    return 0


def _chosen(found: Sequence[Version], options: Any) -> Version:
    """Return the version that is meant; ValueError where there is none."""
    if options.by:
        fit = [v for v in found if not v.failed and v.figure("clean") >= options.min_clean]
        if not fit:
            raise ValueError(
                f"no version without a failed blocking check reaches {options.min_clean:.1%} clean"
            )
        return max(fit, key=lambda version: version.figure(ORDERS[options.by]))
    named = [v for v in found if options.defense in (str(v.number), v.defense)]
    if not named:
        known = ", ".join(f"{v.number} ({v.defense})" for v in found)
        raise ValueError(f"there is no {options.defense}; there are {known}")
    # The same defense trained anew is another version: the newest is meant.
    return max(named, key=lambda version: version.number)


def _sync(params: Params) -> str:
    """Register what was evaluated in this folder; return what is wrong, if anything."""
    try:
        metrics = json.loads(METRICS.read_bytes())
        found = registrations(params.defenses, metrics, MODELS, params.data.kind)
    except FileNotFoundError as error:
        return f"{error.filename} is missing: `dvc repro` makes it"
    except (ValueError, KeyError) as error:
        return f"{METRICS} does not fit params.yaml ({error}): `dvc repro` renews it"
    tracker = Tracker("sync", f"limpid-{params.data.kind}", {}, "")
    return tracker.finish("FINISHED", found)


def _print(found: Sequence[Version], name: str) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False, title=name)
    table.add_column("version", justify="right")
    for title in ("defense", "clean", "worst case, 95 %", "n", "ms/image", "checks", "alias"):
        table.add_column(title, no_wrap=True, justify="left" if title == "defense" else "right")
    for one in found:
        low, high = one.figure("headline_low"), one.figure("headline_high")
        time = one.figure("ms_per_image")
        worst = f"{100 * one.figure('headline'):.1f} ({100 * low:.1f}-{100 * high:.1f})"
        table.add_row(
            str(one.number), one.defense, f"{100 * one.figure('clean'):.1f}",
            f"<={worst}" if one.failed else worst, f"{one.figure('n'):.0f}",
            "-" if math.isnan(time) else f"{time:.3g}",
            f"{len(one.failed)} failed" if one.failed else "ok",
            ", ".join(one.aliases), style="dim" if one.failed else "",
        )  # fmt: skip
    show(table)
