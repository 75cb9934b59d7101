"""The whole line on two nodes that share no disk, and nodes that go while they work: rows 8, 10."""

import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import project
import pytest
from faults.conftest import below, resumed, until

from cluster import stand
from cluster.stand import Stand
from cluster.test_small import begin, jobs, long_training, run, stored
from components.data.shards import sha256

pytestmark = pytest.mark.faults
CRAFTING = [
    sys.executable, "-m", "pipelines", "craft_training_set", "--train=data/train",
    "--classifier=models/standard",
]  # fmt: skip


@pytest.fixture
def there(tmp_path: Path, reproduced: Path) -> Iterator[Stand]:
    """Two nodes, an MLflow server, and a project with nothing but its code."""
    reason = stand.possible()
    if reason:
        pytest.skip(reason)
    folder = project.copy_to(tmp_path / "project")
    with stand.standing(folder, mlflow=True) as one:
        yield one


def test_the_whole_line_ends_in_the_metrics_of_the_embedded_one(
    there: Stand, reproduced: Path
) -> None:
    code, printed = project.run(there.project, "dvc", "repro", **there.driver)
    assert code == 0, printed[-5000:]
    for name in ("metrics.json", "scores.parquet"):
        made, known = (folder / "reports" / name for folder in (there.project, reproduced))
        assert sha256(made) == sha256(known), name
    assert {job["status"] for job in jobs(there).values()} == {"SUCCEEDED"}
    # MLflow's server was told of every stage, and nothing waits for it.
    with sqlite3.connect(there.home / "mlflow.db") as database:
        told = dict(database.execute("select name, status from runs").fetchall())
    ran = {job.rsplit("-", 2)[0] for job in jobs(there)}
    assert ran <= {name.replace("@", "-") for name in told}
    assert set(told.values()) == {"FINISHED"}
    assert not list((there.project / ".limpid/spool").glob("*"))
    # A second time there is nothing to do, nor to send.
    known = set(jobs(there))
    code, printed = project.run(there.project, "dvc", "repro", **there.driver)
    assert code == 0 and "up to date" in printed, printed
    assert set(jobs(there)) == known


def data(there: Stand, reproduced: Path) -> None:
    for name in ("data", "models"):
        shutil.copytree(reproduced / name, there.project / name)


def join_spare(there: Stand, reproduced: Path) -> None:
    """Have data, and a third node."""
    data(there, reproduced)
    there.start_worker("spare")
    there.wait_for_nodes(3)


def of_whole_nodes(workers: int | list[int]) -> dict:
    """Return parameters of trainings each of whose workers takes a node, which the head is not."""
    params = project.tiny()
    params["resources"]["train"] = {"workers": workers, "cpus": 2, "gpus": 0}
    return params


def crafting(there: Stand) -> subprocess.Popen[str]:
    """Start a stage that crafts for a while, by two workers of which each takes a node."""
    params = project.tiny()
    params["resources"]["shards"] = {"workers": 2, "cpus": 2, "gpus": 0}
    params["pool"]["attack"] = {**params["pool"]["attack"], "steps": 1000}
    project.write_params(there.project, params)
    return project.start(there.project, *CRAFTING, "--out=pool", **there.driver)


def undisturbed(there: Stand) -> dict[str, str]:
    """Return what the same crafting makes here."""
    code, printed = project.run(there.project, *CRAFTING, "--out=here")
    assert code == 0, printed
    return made(there.project / "here")


def made(folder: Path) -> dict[str, str]:
    """Return the digests of what a stage made."""
    return {path.name: sha256(path) for path in folder.iterdir()}


def test_a_node_that_dies_is_done_without(there: Stand, reproduced: Path) -> None:
    join_spare(there, reproduced)
    process = crafting(there)
    until(lambda: below(there.processes["worker0"].pid, "craft_shard"), 120)
    there.kill("worker0")
    printed, _ = process.communicate(timeout=400)
    assert process.returncode == 0, printed
    assert made(there.project / "pool") == undisturbed(there)


@pytest.fixture
def cabled(tmp_path: Path) -> Iterator[Stand]:
    """Two nodes of which `worker0` is on a cable."""
    reason = stand.possible() or ("" if shutil.which("ip") else "no `ip` to lay a cable with")
    if reason:
        pytest.skip(reason)
    with stand.standing(project.copy_to(tmp_path / "project"), cabled=True) as one:
        yield one


def pull(there: Stand) -> None:
    """Cut a node off. No process dies: both sides of the cable go on."""
    assert there.cable is not None
    there.cable.pull()


def plug(there: Stand) -> None:
    """Connect it again, when others have done its work: nothing of that may change.

    A state of a training that was on its way for all that time may yet arrive.
    """
    assert there.cable is not None
    known = held(there)
    there.cable.plug()
    until(lambda: there.processes["worker0"].poll() is not None, 120)
    assert held(there) == known


def held(there: Stand) -> dict[str, str]:
    """Return the digests of all that the store holds, but for states of trainings, by name."""
    pages = stand.client(there.driver["AWS_ENDPOINT_URL"]).get_paginator("list_objects_v2")
    found = [one for page in pages.paginate(Bucket=stand.BUCKET) for one in page["Contents"]]
    return {one["Key"]: one["ETag"] for one in found if "/kept/work/" not in one["Key"]}


