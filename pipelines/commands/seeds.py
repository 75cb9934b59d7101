"""Print mean and spread of several runs that differ in their seed: limpid seeds FILES.

Each file is the reports/metrics.json of one run. A Wilson interval says what other test images
would change; the spread over seeds says what another training and another attack would.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.commands.scores import ordered
from pipelines.reporting.wording import describe_threat
from pipelines.runner.console import refuse

WIDTH = 104
RUNGS = {"grey": "classifier", "BPDA": "bpda", "full": "full"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 2 for fewer than two runs, or runs that cannot be compared."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", help="metrics.json of one run each")
    files: list[Path] = parser.parse_args(argv).files
    if len(files) < 2:
        return refuse("one run has no spread: give the metrics.json of two or more")
    runs = []
    for file in files:
        try:
            runs.append(json.loads(file.read_bytes()))
            threats, names = runs[-1]["threat_model"], set(runs[-1]["defenses"])
            seeds = [run["seed"] for run in runs]
        except (OSError, ValueError, KeyError, TypeError) as error:
            return refuse(f"{file} is no metrics.json of ours ({type(error).__name__})")
        if len(set(seeds)) < len(seeds):
            return refuse(f"{file} is a run of seed {seeds[-1]}, which is there already")
        for what, first, here in (
            ("threat model", runs[0]["threat_model"], threats),
            ("set of defenses", set(runs[0]["defenses"]), names),
        ):
            if first != here:
                return refuse(f"{file} has another {what} than {files[0]}: no spread of one thing")
    threat = runs[0]["threat_model"]
    console = Console(highlight=False)
    # Narrower, the table would cut digits off, and a cut number is another number.
    console.width = max(console.width, WIDTH)
    console.print(spread([run["defenses"] for run in runs]))
    console.print(
        Text(
            f"\n{len(runs)} runs, mean and standard deviation over them, in % of n = {threat['n']} "
            f"test images each; {describe_threat(threat)}. <= : a check failed in one of them."
        ),
        style="dim",
    )
    return 0


def spread(runs: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table over the `defenses` of some runs, all of the same names."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    for title in ("", "clean", *RUNGS, "headline", "least to most"):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for name in ordered(runs[0]):
        found = [run[name] for run in runs]
        heads = [one["headline"]["accuracy"] for one in found]
        doubtful = any(one["headline"]["upper_bound"] for one in found)
        rungs = [[one["rungs"].get(mode) for one in found] for mode in RUNGS.values()]
        table.add_row(
            name,
            _over([one["clean"]["accuracy"] for one in found]),
            *(_over([rung["accuracy"] for rung in each]) if all(each) else "-" for each in rungs),
            ("<=" if doubtful else "") + _over(heads),
            f"{100 * min(heads):.1f} to {100 * max(heads):.1f}",
        )
    return table


def _over(shares: Sequence[float]) -> str:
    return f"{100 * mean(shares):.1f} \N{PLUS-MINUS SIGN} {100 * stdev(shares):.1f}"
