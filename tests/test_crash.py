"""A line that SIGKILL ends anywhere recovers: three rounds of `benchmarks/crash.py`."""

import subprocess
import sys

import pytest
from project import ROOT


@pytest.mark.parametrize(
    "until",
    [
        pytest.param(["--until", "train_classifier@standard"], marks=pytest.mark.slow),
        pytest.param([], marks=pytest.mark.faults),
    ],
    ids=["a training", "the whole line"],
)
def test_a_line_killed_anywhere_ends_in_the_same_results(until: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/crash.py", "--rounds", "3", "--seed", "1", *until],
        cwd=ROOT, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 recovered" in done.stdout
