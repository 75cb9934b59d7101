"""Fail where a blocking check failed; write nothing.

Exit codes: 0, 3 metrics that cannot be read, 5 a blocking check failed on a defense or a baseline.
Controls are never judged: some are there to be caught.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from components.data.shards import DataError
from pipelines import layout
from pipelines.errors import Failed
from pipelines.tasks import metrics


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; raise Failed where a blocking check failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--metrics", type=Path, default=layout.METRICS, help=f"by default {layout.METRICS}"
    )
    judged, failed = judge(parser.parse_args(argv).metrics)
    if failed:
        named = "; ".join(f"{name} ({', '.join(checks)})" for name, checks in failed.items())
        raise Failed(5, f"blocking checks failed, so these scores are upper bounds only: {named}")
    print(f"verdict: no blocking check failed on {judged} scored classifiers and defenses")
    return 0


def judge(path: Path) -> tuple[int, Mapping[str, Sequence[str]]]:
    """Return how many entries were judged, and the blocking failures of those that have any.

    Raises DataError for metrics that are missing or cannot be read.
    """
    try:
        scored = metrics.read(path).defenses
    except FileNotFoundError:
        raise DataError(f"{path} is missing; `dvc repro` makes it") from None
    failures = {
        name: found.checks.blocking_failed
        for name, found in scored.items()
        if found.role != "control"
    }
    return len(failures), {name: checks for name, checks in failures.items() if checks}
