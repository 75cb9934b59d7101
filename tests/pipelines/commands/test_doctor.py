"""The doctor names faults and running stages, and changes nothing."""

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from components.data.shards import sha256
from pipelines.commands import doctor
from pipelines.storage import locks

HEALTHY = "schema: '2.0'\nstages:\n  prepare_data:\n    cmd: limpid prepare_data\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in which the doctor finds no fault."""
    monkeypatch.chdir(tmp_path)
    Path("dvc.lock").write_text(HEALTHY)
    Path(".dvc/tmp").mkdir(parents=True)
    Path(".dvc/tmp/rwlock").write_text("{}")
    return tmp_path


def test_a_healthy_project_has_no_faults(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(sqlite3.connect("mlflow.db")) as database:
        database.execute("create table runs (name text)")
    assert doctor.main([]) == 0
    assert capsys.readouterr().out == "nothing stands in the way\n"


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("dvc.lock", HEALTHY[:30], "dvc.lock is cut short or altered: `git checkout dvc.lock`"),
        ("dvc.lock", HEALTHY[:-36], "dvc.lock is cut short"),
        ("dvc.lock", "schema: '2.0'\nstages: {a: [", "dvc.lock is cut short"),
        (".dvc/tmp/rwlock", "", "rwlock is cut short: remove it when no DVC runs"),
        ("mlflow.db", "no database at all" * 100, "mlflow.db is damaged"),
    ],
)
def test_damaged_files_are_named_and_not_changed(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, fault: str
) -> None:
    path = folder / name
    path.write_text(content)
    before = {p: sha256(p) for p in folder.rglob("*") if p.is_file()}
    assert doctor.main([]) == 4
    printed = capsys.readouterr().out
    assert fault in printed and "to put right: 1" in printed
    assert {p: sha256(p) for p in folder.rglob("*") if p.is_file()} == before


def test_running_stages_and_kept_work_are_listed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = folder / ".limpid/work/train_classifier-standard-0123456789ab/states"
    work.mkdir(parents=True)
    (work / "state.pt").write_bytes(b"0" * 2_000_000)
    with locks.stage_lock("evaluate"):
        done = subprocess.run(
            [sys.executable, "-m", "pipelines", "doctor"],
            capture_output=True,
            text=True,
            check=True,
        )
    assert "evaluate is being run by process" in done.stdout
    assert "standard-0123456789ab holds 2.0 MB of a stage, from which" in done.stdout
    assert done.stdout.endswith("nothing stands in the way\n")
    assert doctor.main([]) == 0 and "being run" not in capsys.readouterr().out
