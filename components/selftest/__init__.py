"""Self-test of the harness: planted lies must be caught, honest defenses must pass.

A lie is a fault that has inflated a published score, or nearly did. It is planted into a small
classifier of real digits, and the named check must raise it (lies.py). Honest defenses of many
kinds, and two answers that are known without any attack, must pass every check (honest.py; those
that take minutes are in zoo.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from components.config import Config
from components.probes import Finding
from components.selftest.honest import HONEST
from components.selftest.lies import LIES
from components.selftest.toy import Case, Toy, train_toy
from components.selftest.zoo import ZOO

__all__ = [
    "HONEST",
    "LIES",
    "ZOO",
    "Case",
    "Result",
    "Toy",
    "honest_cases",
    "lacking",
    "run",
    "run_case",
    "train_toy",
]


# Checks that never void a rung of an honest defense.
ALARMS = ("gradient_pays/", "gradient_adds_up/")


class Result(Config):
    """One case: what was planted, the check that must raise it (None: no check may), the outcome.

    `raised` are the names of all checks that failed; in honest cases, of false alarms.
    """

    case: str
    expected: str | None
    raised: list[str]
    caught: bool


def honest_cases(every: bool) -> dict[str, Case]:
    """Return the honest cases by name; `every` adds those that take minutes."""
    return {**HONEST, **ZOO} if every else HONEST


def run(toy: Toy, every: bool = False) -> Iterator[Result]:
    """Run the cases, one result at a time; `every` adds those that take minutes."""
    for name in (*LIES, *honest_cases(every)):
        yield run_case(toy, name, every)


def run_case(toy: Toy, name: str, every: bool = False) -> Result:
    """Run one case: a lie, or else an honest one.

    With `every` a lie meets all checks: else only the one that must raise it, where that can be run
    alone.
    """
    if name in LIES:
        expected, case = LIES[name]
        raised = _failed(case(toy if every else replace(toy, only=expected)))
        return Result(case=name, expected=expected, raised=raised, caught=expected in raised)
    found = honest_cases(every)[name](toy)
    raised = _failed([finding for finding in found if _blames(finding)])
    return Result(case=name, expected=None, raised=raised, caught=not raised)


def lacking(results: Sequence[Result]) -> list[str]:
    """Return the cases of this version that `results` do not show to come out right.

    That is every lie with the check that must raise it, every honest case that is always run, and
    whatever else went wrong.
    """
    required = {**{lie: expected for lie, (expected, _) in LIES.items()}, **dict.fromkeys(HONEST)}
    shown = {(result.case, result.expected) for result in results if result.caught}
    wrong = [result.case for result in results if not result.caught]
    missing = [name for name, expected in required.items() if (name, expected) not in shown]
    return list(dict.fromkeys([*wrong, *missing]))


def _blames(finding: Finding) -> bool:
    """Say whether a finding about an honest defense is a false alarm.

    That is one that blocks, or voids a rung that leads somewhere. The gradients of a purifier that
    rounds, and some of one that descends, are wrong or missing by nature (`gradient_present`,
    `gradient_honest`).
    """
    return finding.level == "block" or finding.name.startswith(ALARMS)


def _failed(findings: Sequence[Finding]) -> list[str]:
    return [finding.name for finding in findings if not finding.passed]
