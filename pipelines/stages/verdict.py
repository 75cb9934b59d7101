"""Say how each defense stands; fail where a blocking check failed.

Exit codes: 0, 3 metrics that cannot be read or were edited, 5 a blocking check failed on a defense
or a baseline, or the selftest did not pass. Controls are never judged: some are there to be caught.
Writes nothing.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from components.data.shards import DataError
from pipelines import layout
from pipelines.errors import Failed
from pipelines.tasks import metrics


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; raise Failed where a blocking check or the selftest failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--metrics", type=Path, default=layout.METRICS, help=f"by default {layout.METRICS}"
    )
    found = read(parser.parse_args(argv).metrics)
    judged = {name: one for name, one in found.defenses.items() if one.role != "control"}
    for name, one in judged.items():
        standing = f"{one.verdict.standing}; " if one.verdict else ""
        print(f"{name}: {standing}{one.checks.warned()}")
    failed = {n: one.checks.blocking_failed for n, one in judged.items()}
    named = "; ".join(f"{n} ({', '.join(checks)})" for n, checks in failed.items() if checks)
    if named:
        raise Failed(5, f"blocking checks failed, so these scores are upper bounds only: {named}")
    cases, caught = found.selftest.cases, found.selftest.caught
    if not cases or caught < cases:
        raise Failed(
            5,
            f"of {cases} cases of the selftest {caught} came out right, so nothing vouches for the "
            "checks behind these scores; `dvc repro` runs it anew",
        )
    print(f"verdict: no blocking check failed on {len(judged)} scored classifiers and defenses")
    return 0


def read(path: Path) -> metrics.Metrics:
    """Return the metrics; raise DataError for those that are missing, damaged or edited."""
    try:
        return metrics.read_unedited(path)
    except FileNotFoundError:
        raise DataError(f"{path} is missing; `dvc repro` makes it") from None