def test_a_node_that_is_cut_off_is_done_without_and_not_believed_later(
    cabled: Stand, reproduced: Path
) -> None:
    join_spare(cabled, reproduced)
    process = crafting(cabled)
    until(lambda: below(cabled.processes["worker0"].pid, "craft_shard"), 120)
    pull(cabled)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert made(cabled.project / "pool") == undisturbed(cabled)
    known = stored(cabled)
    plug(cabled)
    assert '"PUT ' not in stored(cabled).removeprefix(known)


@pytest.mark.parametrize("workers", [0, [1, 2]])
def test_a_training_whose_node_is_cut_off_goes_on_at_another(
    cabled: Stand, reproduced: Path, workers: int | list[int]
) -> None:
    data(cabled, reproduced)
    process, _ = begin(cabled, "0", epochs=200, params=of_whole_nodes(workers))
    until(lambda: "epoch-000005/state.pt" in stored(cabled), 120)
    pull(cabled)
    cabled.start_worker("spare")
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and resumed(printed) >= 5, printed
    assert (cabled.project / "models/long/weights.safetensors").is_file()
    plug(cabled)


def test_a_training_whose_node_dies_goes_on_at_another(there: Stand, reproduced: Path) -> None:
    join_spare(there, reproduced)
    process, _ = begin(there, "0", epochs=400, params=of_whole_nodes(0))
    until(lambda: "epoch-000005/state.pt" in stored(there), 120)
    (holder,) = (n for n in ("worker0", "spare") if below(there.processes[n].pid, "_loop"))
    there.kill(holder)
    printed, _ = process.communicate(timeout=400)
    assert process.returncode == 0 and resumed(printed) >= 5, printed
    assert (there.project / "models/long/weights.safetensors").is_file()
    kept = [line for line in stored(there).splitlines() if "epoch-000003/state.pt" in line]
    assert sum('"PUT ' in line for line in kept) == 1, "it began anew"


def test_a_training_whose_last_node_dies_does_not_wait_for_ever(
    there: Stand, reproduced: Path
) -> None:
    data(there, reproduced)
    there.driver["LIMPID_WAIT_S"] = "20"
    process, _ = begin(there, "0", epochs=400, params=of_whole_nodes(1))
    until(lambda: "epoch-000005/state.pt" in stored(there), 120)
    there.kill("worker0")
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 4, printed
    assert "waiting for a node: 1 x 2 CPU needed, and there are 1 nodes" in printed
    assert "gave up after" in printed and "Traceback" not in printed


def test_a_training_by_two_nodes_is_that_of_two_workers_here(
    there: Stand, reproduced: Path
) -> None:
    join_spare(there, reproduced)
    params = of_whole_nodes(2)
    project.write_params(there.project, params)
    code, printed = run(there, *long_training())
    assert code == 0, printed
    module, name, standard, *folders, out, _ = long_training()
    command = [sys.executable, "-m", f"pipelines.{module}", name, standard, *folders, out, "here"]
    code, printed = project.run(there.project, *command)
    assert code == 0, printed
    there_and_here = ("models/long", "here")
    one, other = (sha256(there.project / n / "weights.safetensors") for n in there_and_here)
    assert one == other


def test_a_head_that_dies_is_said_and_a_new_one_goes_on(there: Stand, reproduced: Path) -> None:
    data(there, reproduced)
    process, _ = begin(there, "0", epochs=400)
    until(lambda: "epoch-000005/state.pt" in stored(there), 120)
    there.kill("worker0")
    there.kill("head")
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 4 and "cluster lost" in printed, printed
    there.start_head()
    there.start_worker("worker0")
    there.wait_for_nodes(2)
    code, printed = run(there, *long_training())
    assert code == 0, printed
    kept = [line for line in stored(there).splitlines() if "epoch-000003/state.pt" in line]
    assert sum('"PUT ' in line for line in kept) == 1, "it began anew"


def test_a_search_there_tries_what_it_tries_here(there: Stand, reproduced: Path) -> None:
    data(there, reproduced)
    shutil.copytree(reproduced / "pool", there.project / "pool")
    folders = ["--train=data/train", "--val=data/val", "--models=models", "--pool=pool"]
    out = there.project / "reports/tuning/atop"
    found = []
    for environment in (there.driver, {}):
        command = [
            "-m",
            "pipelines",
            "tune",
            "--name=atop",
            *folders,
            "--out=reports/tuning/atop",
        ]
        code, printed = project.run(there.project, sys.executable, *command, **environment)
        assert code == 0, printed
        found.append(json.loads((out / "trials.json").read_text()))
        shutil.rmtree(out)
    for far, near in zip(*(sorted(one, key=tried) for one in found), strict=True):
        assert tried(far) == tried(near)
        assert far["right"] == near["right"] and len(far["right"]) == 20


def tried(trial: dict) -> list[float]:
    """Return the values of a trial."""
    return [trial["values"][place] for place in sorted(trial["values"])]


def test_a_training_that_may_shrink_goes_on_with_the_worker_that_is_left(
    there: Stand, reproduced: Path
) -> None:
    join_spare(there, reproduced)
    params = of_whole_nodes([1, 2])
    process, _ = begin(there, "0", epochs=400, params=params)
    until(lambda: "epoch-000005/state.pt" in stored(there), 120)
    for node in ("worker0", "spare"):
        assert below(there.processes[node].pid, "RayTrainWorker"), f"none at {node}"
    there.kill("spare")
    printed, _ = process.communicate(timeout=400)
    assert process.returncode == 0, printed
    history = json.loads((there.project / "models/long/history.json").read_text())
    assert len(history) == 400
    kept = [line for line in stored(there).splitlines() if "epoch-000003/state.pt" in line]
    assert sum('"PUT ' in line for line in kept) == 1, "it began anew"
