"""The whole pipeline on two nodes that share no disk, and nodes that are lost while they work."""

import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import project
import pytest
from project import descendants, resumed, until

from cluster import local_cluster
from cluster.local_cluster import LocalCluster
from cluster.test_small import begin, jobs, long_training, requests, run
from components.data.shards import sha256

pytestmark = pytest.mark.faults
CRAFTING = [
    sys.executable, "-m", "pipelines", "craft_training_set", "--train=data/train",
    "--classifier=models/standard",
]  # fmt: skip


@pytest.fixture
def cluster(tmp_path: Path, reproduced: Path) -> Iterator[LocalCluster]:
    """Two nodes, an MLflow server, and a project with nothing but its code."""
    reason = local_cluster.missing()
    if reason:
        pytest.skip(reason)
    folder = project.copy_to(tmp_path / "project")
    with local_cluster.running(folder, mlflow=True) as running:
        yield running


def test_the_whole_pipeline_has_the_same_metrics_as_on_one_machine(
    cluster: LocalCluster, reproduced: Path
) -> None:
    code, printed = project.run(cluster.project, "dvc", "repro", **cluster.driver)
    assert code == 0, printed[-5000:]
    for name in ("metrics.json", "scores.parquet"):
        made, known = (folder / "reports" / name for folder in (cluster.project, reproduced))
        assert sha256(made) == sha256(known), name
    assert {job["status"] for job in jobs(cluster).values()} == {"SUCCEEDED"}
    # The MLflow server has received every stage, and no events are left to be sent.
    with sqlite3.connect(cluster.home / "mlflow.db") as database:
        logged = dict(database.execute("select name, status from runs").fetchall())
    ran = {job.rsplit("-", 2)[0] for job in jobs(cluster)}
    assert ran <= {name.replace("@", "-") for name in logged}
    assert set(logged.values()) == {"FINISHED"}
    assert not list((cluster.project / ".limpid/spool").glob("*"))
    # The second time there is nothing to do and nothing to send.
    known = set(jobs(cluster))
    code, printed = project.run(cluster.project, "dvc", "repro", **cluster.driver)
    assert code == 0 and "up to date" in printed, printed
    assert set(jobs(cluster)) == known


def copy_inputs(cluster: LocalCluster, reproduced: Path) -> None:
    """Give the project its data and models."""
    for name in ("data", "models"):
        shutil.copytree(reproduced / name, cluster.project / name)


def add_spare(cluster: LocalCluster, reproduced: Path) -> None:
    """Copy the inputs, and start a third node."""
    copy_inputs(cluster, reproduced)
    cluster.start_worker("spare")
    cluster.wait_for_nodes(3)


def of_whole_nodes(workers: int | list[int]) -> dict:
    """Return parameters in which every training worker fills a node; the head is too small."""
    params = project.tiny()
    params["resources"]["train"] = {"workers": workers, "cpus": 2, "gpus": 0}
    return params


def crafting(cluster: LocalCluster) -> subprocess.Popen[str]:
    """Start a long crafting stage with two workers, each of which fills a node."""
    params = project.tiny()
    params["resources"]["shards"] = {"workers": 2, "cpus": 2, "gpus": 0}
    params["pool"]["attack"] = {**params["pool"]["attack"], "steps": 1000}
    project.write_params(cluster.project, params)
    return project.start(cluster.project, *CRAFTING, "--out=pool", **cluster.driver)


def undisturbed(cluster: LocalCluster) -> dict[str, str]:
    """Return the digests of the same set, crafted on this machine."""
    code, printed = project.run(cluster.project, *CRAFTING, "--out=here")
    assert code == 0, printed
    return digests(cluster.project / "here")


def digests(folder: Path) -> dict[str, str]:
    """Return the digest of every file in a folder."""
    return {path.name: sha256(path) for path in folder.iterdir()}


