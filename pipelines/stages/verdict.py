"""Reads the metrics, writes nothing: says no when a score is not what it seems to be.

Exit codes: 0, 3 metrics that cannot be read, 5 a blocking check failed on a defense or a baseline.
Controls are never judged: some are there to be caught.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines import layout
from pipelines.runner.console import refuse


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--metrics", type=Path, default=layout.METRICS, help=f"by default {layout.METRICS}"
    )
    path: Path = parser.parse_args(argv).metrics
    try:
        judged, failed = judge(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return refuse(f"{path} cannot be read as metrics ({reason}); `dvc repro` makes it", 3)
    if failed:
        named = "; ".join(f"{name} ({', '.join(checks)})" for name, checks in failed.items())
        return refuse(f"blocking checks failed, so these scores are upper bounds only: {named}", 5)
    print(f"verdict: no blocking check failed on {judged} scored classifiers and defenses")
    return 0


def judge(path: Path) -> tuple[int, Mapping[str, Sequence[str]]]:
    """Return how many were judged, and the blocking failures of those that have any."""
    scored = json.loads(path.read_bytes())["defenses"]
    failures = {
        name: found["checks"]["blocking_failed"]
        for name, found in scored.items()
        if found["role"] != "control"
    }
    return len(failures), {name: checks for name, checks in failures.items() if checks}
