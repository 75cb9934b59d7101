"""The registry: what a version carries, and what may become the champion."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import mlflow
import project
import pytest

from pipelines.commands import promote
from pipelines.config.schema import load
from pipelines.reporting import registration
from pipelines.reporting.wording import MEANINGS
from pipelines.tracking import registry
from pipelines.tracking.registry import Version

MODEL = "limpid-digits"


@pytest.fixture(scope="module")
def synced(reproduced: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an evaluation left behind, and a store that was told of it afterwards."""
    folder = tmp_path_factory.mktemp("registry") / "evaluated"
    folder.mkdir()
    for name in ("models", "reports", "components"):
        shutil.copytree(reproduced / name, folder / name)
    for name in ("params.yaml", "dvc.lock"):
        shutil.copyfile(reproduced / name, folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        assert promote.main(["--sync"]) == 0
    return folder


@pytest.fixture
def store(synced: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of that store, without a champion."""
    monkeypatch.chdir(synced)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    registry.connect().delete_registered_model_alias(MODEL, registry.CHAMPION)
    yield synced
    mlflow.set_tracking_uri(None)


def registered_versions() -> dict[str, Version]:
    return {one.defense: one for one in registry.versions(registry.connect(), MODEL)}


def champion() -> str:
    known = registered_versions().values()
    return next((one.defense for one in known if registry.CHAMPION in one.aliases), "")


def artifact(folder: Path, defense: str) -> Path:
    """Return where the store keeps the purifier of a defense."""
    model = project.tiny()["defenses"][defense]["model"]
    return next((folder / "mlruns").rglob(f"*/artifacts/{model}"))


def test_syncing_tells_a_fresh_store_all_and_twice_tells_it_once(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = registered_versions()
    assert set(first) == set(project.tiny()["defenses"])
    assert promote.main(["--sync"]) == 0
    assert {d: v.number for d, v in registered_versions().items()} == {
        d: v.number for d, v in first.items()
    }
    assert promote.main([]) == 0
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


def test_a_person_promotes_and_says_why(store: Path, capsys: pytest.CaptureFixture) -> None:
    assert promote.main(["atop"]) == 2 and champion() == ""
    assert "say why" in capsys.readouterr().err
    assert promote.main(["atop", "--reason", "for the test"]) == 0
    assert champion() == "atop"
    assert registered_versions()["atop"].tags["limpid.champion_because"] == "for the test"
    number = str(registered_versions()["student_grey"].number)
    assert promote.main([number, "--reason", "another"]) == 0
    assert champion() == "student_grey"
    assert "instead of" in capsys.readouterr().out


def test_the_best_by_the_worst_case_is_that_of_the_highest_lower_bound(store: Path) -> None:
    found = json.loads((store / "reports/metrics.json").read_text())["defenses"]
    sound = {
        name: found[name]["headline"]["low"]
        for name in project.tiny()["defenses"]
        if not found[name]["checks"]["blocking_failed"]
    }
    assert promote.main(["--by", "worst"]) == 0
    assert champion() == max(sound, key=sound.__getitem__)


def test_what_failed_a_blocking_check_stays_what_it_is(
    store: Path, capsys: pytest.CaptureFixture
) -> None:
    number = str(registered_versions()["atop"].number)
    client = registry.connect()
    before = registered_versions()["atop"].tags["blocking_failed"]
    client.set_model_version_tag(MODEL, number, "blocking_failed", "planted")
    assert promote.main(["atop", "--reason", "no"]) == 2
    assert "failed planted" in capsys.readouterr().err and champion() == ""
    client.set_model_version_tag(MODEL, number, "blocking_failed", before)
    assert promote.main(["--by", "clean", "--min-clean", "1.01"]) == 2
    assert "reaches 101.0% clean" in capsys.readouterr().err


def test_a_failed_check_is_told_to_the_registry(store: Path) -> None:
    metrics = json.loads((store / "reports/metrics.json").read_text())
    metrics["defenses"]["atop"]["checks"]["blocking_failed"] = ["planted"]
    metrics["defenses"]["atop"]["headline"]["upper_bound"] = True
    told = registration.registrations(load().defenses, metrics, Path("models"), "digits")
    atop = next(one for one in told if one.name == "atop")
    assert atop.tags["blocking_failed"] == "planted"
    assert atop.tags["limpid.candidate"] == "no"
    assert "upper bound and no result" in atop.description
    assert MEANINGS["planted"] in atop.description


def test_what_is_not_byte_for_byte_what_was_scored_is_refused(
    store: Path, capsys: pytest.CaptureFixture
) -> None:
    weights = artifact(store, "student_grey") / "weights.safetensors"
    whole = weights.read_bytes()
    faults = {"altered": whole[:-1] + bytes([whole[-1] ^ 1]), "missing": None}
    for content in faults.values():
        weights.unlink()
        if content is not None:
            weights.write_bytes(content)
        assert promote.main(["student_grey", "--reason", "no"]) == 3
        assert "is refused: its artifacts are not whole" in capsys.readouterr().err
        weights.write_bytes(whole)
    assert champion() == ""
    assert promote.main(["student_grey", "--reason", "whole again"]) == 0


def test_other_networks_under_a_known_name_are_refused(
    store: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = artifact(store, "student_adaptive")
    shutil.rmtree(folder)
    shutil.copytree(store / "models/student_grey", folder)
    assert promote.main(["student_adaptive", "--reason", "no"]) == 3
    assert "are not those that were scored" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["nobody", "--reason", "x"], "there is no nobody"),
        (["atop", "--by", "worst"], "not both"),
        (["--model", "limpid-mars"], "there is no version of limpid-mars"),
    ],
)
def test_what_cannot_be_promoted_is_one_sentence(
    store: Path, argv: list[str], says: str, capsys: pytest.CaptureFixture
) -> None:
    assert promote.main(argv) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_metrics_that_are_not_there_are_one_sentence(
    store: Path, capsys: pytest.CaptureFixture
) -> None:
    (store / "reports/metrics.json").rename(store / "reports/away.json")
    assert promote.main(["--sync"]) == 3
    (store / "reports/away.json").rename(store / "reports/metrics.json")
    assert capsys.readouterr().err.startswith("error: reports/metrics.json is missing")


def test_a_store_that_is_away_is_one_sentence(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert promote.main([]) == 4
    assert "http://127.0.0.1:9 does not answer" in capsys.readouterr().err
