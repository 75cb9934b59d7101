"""Names and sentences: the words that this project gave up do not come back."""

import re
from pathlib import Path

import pytest
from project import ROOT

FOLDERS = ("components", "pipelines", "tests", "docs", "benchmarks", "deploy", ".ci", "profiles")
FOLDERS = (*FOLDERS, "limpid", "examples")
FILES = ("README.md", "CONTRIBUTING.md", "Makefile", "params.yaml", "dvc.yaml")
TEXT = (".py", ".md", ".j2", ".yaml", ".sh", "")
PEOPLE = "".join(
    rf"(?<!{people} )"
    for people in ("attacker", "defender", "everybody", "those", "caller", "person", "readers")
)
# What to look for (a regular expression over one line), and what to write instead.
GIVEN_UP = {
    r"\bcrew\b|\bCrew\b|\bHand\b|\bhire\b": "worker_pool, Worker, scale_up",
    r"\bbears?\b": "retry, tolerate",
    r"\b(join_|_)?ahead\(|\bpipelines[./](ahead|launch)\b": "job",
    r"\bpipelines[./](delivery|exits|mistakes|standings|candidates|served)\b": (
        "uploader, exit_codes, errors, leaderboard, registration, served_model"
    ),
    r"\bpipelines[./](microscope|curves)\b": "panels, charts",
    r"\bpipelines[./](place|remote|relay|dials|jobs|plots)\b": (
        "storage, submission, job_events, search_space, tasks/training, dvc_plots"
    ),
    r"\bfrom pipelines import (place|remote|relay|dials|exits|crew|standings|candidates)\b": (
        "storage, submission, job_events, search_space, exit_codes, worker_pool, leaderboard"
    ),
    r"\bdials?\b|\bDial\b|\.holds\(|\.ends\(": "domain of a search space, contains, bounds",
    r"\b(Train|Trial)?Share\b": "Workers",
    r"\bshares\b(?= of (images|right|clean))|\bShares\b|\.share\(": "accuracies, fractions",
    r"\bScreen\b|\bBook\b": "Progress, MetricLogger",
    r"(?<!limpid\.)\b(un)?told\b(?! apart)|\bheard?\b|\bhears\b|\boverhear": (
        "sent, received, logged"
    ),
    r"\bsuspicion\b|\boddity\b": "detector score",
    r"\bPatience\b|\bpatience\b|\bapart\(": "CapacityWatch, run_in_thread",
    r"\baim\(|(target|search)\.look\(": "bind, margins, query",
    r"\bpieces?\b": "task, shard",
    r"python -m pipelines\.(?!runner\.job\b|tracking\.uploader\b)[a-z_.]+": "limpid NAME",
    PEOPLE + r"\bwhom?\b": "the name of the thing: who is for people",
}


def lines() -> list[tuple[str, str]]:
    """Return every line of text of the project, with its file and number."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    paths += [ROOT / name for name in FILES]
    texts = [
        path
        for path in paths
        if path.suffix in TEXT and "__pycache__" not in path.parts and path != Path(__file__)
    ]
    return [
        (f"{path.relative_to(ROOT)}:{number}", line)
        for path in texts
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    ]


@pytest.mark.parametrize("given_up", GIVEN_UP)
def test_a_word_that_was_given_up_does_not_come_back(given_up: str) -> None:
    found = [f"{where}: {line.strip()}" for where, line in lines() if re.search(given_up, line)]
    assert not found, f"write {GIVEN_UP[given_up]} instead:\n" + "\n".join(found)


def test_files_and_packages_stay_small() -> None:
    """At most 400 lines a file, and 13 modules beside `__init__` in a package.

    `stages` has one module for every stage of dvc.yaml.
    """
    code = [p for d in ("components", "pipelines") for p in (ROOT / d).rglob("*") if p.is_file()]
    code = [path for path in code if path.suffix in (".py", ".j2")]
    long = [str(p.relative_to(ROOT)) for p in code if len(p.read_text().splitlines()) > 400]
    packages: dict[Path, int] = {}
    for path in code:
        if path.suffix == ".py" and path.name != "__init__.py" and path.parent.name != "stages":
            packages[path.parent] = packages.get(path.parent, 0) + 1
    wide = [str(p.relative_to(ROOT)) for p, modules in packages.items() if modules > 13]
    assert not long and not wide