def test_crafting_goes_on_without_a_node_that_dies(cluster: LocalCluster, reproduced: Path) -> None:
    add_spare(cluster, reproduced)
    process = crafting(cluster)
    until(lambda: descendants(cluster.processes["worker0"].pid, "craft_shard"), 120)
    cluster.kill("worker0")
    printed, _ = process.communicate(timeout=400)
    assert process.returncode == 0, printed
    assert digests(cluster.project / "pool") == undisturbed(cluster)


@pytest.fixture
def cabled(tmp_path: Path) -> Iterator[LocalCluster]:
    """Two nodes, one of which (`worker0`) has a network cable that can be pulled."""
    reason = local_cluster.missing() or ("" if shutil.which("ip") else "no command `ip`")
    if reason:
        pytest.skip(reason)
    with local_cluster.running(project.copy_to(tmp_path / "project"), cabled=True) as running:
        yield running


def pull(cluster: LocalCluster) -> None:
    """Cut `worker0` off. No process dies: both sides of the cable go on."""
    assert cluster.cable is not None
    cluster.cable.pull()


def plug(cluster: LocalCluster) -> None:
    """Connect `worker0` again, after others did its work; the store must not change.

    Only a state of a training, whose upload was interrupted, may still arrive.
    """
    assert cluster.cable is not None
    before = stored(cluster)
    cluster.cable.plug()
    until(lambda: cluster.processes["worker0"].poll() is not None, 120)
    assert stored(cluster) == before


def stored(cluster: LocalCluster) -> dict[str, str]:
    """Return the digests of all objects in the store, except states of trainings, by name."""
    pages = local_cluster.client(cluster.driver["AWS_ENDPOINT_URL"]).get_paginator(
        "list_objects_v2"
    )
    found = [
        one for page in pages.paginate(Bucket=local_cluster.BUCKET) for one in page["Contents"]
    ]
    return {one["Key"]: one["ETag"] for one in found if "/kept/work/" not in one["Key"]}


def test_crafting_goes_on_without_a_node_that_is_cut_off_and_ignores_its_late_results(
    cabled: LocalCluster, reproduced: Path
) -> None:
    add_spare(cabled, reproduced)
    process = crafting(cabled)
    until(lambda: descendants(cabled.processes["worker0"].pid, "craft_shard"), 120)
    pull(cabled)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert digests(cabled.project / "pool") == undisturbed(cabled)
    before = requests(cabled)
    plug(cabled)
    assert '"PUT ' not in requests(cabled).removeprefix(before)


def uploads(cluster: LocalCluster, name: str) -> int:
    """Return how often objects with this in their names were uploaded."""
    return sum('"PUT ' in line and name in line for line in requests(cluster).splitlines())


@pytest.mark.parametrize("workers", [0, [1, 2]])
def test_a_training_resumes_on_another_node_when_its_node_is_cut_off(
    cabled: LocalCluster, reproduced: Path, workers: int | list[int]
) -> None:
    copy_inputs(cabled, reproduced)
    process, _ = begin(cabled, "0", epochs=200, params=of_whole_nodes(workers))
    until(lambda: "epoch-000005/state.pt" in requests(cabled), 120)
    pull(cabled)
    cabled.start_worker("spare")
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and resumed(printed) >= 5, printed
    assert (cabled.project / "models/long/weights.safetensors").is_file()
    plug(cabled)


def test_a_training_resumes_on_another_node_when_its_node_dies(
    cluster: LocalCluster, reproduced: Path
) -> None:
    add_spare(cluster, reproduced)
    process, _ = begin(cluster, "0", epochs=400, params=of_whole_nodes(0))
    until(lambda: "epoch-000005/state.pt" in requests(cluster), 120)
    (busy,) = (
        n for n in ("worker0", "spare") if descendants(cluster.processes[n].pid, "_train_here")
    )
    cluster.kill(busy)
    printed, _ = process.communicate(timeout=400)
    assert process.returncode == 0 and resumed(printed) >= 5, printed
    assert (cluster.project / "models/long/weights.safetensors").is_file()
    assert uploads(cluster, "epoch-000003/state.pt") == 1, "it started again"


