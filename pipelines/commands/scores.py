"""Print scores, verdicts and warnings of reports/metrics.json.

Exit codes: 0, 2 metrics that are missing or cannot be read.
"""

import argparse
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from components.data.shards import DataError
from pipelines.errors import ConfigError
from pipelines.layout import METRICS, REPORT
from pipelines.reporting.wording import (
    ROLES,
    describe_threat,
    illusion,
    verdict,
    written_for,
)
from pipelines.tasks import metrics
from pipelines.tasks.metrics import Estimate, Metrics, Scored

MLFLOW = "mlflow server --backend-store-uri sqlite:///mlflow.db --workers 1"
# Without the query the UI shows models as agents, and no metrics.
UI = "http://127.0.0.1:5000/#/experiments?workflowType=machine_learning"
WIDTH = 80
NUMBERS = (
    "clean", "grey", "BPDA", "full", "robust accuracy\n(worst of all\nattacks), 95 %", "unseen",
    "rnd", "measure-\nment\nvalid",
)  # fmt: skip
NOTES = (
    "All in % of n = {n} test images; {threat}. robust accuracy: the worst of all attacks per "
    "image, with its Wilson interval. measurement valid: no, if a blocking check failed; then it "
    "is an upper bound (<=), as on a quick ladder. +1: one warning. grey: the attacker sees only "
    "the classifier, which is never robust accuracy. unseen: a classifier that played no part in "
    "training, clean/same worst examples: a transfer. void: there was no gradient to follow. -: "
    "not run. rnd: random. Other rungs and detection are in the report."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--metrics", type=Path, default=METRICS)
    path = parser.parse_args(argv).metrics
    found = read(path)
    scored, threat = found.defenses, found.threat_model
    names = ordered(scored)
    illusions = [illusion(name, scored[name]) for name in names]
    console = Console(highlight=False)
    # Narrower, the table would cut digits off, and a cut number is another number.
    console.width = max(console.width, WIDTH)
    if problem := metrics.edited(path):
        console.print(Text(f"{problem}\n", "red"))
    console.print(score_table(scored))
    notes = NOTES.format(n=threat.n, threat=describe_threat(threat))
    console.print(Text(f"\n{notes}"), style="dim")
    for name in names:
        _print_verdict(console, name, scored[name])
    for sentence in filter(None, illusions):
        console.print(Text(f"\n{sentence}", style="yellow"))
    console.print(f"\nReport:    {REPORT}", soft_wrap=True)
    console.print(f"MLflow UI: {MLFLOW}", soft_wrap=True)
    console.print(f"then open  {UI}", soft_wrap=True)
    return 0


def _print_verdict(console: Console, name: str, found: Scored) -> None:
    """Print what a defense is worth, and what speaks against the measurement of any entry."""
    console.print()
    judged = verdict(found)
    console.print(Text.assemble((name, "bold"), f": {judged}" if judged else ""))
    if found.role != "baseline":
        console.print(Text(f"  attacks written for this defense: {written_for(found)}"))
    if found.checks.blocking_failed:
        failed = ", ".join(found.checks.blocking_failed)
        console.print(Text(f"  measurement not valid, failed checks: {failed}", "red"))
    console.print(Text(f"  {found.checks.warned()}", "yellow" if found.checks.warnings else "dim"))


def read(path: Path) -> Metrics:
    """Return the metrics that a user names; raise ConfigError where there are none to read."""
    try:
        return metrics.read(path)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; `dvc repro` makes it") from None
    except DataError as error:
        raise ConfigError(str(error)) from None


def score_table(scored: Mapping[str, Scored]) -> Table:
    """Return the table of all entries, baselines first; it fits into WIDTH columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column("", overflow="fold")
    for title in NUMBERS:
        table.add_column(title, justify="right", no_wrap=True)
    names = ordered(scored)
    for name, after in zip_longest(names, names[1:]):
        ends = after is None or scored[after].role != scored[name].role
        table.add_row(Text(name), *_row(scored[name]), end_section=ends)
    return table


def ordered(scored: Mapping[str, Scored]) -> list[str]:
    """Return the names in the order of their roles, the highest robust accuracy first."""
    return sorted(scored, key=lambda n: (ROLES.index(scored[n].role), -scored[n].headline.accuracy))


def _row(found: Scored) -> list[Text]:
    head, unseen = found.headline, found.unseen_classifier
    bound, failed = head.upper_bound, bool(found.checks.blocking_failed)
    rungs = [_rung(found, mode) for mode in ("classifier", "bpda", "full")]
    robust = Text(f"{'<=' if bound else ''}{_number(head)} ", "strike" if bound else "bold")
    robust.append(f"{100 * head.low:.1f}-{100 * head.high:.1f}", "not bold dim")
    behind = "-"
    if unseen:
        behind = f"{100 * unseen.clean.accuracy:.0f}/{100 * unseen.worst_examples.accuracy:.0f}"
    valid = Text("no", "red") if failed else Text("yes", "green")
    if found.checks.warnings:
        valid.append(f" +{len(found.checks.warnings)}", "yellow")
    return [
        Text(_number(found.clean)),
        *rungs,
        robust,
        Text(behind),
        Text("yes" if found.stochastic else "no"),
        valid,
    ]


def _rung(found: Scored, mode: str) -> Text:
    """Return the accuracy on a rung, `-` where nothing was run, `void` without a gradient."""
    if mode in found.void_rungs:
        return Text("void", "red")
    return Text(_number(found.rungs[mode]) if mode in found.rungs else "-")


def _number(score: Estimate) -> str:
    return f"{100 * score.accuracy:.1f}"
