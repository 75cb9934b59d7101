"""Stages run in any folder, at any time, and as jobs that a person submits."""

import hashlib
import importlib
import json
import os
import shutil
import sqlite3
import sys
from pathlib import Path

import project
import pytest

from components.data.shards import MANIFEST, DataError, sha256
from pipelines.cluster import submission
from pipelines.config.schema import Params
from pipelines.errors import ConfigError
from pipelines.runner.call import StageCall
from pipelines.runner.command_line import parse
from pipelines.runner.job import require_versions
from pipelines.runner.provenance import input_digest, listing_digest
from pipelines.storage import jobs
from pipelines.storage.object_store import Store

LIMPID = [sys.executable, "-m", "pipelines"]
# A clock that goes back a day every time it is read.
BACKWARDS = """
import itertools, time
now, days = time.time, itertools.count()
time.time = lambda: now() - 86400 * next(days)
"""


def test_a_project_in_a_folder_of_any_name_without_a_home_makes_the_same_bytes(
    reproduced: Path, tmp_path: Path
) -> None:
    """A space, letters of other alphabets, no HOME, another time zone."""
    folder = project.copy_to(tmp_path / "dätä ü (1) 数据")
    bare = {"HOME": "", "LC_ALL": "C", "TZ": "Pacific/Chatham"}
    for words in (["prepare_data"], ["train_classifier", "standard"]):
        code, printed = project.run(folder, *LIMPID, *words, **bare)
        assert code == 0, printed
    for name in ("models/standard", "data/train"):
        for path in (folder / name).iterdir():
            assert sha256(path) == sha256(reproduced / name / path.name), path.name


def test_a_clock_that_runs_backwards_changes_no_weight(reproduced: Path, tmp_path: Path) -> None:
    folder = project.copy_to(tmp_path / "project")
    os.symlink(reproduced / "data", folder / "data")
    (folder / "sitecustomize.py").write_text(BACKWARDS)
    code, printed = project.run(folder, *LIMPID, "train_classifier", "standard")
    assert code == 0, printed
    weights = "models/standard/weights.safetensors"
    assert sha256(folder / weights) == sha256(reproduced / weights)
    seconds = json.loads((folder / "reports/timings.json").read_text())
    assert 0 < seconds["train_classifier@standard"]["seconds"] < 300
    # What MLflow took too long for, on a busy machine, was kept and is delivered now.
    project.run(folder, "sh", "-c", "python -m pipelines.tracking.uploader < /dev/null")
    with sqlite3.connect(folder / "mlflow.db") as database:
        ((began, ended),) = database.execute("select start_time, end_time from runs").fetchall()
    assert began > ended, "the clock was not ours"


# The digest of an input is the same here and in a store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"file://{tmp_path}/store")


def test_an_input_has_the_same_digest_here_and_in_a_store(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "b").write_bytes(b"one")
    (folder / "inner/a").write_bytes(b"two")
    for path in (folder, folder / "b"):
        assert input_digest(path) == listing_digest(store.push(path))
    with_manifest = tmp_path / "with manifest"
    shutil.copytree(folder, with_manifest)
    (with_manifest / MANIFEST).write_text(json.dumps({"schema": 1, "parts": []}))
    listed = listing_digest(store.push(with_manifest))
    assert listed == hashlib.sha256((with_manifest / MANIFEST).read_bytes()).hexdigest()


def test_a_changed_byte_of_an_input_changes_its_digest(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for file in (tmp_path / "file", tmp_path / "folder/file"):
        found = set()
        for content in (b"one", b"two"):
            file.write_bytes(content)
            found |= {input_digest(file), input_digest(file.parent)}
        assert len(found) == 4
    with pytest.raises(DataError, match="is missing: the stage that makes it has not run"):
        input_digest(tmp_path / "nothing")


# Jobs


def call(*words: str) -> StageCall:
    """Return the call of a stage with these words."""
    name, *options = words
    module = importlib.import_module(f"pipelines.stages.{name}")
    return StageCall.of(module, parse(name, options), Params.model_validate(project.tiny()))


@pytest.mark.parametrize("path", ["/tmp/models", "../models"])
def test_a_job_takes_no_path_outside_of_the_project(path: str) -> None:
    one = call("train_classifier", "standard", "--out", path)
    with pytest.raises(ConfigError, match=f"--out is {path}; a stage in a job takes paths below"):
        one.spec("key", {}, one.outs)


def test_a_uri_stands_for_the_path_below_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(jobs.STORAGE, "s3://bucket/limpid/")
    one = call("train_classifier", "standard", "--train", "s3://bucket/limpid/data/train")
    assert one.deps == {"train": Path("data/train"), "val": Path("data/val")}
    assert one.in_store == {"train"}
    for uri in ("s3://bucket/other/data", "s3://bucket/limpid/../data"):
        with pytest.raises(ValueError, match=r"is not below LIMPID_STORAGE|leads out"):
            call("train_classifier", "standard", "--train", uri)


def test_a_cluster_of_other_versions_is_refused() -> None:
    ours = submission.versions()
    require_versions(ours)
    with pytest.raises(ConfigError, match=r"ray 1\.0 there and \d"):
        require_versions({**ours, "ray": "1.0"})


def test_a_job_submitted_by_hand_is_done_once_and_fetched(tmp_path: Path) -> None:
    """Without a cluster: what Ray sets in a job is set here, and the stage needs no Ray."""
    driver = project.copy_to(tmp_path / "driver")
    node = project.copy_to(tmp_path / "node")
    store = {"LIMPID_STORAGE": f"file://{tmp_path}/store"}
    code, printed = project.run(driver, *LIMPID, "fetch", "--send", "prepare_data", **store)
    assert code == 0, printed
    (submit,) = (line for line in printed.splitlines() if line.startswith("ray job submit"))
    words = submit.partition(" -- ")[2].split()
    assert words[:4] == ["python", "-m", "pipelines", "prepare_data"]
    assert f"file://{tmp_path}/store/data/val" in words
    job = {**store, "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}", "LIMPID_SCRATCH": str(tmp_path / "s")}
    code, printed = project.run(node, *words, **job)
    assert code == 0 and "@limpid " not in printed, printed
    assert printed == "prepare_data: done; limpid fetch prepare_data downloads its outputs\n"
    assert not (node / "data").exists()
    # A second time the result is there.
    (result,) = (tmp_path / "store/jobs").glob("prepare_data-*/*")
    before = result.stat().st_mtime_ns
    code, printed = project.run(node, *words, **job)
    assert code == 0 and result.stat().st_mtime_ns == before, printed
    code, printed = project.run(driver, *LIMPID, "fetch", "prepare_data", **store)
    assert code == 0 and "dvc commit -f prepare_data" in printed, printed
    code, printed = project.run(node, *LIMPID, "prepare_data")
    assert code == 0, printed
    for path in (node / "data").rglob("*.*"):
        assert sha256(path) == sha256(driver / path.relative_to(node)), path


def test_a_job_submitted_by_hand_that_fails_says_why_and_with_which_code(tmp_path: Path) -> None:
    folder = project.copy_to(tmp_path / "project")
    job = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}", "LIMPID_SCRATCH": str(tmp_path / "scratch")}
    code, printed = project.run(folder, *LIMPID, "train_classifier", "standard", **job)
    assert code == 2 and "a stage in a job needs LIMPID_STORAGE" in printed, printed
    job["LIMPID_STORAGE"] = f"file://{tmp_path}/store"
    code, printed = project.run(folder, *LIMPID, "train_classifier", "standard", **job)
    assert code == 3 and "/store has no data/train: the job that makes it" in printed, printed