def test_a_training_gives_up_when_its_last_node_dies(
    cluster: LocalCluster, reproduced: Path
) -> None:
    copy_inputs(cluster, reproduced)
    cluster.driver["LIMPID_WAIT_S"] = "20"
    process, _ = begin(cluster, "0", epochs=400, params=of_whole_nodes(1))
    until(lambda: "epoch-000005/state.pt" in requests(cluster), 120)
    cluster.kill("worker0")
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 4, printed
    assert "waiting for a node: 1 x 2 CPU needed, and there are 1 nodes" in printed
    assert "gave up after" in printed and "Traceback" not in printed


def test_a_training_on_two_nodes_has_the_result_of_two_workers_on_one_machine(
    cluster: LocalCluster, reproduced: Path
) -> None:
    add_spare(cluster, reproduced)
    params = of_whole_nodes(2)
    project.write_params(cluster.project, params)
    code, printed = run(cluster, *long_training())
    assert code == 0, printed
    command = [sys.executable, "-m", "pipelines", *long_training()[:-1], "here"]
    code, printed = project.run(cluster.project, *command)
    assert code == 0, printed
    folders = (cluster.project / name for name in ("models/long", "here"))
    on_cluster, on_machine = (sha256(folder / "weights.safetensors") for folder in folders)
    assert on_cluster == on_machine


def test_a_head_that_dies_is_named_and_a_new_one_resumes(
    cluster: LocalCluster, reproduced: Path
) -> None:
    copy_inputs(cluster, reproduced)
    process, _ = begin(cluster, "0", epochs=400)
    until(lambda: "epoch-000005/state.pt" in requests(cluster), 120)
    cluster.kill("worker0")
    cluster.kill("head")
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 4 and "cluster lost" in printed, printed
    cluster.start_head()
    cluster.start_worker("worker0")
    cluster.wait_for_nodes(2)
    code, printed = run(cluster, *long_training())
    assert code == 0, printed
    assert uploads(cluster, "epoch-000003/state.pt") == 1, "it started again"


def test_a_search_has_the_same_trials_there_and_here(
    cluster: LocalCluster, reproduced: Path
) -> None:
    copy_inputs(cluster, reproduced)
    shutil.copytree(reproduced / "pool", cluster.project / "pool")
    folders = ["--train=data/train", "--val=data/val", "--models=models", "--pool=pool"]
    out = cluster.project / "reports/tuning/atop"
    found = []
    for environment in (cluster.driver, {}):
        command = ["-m", "pipelines", "tune", "--name=atop", *folders]
        command += ["--out=reports/tuning/atop"]
        code, printed = project.run(cluster.project, sys.executable, *command, **environment)
        assert code == 0, printed
        found.append(json.loads((out / "trials.json").read_text()))
        shutil.rmtree(out)
    for remote, local in zip(*(sorted(trials, key=values) for trials in found), strict=True):
        assert values(remote) == values(local)
        assert remote["right"] == local["right"] and len(remote["right"]) == 20


def values(trial: dict) -> list[float]:
    """Return the values of a trial, in the order of their keys."""
    return [trial["values"][key] for key in sorted(trial["values"])]


def test_a_training_that_may_shrink_resumes_with_the_worker_that_is_left(
    cluster: LocalCluster, reproduced: Path
) -> None:
    add_spare(cluster, reproduced)
    params = of_whole_nodes([1, 2])
    process, _ = begin(cluster, "0", epochs=400, params=params)
    until(lambda: "epoch-000005/state.pt" in requests(cluster), 120)
    for node in ("worker0", "spare"):
        assert descendants(cluster.processes[node].pid, "RayTrainWorker"), f"none at {node}"
    cluster.kill("spare")
    printed, _ = process.communicate(timeout=400)
    assert process.returncode == 0, printed
    history = json.loads((cluster.project / "models/long/history.json").read_text())
    assert len(history) == 400
    assert uploads(cluster, "epoch-000003/state.pt") == 1, "it started again"
