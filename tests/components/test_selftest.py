"""Every lie is caught by its check, every honest case passes, and the stage fails otherwise."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from components import selftest
from components.probes import Finding
from components.selftest import HONEST, LIES, Case, Toy
from pipelines.errors import Failed
from pipelines.stages import selftest as stage


@pytest.fixture(scope="module")
def toy() -> Toy:
    return selftest.train_toy()


@pytest.mark.parametrize("lie", LIES)
def test_its_check_catches_the_lie(lie: str, toy: Toy) -> None:
    expected, case = LIES[lie]
    findings = case(replace(toy, only=expected))
    assert expected in [finding.name for finding in findings if not finding.passed]


@pytest.mark.parametrize("case", HONEST)
def test_honest_cases_pass_all_blocking_checks(case: str, toy: Toy) -> None:
    findings = HONEST[case](toy)
    assert findings
    assert [f for f in findings if not f.passed and f.level == "block"] == []


def test_there_are_at_least_ten_honest_defenses_and_fifteen_lies() -> None:
    assert sum(not case.startswith("known answer") for case in HONEST) >= 10
    assert len(LIES) >= 15


def test_the_stage_names_every_case_that_goes_wrong(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def passes(toy: Toy) -> list[Finding]:
        return [Finding(name="logits", level="block", passed=True, detail="all is well")]

    def fails(toy: Toy) -> list[Finding]:
        return [Finding(name="logits", level="block", passed=False, detail="all is lost")]

    def run(lie: Case, honest: Case) -> int:
        monkeypatch.setattr(selftest, "LIES", {"a lie": ("logits", lie)})
        monkeypatch.setattr(selftest, "HONEST", {"an honest one": honest})
        return stage.main(["--out", str(tmp_path / "out.json")])

    monkeypatch.setattr(selftest, "train_toy", lambda: toy)
    assert run(fails, passes) == 0
    with pytest.raises(Failed, match="the harness is broken: a lie") as caught:
        run(passes, passes)
    assert caught.value.code == 5
    with pytest.raises(Failed, match="the harness is broken: an honest one") as caught:
        run(fails, fails)
    assert caught.value.code == 5
    assert json.loads((tmp_path / "out.json").read_text())[1] == {
        "case": "an honest one", "expected": None, "raised": ["logits"], "caught": False,
    }  # fmt: skip


@pytest.mark.slow
def test_every_case_comes_out_right_in_processes_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert stage.main(["--all", "--out", str(out)]) == 0
    shown = {result["case"] for result in json.loads(out.read_text("utf-8"))}
    assert shown == {*LIES, *selftest.honest_cases(every=True)}
