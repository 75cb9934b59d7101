"""Registered versions carry their figures, and only sound ones become the champion."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import mlflow
import project
import pytest

from pipelines.__main__ import main
from pipelines.config.schema import load
from pipelines.reporting import registration
from pipelines.reporting.wording import MEANINGS
from pipelines.tasks.metrics import Metrics
from pipelines.tracking import registry
from pipelines.tracking.registry import Version

MODEL = "limpid-digits"


@pytest.fixture(scope="module")
def synced(reproduced: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of an evaluation, and a store in which they were registered afterwards."""
    folder = tmp_path_factory.mktemp("registry") / "evaluated"
    folder.mkdir()
    for name in ("models", "reports", "components"):
        shutil.copytree(reproduced / name, folder / name)
    for name in ("params.yaml", "dvc.lock"):
        shutil.copyfile(reproduced / name, folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        assert promote(["--sync"]) == 0
    return folder


@pytest.fixture
def store(synced: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of that store, without a champion."""
    monkeypatch.chdir(synced)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    registry.connect().delete_registered_model_alias(MODEL, registry.CHAMPION)
    yield synced
    mlflow.set_tracking_uri(None)


def promote(argv: list[str]) -> int:
    return main(["promote", *argv])


def registered_versions() -> dict[str, Version]:
    return {one.defense: one for one in registry.versions(registry.connect(), MODEL)}


def champion() -> str:
    known = registered_versions().values()
    return next((one.defense for one in known if registry.CHAMPION in one.aliases), "")


def artifact(folder: Path, defense: str) -> Path:
    """Return where the store keeps the purifier of a defense."""
    model = project.tiny()["defenses"][defense]["model"]
    return next((folder / "mlruns").rglob(f"*/artifacts/{model}"))


def test_sync_registers_every_defense_once_in_an_empty_store(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = registered_versions()
    assert set(first) == set(project.tiny()["defenses"])
    assert promote(["--sync"]) == 0
    assert {d: v.number for d, v in registered_versions().items()} == {
        d: v.number for d, v in first.items()
    }
    assert promote([]) == 0
    printed = capsys.readouterr().out
    found = json.loads((store / "reports/metrics.json").read_text())["defenses"]
    for name, version in first.items():
        head = found[name]["headline"]
        assert name in printed and f"{100 * head['accuracy']:.1f}" in printed
        assert version.figure("headline_low") == pytest.approx(head["low"], rel=1e-4)
        assert version.failed == found[name]["checks"]["blocking_failed"]
        assert version.figure("ms_per_image") > 0
    tags = first["student_adaptive"].tags
    assert tags["dvc.lock.models/student_adaptive"].endswith(".dir")
    assert json.loads(tags["threat"])["norm"] == "linf" and "git.commit" in tags
    run = registry.connect().get_run(tags["limpid.run"])
    kept = {file.path for file in registry.connect().list_artifacts(run.info.run_id)}
    assert {"scores.json", "report.html", "params.yaml"} <= kept
    words = run.data.tags["mlflow.note.content"]
    assert "clean test images" in words and "no pixel changes by more" in words


def test_promoting_needs_a_reason_and_keeps_it(store: Path, capsys: pytest.CaptureFixture) -> None:
    assert promote(["atop"]) == 2 and champion() == ""
    assert "give a reason" in capsys.readouterr().err
    assert promote(["atop", "--reason", "for the test"]) == 0
    assert champion() == "atop"
    assert registered_versions()["atop"].tags["limpid.champion_because"] == "for the test"
    number = str(registered_versions()["student_grey"].number)
    assert promote([number, "--reason", "another"]) == 0
    assert champion() == "student_grey"
    assert "instead of" in capsys.readouterr().out


def test_by_worst_promotes_the_highest_lower_bound(store: Path) -> None:
    found = json.loads((store / "reports/metrics.json").read_text())["defenses"]
    sound = {
        name: found[name]["headline"]["low"]
        for name in project.tiny()["defenses"]
        if not found[name]["checks"]["blocking_failed"]
    }
    assert promote(["--by", "worst"]) == 0
    assert champion() == max(sound, key=sound.__getitem__)


def test_a_version_with_a_failed_blocking_check_is_refused(
    store: Path, capsys: pytest.CaptureFixture
) -> None:
    number = str(registered_versions()["atop"].number)
    client = registry.connect()
    before = registered_versions()["atop"].tags["blocking_failed"]
    client.set_model_version_tag(MODEL, number, "blocking_failed", "planted")
    assert promote(["atop", "--reason", "no"]) == 2
    assert "failed planted" in capsys.readouterr().err and champion() == ""
    client.set_model_version_tag(MODEL, number, "blocking_failed", before)
    assert promote(["--by", "clean", "--min-clean", "1.01"]) == 2
    assert "reaches 101.0% clean" in capsys.readouterr().err


def test_a_failed_check_is_registered_with_the_defense(store: Path) -> None:
    values = json.loads((store / "reports/metrics.json").read_text())
    planted = {"name": "planted", "check": "planted", "about": "", "detail": "", "figures": {}}
    values["defenses"]["atop"]["checks"] |= {
        "blocking_failed": ["planted"],
        "findings": [{**planted, "level": "block", "passed": False}],
    }
    values["defenses"]["atop"]["headline"]["upper_bound"] = True
    metrics = Metrics.model_validate_json(json.dumps(values))
    registered = registration.registrations(load().defenses, metrics, Path("models"), "digits")
    atop = next(one for one in registered if one.name == "atop")
    assert atop.tags["blocking_failed"] == "planted"
    assert atop.tags["limpid.candidate"] == "no"
    assert "upper bound and no result" in atop.description
    assert MEANINGS["planted"] in atop.description


def test_altered_or_missing_artifacts_are_refused(
    store: Path, capsys: pytest.CaptureFixture
) -> None:
    weights = artifact(store, "student_grey") / "weights.safetensors"
    whole = weights.read_bytes()
    faults = {"altered": whole[:-1] + bytes([whole[-1] ^ 1]), "missing": None}
    for content in faults.values():
        weights.unlink()
        if content is not None:
            weights.write_bytes(content)
        assert promote(["student_grey", "--reason", "no"]) == 3
        assert "is refused: its artifacts are not whole" in capsys.readouterr().err
        weights.write_bytes(whole)
    assert champion() == ""
    assert promote(["student_grey", "--reason", "whole again"]) == 0


def test_another_network_in_the_artifacts_is_refused(
    store: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = artifact(store, "student_adaptive")
    shutil.rmtree(folder)
    shutil.copytree(store / "models/student_grey", folder)
    assert promote(["student_adaptive", "--reason", "no"]) == 3
    assert "are not those that were scored" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["nobody", "--reason", "x"], "there is no nobody"),
        (["atop", "--by", "worst"], "not both"),
        (["--model", "limpid-mars"], "there is no version of limpid-mars"),
    ],
)
def test_a_version_that_cannot_be_promoted_is_refused_in_one_sentence(
    store: Path, argv: list[str], reason: str, capsys: pytest.CaptureFixture
) -> None:
    assert promote(argv) == 2
    printed = capsys.readouterr().err
    assert reason in printed and printed.count("\n") == 1


def test_missing_metrics_are_named_in_one_sentence(
    store: Path, capsys: pytest.CaptureFixture
) -> None:
    (store / "reports/metrics.json").rename(store / "reports/away.json")
    assert promote(["--sync"]) == 3
    (store / "reports/away.json").rename(store / "reports/metrics.json")
    assert capsys.readouterr().err.startswith("error: reports/metrics.json is missing")


def test_an_unreachable_store_is_named_in_one_sentence(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert promote([]) == 4
    assert "http://127.0.0.1:9 does not answer" in capsys.readouterr().err
