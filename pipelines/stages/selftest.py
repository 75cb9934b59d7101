"""Plant known lies into the harness and show which check caught each.

Honest defenses must pass. Writes the results as JSON; exits with 5 where one case goes wrong.
"""

import argparse
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from components.data.shards import write_json
from pipelines import layout
from pipelines.errors import Failed
from pipelines.runner.console import ConsoleProgress

if TYPE_CHECKING:
    from components.selftest import Result, Toy

# Cases of `--all` that run side by side, at most.
PROCESSES = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; raise Failed if a lie was not caught or an honest defense was flagged."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = Path(layout.STAGES["selftest"]["out"])
    parser.add_argument("--out", type=Path, default=default, help=f"by default {default}")
    parser.add_argument(
        "--all", action="store_true", help="also the honest cases that take minutes"
    )
    options = parser.parse_args(argv)
    # They take seconds to import.
    import torch

    from components import selftest

    out: Path = options.out
    honest = selftest.honest_cases(options.all)
    torch.set_num_threads(1)
    progress = ConsoleProgress("selftest")
    results: list[Result] = []
    for result in _side_by_side() if options.all else selftest.run(selftest.train_toy()):
        results.append(result)
        progress.advance(len(results), len(selftest.LIES) + len(honest), "cases")
    progress.close()
    write_json(out, [result.model_dump() for result in results])
    Console(highlight=False).print(_table(results))
    wrong = [result.case for result in results if not result.caught]
    if wrong:
        raise Failed(5, f"the harness is broken: {', '.join(wrong)}")
    print(f"{len(selftest.LIES)} lies caught by name, {len(honest)} honest cases left alone")
    return 0


def _side_by_side() -> "Iterator[Result]":
    """Run every case, in a process for each core; each trains what the cases need for itself."""
    from components import selftest

    names = [*selftest.LIES, *selftest.honest_cases(every=True)]
    processes = min(os.cpu_count() or 1, PROCESSES)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _toy) as pool:
        yield from pool.map(_run_case, names)


@cache
def _toy() -> "Toy":
    """Train what the cases need, in a process of one thread."""
    import torch

    from components import selftest

    torch.set_num_threads(1)
    return selftest.train_toy()


def _run_case(name: str) -> "Result":
    from components import selftest

    return selftest.run_case(_toy(), name, every=True)


def _table(results: "Sequence[Result]") -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for title in ("planted", "must raise", "raised", ""):
        table.add_column(title, overflow="fold")
    for result in results:
        verdict = Text("ok", "green") if result.caught else Text("NO", "bold red")
        table.add_row(
            result.case, result.expected or "nothing", ", ".join(result.raised) or "-", verdict
        )
    return table
