"""Plant every known lie, run the checks, and print which were caught."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from components import selftest
from components.data.shards import write_json
from components.selftest import HONEST, LIES, Result
from pipelines import layout
from pipelines.runner.console import ConsoleProgress, refuse


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 5 if a lie was not caught or an honest defense was flagged."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    usual = Path(layout.STAGES["selftest"]["out"])
    parser.add_argument("--out", type=Path, default=usual, help=f"by default {usual}")
    out: Path = parser.parse_args(argv).out
    torch.set_num_threads(1)
    watch = ConsoleProgress("selftest")
    results: list[Result] = []
    for result in selftest.run(selftest.toy()):
        results.append(result)
        watch.advance(len(results), len(LIES) + len(HONEST), "cases")
    watch.close()
    write_json(out, [result.model_dump() for result in results])
    Console(highlight=False).print(_table(results))
    wrong = [result.case for result in results if not result.caught]
    if wrong:
        return refuse(f"the harness is broken: {', '.join(wrong)}", 5)
    print(f"{len(LIES)} lies caught by name, {len(HONEST)} honest cases left alone")
    return 0


def _table(results: Sequence[Result]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for title in ("planted", "must raise", "raised", ""):
        table.add_column(title, overflow="fold")
    for result in results:
        verdict = Text("ok", "green") if result.caught else Text("NO", "bold red")
        table.add_row(
            result.case, result.expected or "nothing", ", ".join(result.raised) or "-", verdict
        )
    return table
