"""The files of a job in the store, when two of its processes work in one folder."""

from pathlib import Path

import pytest

from components.data.shards import write_bytes
from pipelines.storage import job_files, jobs


def test_a_process_that_was_given_up_removes_no_file_of_its_replacement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(jobs.STORAGE, f"file://{tmp_path}/store")
    monkeypatch.setenv(jobs.SCRATCH, str(tmp_path / "scratch"))
    monkeypatch.setenv(jobs.JOB, "training")
    states = jobs.home() / ".limpid/work/training/states"
    write_bytes(states / "30", b"mine")
    job_files.upload(states)
    store, name = jobs.store(), "kept/work/training/states"
    store.write(f"{name}/60", b"of another")
    (states / "30").unlink()
    write_bytes(states / "31", b"mine, and late")
    job_files.upload(states)
    assert sorted(store.names(name)) == [f"{name}/31", f"{name}/60"]
    # A process that downloads a folder takes it over.
    job_files.download_folder(states)
    (states / "31").unlink()
    job_files.upload(states)
    assert store.names(name) == [f"{name}/60"]
