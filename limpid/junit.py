"""The checks of a verdict as JUnit XML, which every CI shows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from components.data.shards import write_bytes
from pipelines.tasks.metrics import Metrics


@dataclass(frozen=True)
class Case:
    """One test case; `outcome` is what CI shows: "passed", "failure" or "skipped"."""

    about: str
    name: str
    outcome: str
    detail: str


def checks(metrics: Metrics) -> list[Case]:
    """Return one case for each check of each row.

    One that blocks is a failure, one that was not asked is skipped; a warning passes, and says so.
    """
    cases = []
    for row, scored in metrics.defenses.items():
        for found in scored.checks.findings:
            outcome, detail = "passed", found.detail
            if not found.asked:
                outcome = "skipped"
            elif not found.passed and found.level == "block":
                outcome = "failure"
            elif not found.passed:
                detail = f"warning: {detail}"
            cases.append(Case(row, found.name, outcome, detail))
    return cases


def write(path: Path, cases: Sequence[Case]) -> None:
    """Write test cases as one suite."""
    count = {kind: str(sum(c.outcome == kind for c in cases)) for kind in ("failure", "skipped")}
    suite = ElementTree.Element(
        "testsuite", name="limpid attack", tests=str(len(cases)), failures=count["failure"],
        skipped=count["skipped"], errors="0",
    )  # fmt: skip
    for case in cases:
        one = ElementTree.SubElement(
            suite, "testcase", classname=f"limpid.{case.about}", name=case.name
        )
        if case.outcome == "passed":
            ElementTree.SubElement(one, "system-out").text = case.detail
        else:
            ElementTree.SubElement(one, case.outcome, message=case.detail)
    write_bytes(path, ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True))
