"""Every planted lie is caught by name, every honest case is left alone, and the command says so."""

import pytest

from components import selftest
from components.probes import Finding
from components.selftest import HONEST, LIES, Toy
from pipelines.stages import selftest as command


@pytest.fixture(scope="module")
def toy() -> Toy:
    return selftest.toy()


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_caught_by_name(lie: str, toy: Toy) -> None:
    expected, case = LIES[lie]
    raised = [finding.name for finding in case(toy) if not finding.passed]
    assert expected in raised


@pytest.mark.parametrize("case", HONEST)
def test_the_honest_pass(case: str, toy: Toy) -> None:
    findings = HONEST[case](toy)
    assert findings
    assert [f for f in findings if not f.passed and f.level == "block"] == []


def test_at_least_ten_honest_defenses_and_fifteen_lies() -> None:
    assert sum(not case.startswith("known answer") for case in HONEST) >= 10
    assert len(LIES) >= 15


def test_the_command_names_what_got_by(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def blind(toy: Toy) -> list[Finding]:
        return [Finding(name="logits", level="block", passed=True, detail="all is well")]

    def jumpy(toy: Toy) -> list[Finding]:
        return [Finding(name="logits", level="block", passed=False, detail="all is lost")]

    monkeypatch.setattr(selftest, "toy", lambda: toy)
    monkeypatch.setattr(selftest, "LIES", {"a lie": ("logits", jumpy)})
    monkeypatch.setattr(selftest, "HONEST", {"an honest one": blind})
    assert command.main([]) == 0
    monkeypatch.setattr(selftest, "LIES", {"a lie": ("logits", blind)})
    assert command.main([]) == 5
    assert "a lie" in capsys.readouterr().err
    monkeypatch.setattr(selftest, "LIES", {"a lie": ("logits", jumpy)})
    monkeypatch.setattr(selftest, "HONEST", {"an honest one": jumpy})
    assert command.main([]) == 5
    assert "an honest one" in capsys.readouterr().err
