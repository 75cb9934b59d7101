"""The whole line on two nodes that share no disk, and nodes that go while they work: rows 8, 10."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import project
import pytest
from faults.conftest import below, until

from cluster import stand
from cluster.stand import Stand
from cluster.test_small import begin, jobs, long_training, run
from components.shards import sha256

pytestmark = pytest.mark.faults


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
    # A second time there is nothing to do, nor to send.
    known = set(jobs(there))
    code, printed = project.run(there.project, "dvc", "repro", **there.driver)
    assert code == 0 and "up to date" in printed, printed
    assert set(jobs(there)) == known


def data(there: Stand, reproduced: Path) -> None:
    for name in ("data", "models"):
        shutil.copytree(reproduced / name, there.project / name)


def crafting(there: Stand) -> subprocess.Popen[str]:
    """Start a stage that crafts for a while."""
    params = project.tiny()
    params["pool"]["attack"] = {**params["pool"]["attack"], "steps": 2000}
    project.write_params(there.project, params)
    command = ["-m", "pipelines.craft_training_set", "--train=data/train"]
    command += ["--classifier=models/standard", "--out=pool"]
    return project.start(there.project, sys.executable, *command, **there.driver)


def test_a_node_that_dies_is_done_without(there: Stand, reproduced: Path) -> None:
    data(there, reproduced)
    there.start_worker("spare")
    process = crafting(there)
    wait(there, process)
    time.sleep(5)
    there.kill("worker0")
    printed, _ = process.communicate(timeout=400)
    assert process.returncode == 0, printed
    assert len(list((there.project / "pool").glob("part-*"))) == 9


def test_a_node_that_is_cut_off_is_done_without_and_not_believed_later(
    tmp_path: Path, reproduced: Path
) -> None:
    """No process dies here: both sides of the cable go on, and only one of them may write."""
    reason = stand.possible() or ("" if shutil.which("ip") else "no `ip` to lay a cable with")
    if reason:
        pytest.skip(reason)
    folder = project.copy_to(tmp_path / "project")
    with stand.standing(folder, cabled=True) as there:
        assert there.cable is not None
        data(there, reproduced)
        there.start_worker("spare")
        there.wait_for_nodes(3)
        process = crafting(there)
        wait(there, process)
        time.sleep(5)
        there.cable.pull()
        printed, _ = process.communicate(timeout=400)
        assert process.returncode == 0, printed
        made = {path.name: sha256(path) for path in (folder / "pool").iterdir()}
        assert len([name for name in made if name.startswith("part-")]) == 9
        known = stored(there)
        there.cable.plug()
        until(lambda: there.processes["worker0"].poll() is not None, 120)
        assert '"PUT ' not in stored(there).removeprefix(known)


def test_a_training_whose_node_dies_goes_on_at_another(there: Stand, reproduced: Path) -> None:
    data(there, reproduced)
    there.start_worker("spare")
    process, _ = begin(there, "0", epochs=400)
    until(lambda: "epoch-000005/state.pt" in stored(there), 120)
    there.kill("worker0")
    printed, _ = process.communicate(timeout=400)
    assert process.returncode == 0, printed
    assert (there.project / "models/long/weights.safetensors").is_file()
    kept = [line for line in stored(there).splitlines() if "epoch-000003/state.pt" in line]
    assert sum('"PUT ' in line for line in kept) == 1, "it began anew"


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
        command = ["-m", "pipelines.tune", "--name=atop", *folders, "--out=reports/tuning/atop"]
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
    data(there, reproduced)
    there.start_worker("spare")
    there.wait_for_nodes(3)
    params = project.tiny()
    # A whole node for each.
    params["resources"]["train"] = {"workers": [1, 2], "cpus": 2, "gpus": 0}
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


def stored(there: Stand) -> str:
    """Return what the store was asked."""
    return (there.home / "s3.log").read_text()


def wait(there: Stand, process: object) -> None:
    """Wait until a job runs."""
    for _ in range(200):
        if any(job["status"] == "RUNNING" for job in jobs(there).values()):
            return
        time.sleep(0.2)
    raise AssertionError(process)
