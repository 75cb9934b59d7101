"""List the registered defenses, or make one of them the champion.

`limpid promote` lists what is registered, highest robust accuracy first. `limpid promote atop
--reason TEXT`, or a version number in place of the name, makes one the champion; `--by worst
--min-clean 0.9` takes the one with the highest lower bound under the worst of all attacks. A
version that failed a blocking check, or is not byte for byte what was scored, is refused. So is one
that does not beat no defense and every control, unless `--anyway` is given with a reason; one that
is below adversarial training takes a reason. Where a defense was evaluated again in the same ball,
the older version is superseded: it too takes `--anyway` and a reason. `--sync` first registers this
checkout's scored defenses: in an empty store, or where the results came from DVC's cache.
"""

import argparse
import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from components.data.shards import DataError
from pipelines.errors import ConfigError, Failed
from pipelines.layout import METRICS, MODELS, PARAMS
from pipelines.runner.console import show
from pipelines.tasks import metrics
from pipelines.tracking import registry
from pipelines.tracking.registry import CHAMPION, NO_CHAMPION, SYNC, Version
from pipelines.tracking.tracker import Tracker

ORDERS = {"worst": "robust_accuracy_low", "clean": "clean_low"}


def main(argv: Sequence[str] | None = None) -> int:
    """List or promote.

    Raises ConfigError for a version that cannot be promoted, DataError without metrics or with
    damaged artifacts, and Failed with code 4 without a store.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("defense", nargs="?", help="a version number, or the name of a defense")
    parser.add_argument("--by", choices=sorted(ORDERS), help="take the best by this")
    parser.add_argument("--min-clean", type=float, default=0.0, help="clean accuracy, 0 to 1")
    parser.add_argument("--reason", help="why; kept with the version")
    parser.add_argument(
        "--anyway", action="store_true",
        help="with --reason: also where it is superseded, or beats no defense or a control not",
    )  # fmt: skip
    parser.add_argument("--sync", action="store_true", help="register what was evaluated here")
    parser.add_argument("--model", help="the registered model, by default that of params.yaml")
    options = parser.parse_args(argv)
    options.reason = (options.reason or "").strip()
    if options.defense and options.by:
        raise ConfigError(f"give {options.defense} or --by {options.by}, not both")
    # Imports torch.
    from pipelines.config.schema import load

    name = options.model or f"limpid-{load().data.kind}"
    if options.sync:
        _sync()
    try:
        client = registry.connect()
        found = registry.versions(client, name)
    except Exception as error:  # Any error of the store, or of the way to it.
        first = (str(error).splitlines() or [""])[0][:200]
        uri = registry.tracking_uri()
        raise Failed(4, f"the store at {uri} does not answer: {first}") from error
    if not found:
        raise ConfigError(f"there is no version of {name}; `dvc repro` or --sync registers them")
    if options.defense or options.by:
        _promote(client, name, found, options)
    else:
        _print(found, name)
    return 0


def _promote(client: Any, name: str, found: Sequence[Version], options: Any) -> None:
    """Make the version that is meant the champion, if nothing speaks against it."""
    chosen = _chosen(found, options)
    title = f"version {chosen.number} ({chosen.defense}) of {name}"
    if math.isnan(chosen.figure("robust_accuracy")) or not chosen.standing:
        raise ConfigError(f"{title} has no robust accuracy and verdict: register it by --sync")
    if chosen.failed:
        failed = ", ".join(chosen.failed)
        raise ConfigError(
            f"{title} failed {failed}: its accuracy is an upper bound, and it is not promoted"
        )
    if not chosen.valid:
        raise ConfigError(
            f"{title} does not say that its measurement is valid: register it by --sync"
        )
    if chosen.figure("clean") < options.min_clean:
        raise ConfigError(
            f"{title} gets {chosen.figure('clean'):.1%} of clean images right, less than "
            f"{options.min_clean:.1%}"
        )
    if problem := registry.damage(chosen):
        raise DataError(f"{title} is refused: {problem}")
    _require_worth(chosen, title, options)
    before = next((version for version in found if CHAMPION in version.aliases), None)
    reason = options.reason or (
        f"best by {options.by}, clean at least {options.min_clean:.1%}" if options.by else ""
    )
    if not reason:
        raise ConfigError("give a reason: --reason TEXT is kept with the champion")
    registry.promote(client, name, chosen, reason)
    instead = "" if before is None else f" instead of version {before.number} ({before.defense})"
    print(
        f"{CHAMPION} of {name} is now version {chosen.number} ({chosen.defense}){instead}: {reason}"
    )
    print(f"  {_beside(chosen)}")


def _require_worth(chosen: Version, title: str, options: Any) -> None:
    """Raise ConfigError for a defense that is worth too little for the reason that is given."""
    if chosen.superseded_by is not None and not (options.anyway and options.reason):
        raise ConfigError(
            f"{title} is superseded: version {chosen.superseded_by} is the same defense, evaluated "
            "later; it is not promoted without --anyway and --reason TEXT"
        )
    judged = chosen.tags.get("verdict", "")
    if chosen.standing in NO_CHAMPION and not (options.anyway and options.reason):
        raise ConfigError(
            f"{title} is {judged}; it is not promoted without --anyway and --reason TEXT"
        )
    if chosen.standing == "below" and not options.reason:
        raise ConfigError(f"{title} is {judged}; say by --reason TEXT why it is the champion")


def _chosen(found: Sequence[Version], options: Any) -> Version:
    """Return the version that is meant; ConfigError where there is none."""
    if options.by:
        if not any(version.standing for version in found):
            raise ConfigError("no registered version has a verdict: register them by --sync")
        newest = max(found, key=lambda version: version.evaluated)
        # Accuracies in other balls, or on other images, are no better or worse.
        like = [v for v in found if v.threat == newest.threat and v.superseded_by is None]
        sound = [version for version in like if version.valid and version.standing]
        if not options.anyway:
            sound = [version for version in sound if version.standing not in NO_CHAMPION]
        fit = [version for version in sound if version.figure("clean") >= options.min_clean]
        if not fit:
            raise ConfigError(
                f"of the newest evaluation ({_threat(newest)}, n = {newest.figure('n'):.0f}), no "
                "version without a failed blocking check that beats no defense and every control "
                f"reaches {options.min_clean:.1%} clean; --anyway takes those that beat them not"
            )
        return max(fit, key=lambda version: version.figure(ORDERS[options.by]))
    named = [v for v in found if options.defense in (str(v.number), v.defense)]
    if not named:
        known = ", ".join(f"{v.number} ({v.defense})" for v in found)
        raise ConfigError(f"there is no {options.defense}; there are {known}")
    # A defense that was trained or evaluated again is another version: the newest is meant.
    return max(named, key=lambda version: (version.evaluated, version.number))


def _sync() -> None:
    """Register what was evaluated in this folder."""
    from pipelines.config.schema import load
    from pipelines.reporting.registration import registrations, require_unchanged

    params = load()
    try:
        scored = metrics.read_unedited(METRICS)
        require_unchanged(params.defenses, MODELS)
        found = registrations(params.defenses, scored, MODELS, params.data.kind)
    except FileNotFoundError as error:
        raise DataError(f"{error.filename} is missing: `dvc repro` makes it") from None
    except KeyError as error:
        raise DataError(
            f"{METRICS} has no {error.args[0]}, which {PARAMS} names: `dvc repro` renews it"
        ) from None
    tracker = Tracker(SYNC, f"limpid-{params.data.kind}", {}, "")
    if problem := tracker.finish("FINISHED", found):
        raise Failed(4, problem)


def _print(found: Sequence[Version], name: str) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False, title=name)
    table.add_column("version", justify="right")
    for title in (
        "defense", "clean", "robust accuracy\n(worst of all attacks), 95 %", "n", "threat",
        "ms/image", "measurement\nvalid", "warnings", "alias",
    ):  # fmt: skip
        table.add_column(title, no_wrap=True, justify="left" if title == "defense" else "right")
    for one in found:
        low, high = one.figure("robust_accuracy_low"), one.figure("robust_accuracy_high")
        time = one.figure("ms_per_image")
        worst = f"{100 * one.figure('robust_accuracy'):.1f} ({100 * low:.1f}-{100 * high:.1f})"
        table.add_row(
            str(one.number), one.defense, f"{100 * one.figure('clean'):.1f}",
            f"<={worst}" if one.failed else worst, f"{one.figure('n'):.0f}", _threat(one),
            "-" if math.isnan(time) else f"{time:.3g}",
            f"no, {len(one.failed)} failed" if one.failed else "yes" if one.valid else "not said",
            f"{one.figure('warnings_count'):.0f}" if one.standing else "-", ", ".join(one.aliases),
            style="dim" if one.failed or one.superseded_by is not None else "",
        )  # fmt: skip
    show(table)
    for one in found:
        print(f"{one.number} {one.defense}: {_beside(one)}")


def _beside(version: Version) -> str:
    """Say what belongs beside the number: verdict, attacks written for the defense, warnings."""
    if not version.standing:
        return "without a verdict: register it by --sync"
    written = version.tags.get("attacks written for this defense", "none")
    newer = version.superseded_by
    return ("" if newer is None else f"superseded by version {newer}; ") + (
        f"{version.tags['verdict']}; attacks written for this defense: {written}; "
        f"{version.tags['warnings']}"
    )


def _threat(version: Version) -> str:
    """Return the norm and the radius of a version in short: `linf 51/255`."""
    norm, in_255, radius = version.ball
    return (
        "-"
        if norm is None
        else f"{norm} {radius:g}"
        if in_255 is None
        else f"{norm} {in_255:g}/255"
    )
