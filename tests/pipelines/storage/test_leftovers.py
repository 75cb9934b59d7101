"""What an older version left in `.limpid` and in a store is used rightly, or passed over.

The older version is that of commit 8c2f536: its stages were `pipelines.train_classifier` and so on,
and its keys held those names. Its spooled runs are tested in `tracking/test_tracker.py`.
"""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import project
import pytest
import torch

from components.data.shards import DataError, sha256
from components.models.checkpoints import pack_state, save_state
from pipelines.config.schema import Params
from pipelines.runner import provenance
from pipelines.storage import jobs
from pipelines.storage.jobs import JobFolder
from pipelines.storage.object_store import Store

# As the older version named them; the digits of a key are any.
OLD_WORK = "train_classifier-standard-6e3b0c1f92ad"
OLD_SET = "1f53c74e19f5a6ce64934de11f53b9c7"


@pytest.fixture
def folder(reproduced: Path, tmp_path: Path) -> Path:
    """A project with the data and models of a line, and without Ray."""
    made = project.copy_with(reproduced, tmp_path / "project", "data", "models")
    params = project.tiny()
    params["resources"]["shards"] = project.NO_WORKERS
    project.write_params(made, params)
    return made


def test_states_of_an_older_version_are_not_continued(folder: Path, reproduced: Path) -> None:
    work = folder / ".limpid/work" / OLD_WORK
    weights = torch.zeros(3)
    state = {"model": {"weights": weights}, "history": [{"loss": 0.0}] * 7}
    save_state(work / "states", 7, pack_state(state))
    (work / "notes").mkdir()
    (work / "notes/history.jsonl").write_text('{"epoch": 0, "loss": 0.0}\n')
    code, printed = project.stage(folder, "train_classifier", name="standard", out="out")
    assert code == 0 and "goes on after" not in printed, printed
    name = "weights.safetensors"
    assert sha256(folder / "out" / name) == sha256(reproduced / "models/standard" / name)
    assert [path.name for path in (folder / ".limpid/work").iterdir()] == [OLD_WORK]
    _, printed = project.run(folder, sys.executable, "-m", "pipelines", "doctor")
    assert f".limpid/work/{OLD_WORK}" in printed


def test_crafted_parts_of_an_older_version_are_not_taken(folder: Path, reproduced: Path) -> None:
    old = folder / ".limpid/sets" / OLD_SET
    old.mkdir(parents=True)
    for part in (reproduced / "pool").glob("part-*.parquet"):
        (old / part.name).write_bytes(b"of another time")
    code, printed = project.stage(folder, "craft_training_set", out="out")
    assert code == 0, printed
    made, known = (sorted(path.iterdir()) for path in (folder / "out", reproduced / "pool"))
    assert [(p.name, sha256(p)) for p in made] == [(p.name, sha256(p)) for p in known]


# A store

OLD_SPEC = {
    "module": "pipelines.train_classifier",
    "options": {"name": "standard", "train": "data/train", "val": "data/val", "out": "out"},
    "deps": {},
    "view": {"seed": 0},
    "resources": {},
    "work": f".limpid/work/{OLD_WORK}",
    "versions": {"Python": "3.11"},
}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store of this process, empty."""
    monkeypatch.setenv(jobs.STORAGE, f"file://{tmp_path}/store")
    return jobs.store()


def test_a_job_that_an_older_version_described_ends_in_a_sentence(
    store: Store, tmp_path: Path
) -> None:
    store.write(f"jobs/{OLD_WORK}/spec.json", json.dumps(OLD_SPEC).encode())
    code, printed = project.run(
        tmp_path, sys.executable, "-m", "pipelines.runner.job", "1",
        LIMPID_JOB=OLD_WORK, LIMPID_SCRATCH=str(tmp_path / "scratch"),
        PYTHONPATH=str(project.ROOT),
    )  # fmt: skip
    assert code == 3, printed
    (line,) = printed.splitlines()
    sentence = f"{store.uri}/jobs/{OLD_WORK}/spec.json is damaged or of another version of Limpid"
    assert line.startswith(f"error: {sentence} (module, stage): delete it")
    failure = JobFolder(store, OLD_WORK).failure("1")
    assert failure is not None and failure.code == 3 and sentence in failure.message


@pytest.mark.parametrize("content", [b"", b"{}", b'{"metrics": {}, "outs": {}}', b"\x80"])
def test_a_record_of_another_form_ends_in_a_sentence(content: bytes, store: Store) -> None:
    for name in ("jobs/one/spec.json", "jobs/one/result.json", "jobs/one/failure-1.json"):
        store.write(name, content)
    store.write("named/models/standard.json", content)
    folder = JobFolder(store, "one")
    for read in (
        folder.spec,
        folder.result,
        lambda: folder.failure("1"),
        lambda: jobs.published(Path("models/standard")),
    ):
        with pytest.raises(DataError, match=r"of another version of Limpid .*: delete it") as found:
            read()
        assert str(found.value).count("\n") == 0


def test_an_output_that_an_older_version_published_is_fetched(store: Store, tmp_path: Path) -> None:
    folder = project.copy_to(tmp_path / "project")
    made = tmp_path / "made"
    made.mkdir()
    (made / "weights").write_bytes(b"of a job")
    listing = json.loads(store.push(made).model_dump_json())
    events = [["advance", 1, 1, "epochs", {"loss": 0.5}], ["log", {"loss": 0.5}, 0], ["say", "so"]]
    result = {"metrics": {"loss": 0.5}, "outs": {"out": listing}, "events": events}
    store.write(f"jobs/{OLD_WORK}/result.json", json.dumps(result).encode())
    published = {"listing": listing, "job": OLD_WORK}
    store.write("named/models/standard.json", json.dumps(published).encode())
    command = [sys.executable, "-m", "pipelines", "fetch", "train_classifier@standard"]
    code, printed = project.run(folder, *command)
    assert code == 0, printed
    assert (folder / "models/standard/weights").read_bytes() == b"of a job"
    assert f"models/standard from the job {OLD_WORK}" in printed and "so\n" in printed


def test_no_key_of_an_older_version_is_a_key_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key holds the names of the module and of all files, even where their bytes are the same."""
    module = importlib.import_module("pipelines.stages.train_classifier")
    view = get_type_hints(module.run)["params"].of(
        Params.model_validate(project.base()), "standard"
    )
    now = provenance.stage_key(module, view, {})
    old = SimpleNamespace(__name__="pipelines.train_classifier", __file__=module.__file__)
    keys = {now, provenance.stage_key(old, view, {})}
    digests = provenance.code_digests(module)
    moved = {path.replace("pipelines/stages/", "pipelines/"): one for path, one in digests.items()}
    monkeypatch.setattr(provenance, "code_digests", lambda _: moved)
    keys.add(provenance.stage_key(module, view, {}))
    assert len(keys) == 3
