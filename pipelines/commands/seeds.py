"""Print mean and spread of the scores of runs that differ in their seed.

`limpid seeds FILES`, each the reports/metrics.json of one run. A Wilson interval covers what other
test images would change; the spread over seeds shows what another training and other attacks would.

Exit codes: 0, 2 fewer than two runs, or runs that cannot be compared.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.commands.scores import ordered, read
from pipelines.errors import ConfigError
from pipelines.reporting.wording import describe_threat
from pipelines.tasks.metrics import Metrics, Scored

WIDTH = 104
RUNGS = {"grey": "classifier", "BPDA": "bpda", "full": "full"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", help="metrics.json of one run each")
    files: list[Path] = parser.parse_args(argv).files
    runs = read_runs(files)
    threat = runs[0].threat_model
    console = Console(highlight=False)
    # Narrower, the table would cut digits off, and a cut number is another number.
    console.width = max(console.width, WIDTH)
    console.print(spread([run.defenses for run in runs]))
    console.print(
        Text(
            f"\n{len(runs)} runs, mean and standard deviation over them, in % of n = {threat.n} "
            f"test images each; {describe_threat(threat)}. <= : a check failed in one of them."
        ),
        style="dim",
    )
    return 0


def read_runs(files: Sequence[Path]) -> list[Metrics]:
    """Return the metrics of runs that differ in their seed alone; else raise ConfigError."""
    if len(files) < 2:
        raise ConfigError("one run has no spread: give the metrics.json of two or more")
    runs: list[Metrics] = []
    for file in files:
        run = read(file)
        if run.seed in (other.seed for other in runs):
            raise ConfigError(f"{file} is a run of seed {run.seed}, which is there already")
        first = runs[0] if runs else run
        for kind, differs in (
            ("threat model", first.threat_model != run.threat_model),
            ("set of defenses", set(first.defenses) != set(run.defenses)),
        ):
            if differs:
                raise ConfigError(
                    f"{file} has another {kind} than {files[0]}: the two cannot be compared"
                )
        runs.append(run)
    return runs


def spread(runs: Sequence[Mapping[str, Scored]]) -> Table:
    """Return the table over the `defenses` of some runs, all of the same names."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    for title in ("", "clean", *RUNGS, "robust accuracy", "least to most"):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for name in ordered(runs[0]):
        found = [run[name] for run in runs]
        heads = [one.headline.accuracy for one in found]
        doubtful = any(one.headline.upper_bound for one in found)
        table.add_row(
            name,
            _over([one.clean.accuracy for one in found]),
            *(_rung(found, mode) for mode in RUNGS.values()),
            ("<=" if doubtful else "") + _over(heads),
            f"{100 * min(heads):.1f} to {100 * max(heads):.1f}",
        )
    return table


def _rung(found: Sequence[Scored], mode: str) -> str:
    accuracies = [one.rungs[mode].accuracy for one in found if mode in one.rungs]
    return _over(accuracies) if len(accuracies) == len(found) else "-"


def _over(accuracies: Sequence[float]) -> str:
    return f"{100 * mean(accuracies):.1f} \N{PLUS-MINUS SIGN} {100 * stdev(accuracies):.1f}"
