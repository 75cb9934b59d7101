"""Stages as jobs: one stage of each kind on two nodes that share no disk."""

import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import project
import pytest

from cluster import local_cluster
from cluster.local_cluster import LocalCluster
from components.data.shards import sha256

TRAIN = ["--train", "data/train", "--val", "data/val"]


@pytest.fixture(scope="module")
def cluster(reproduced: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Two nodes, and a project with data that neither of them sees."""
    reason = local_cluster.missing()
    if reason:
        pytest.skip(reason)
    folder = project.copy_to(tmp_path_factory.mktemp("driver") / "project")
    subprocess.run(["cp", "-r", str(reproduced / "data"), str(folder)], check=True)
    (folder / "models").mkdir()
    with local_cluster.running(folder) as running:
        yield running


def run(cluster: LocalCluster, stage: str, *arguments: str, **environment: str) -> tuple[int, str]:
    """Run a stage as DVC does, with the cluster named."""
    command = [sys.executable, "-m", "pipelines", stage, *arguments]
    return project.run(cluster.project, *command, **{**cluster.driver, **environment})


def jobs(cluster: LocalCluster) -> dict[str, dict]:
    """Return what the cluster reports of its jobs, by name."""
    token = Path(cluster.driver["RAY_AUTH_TOKEN_PATH"]).read_text()
    address = f"{cluster.driver['RAY_API_SERVER_ADDRESS']}/api/jobs/"
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        found = json.load(answer)
    return {job["submission_id"]: job for job in found if job["submission_id"]}


def test_a_training_has_the_same_result_there_and_is_downloaded_when_it_has_finished(
    cluster: LocalCluster, reproduced: Path
) -> None:
    command = ["train_classifier", "--name", "standard", *TRAIN, "--out", "models/standard"]
    code, printed = run(cluster, *command)
    assert code == 0, printed
    assert "8/8 epochs" in printed or "val_accuracy" in printed
    weights = "models/standard/weights.safetensors"
    assert sha256(cluster.project / weights) == sha256(reproduced / weights)
    assert len(jobs(cluster)) == 1
    (cluster.project / weights).unlink()
    code, printed = run(cluster, *command)
    assert code == 0, printed
    assert sha256(cluster.project / weights) == sha256(reproduced / weights)
    assert len(jobs(cluster)) == 1, "it was trained again"


@pytest.mark.faults
def test_a_crafted_set_has_the_same_bytes_there(cluster: LocalCluster, reproduced: Path) -> None:
    shutil.copytree(reproduced / "models", cluster.project / "models", dirs_exist_ok=True)
    command = ["--train", "data/train", "--classifier", "models/standard", "--out", "pool"]
    code, printed = run(cluster, "craft_training_set", *command)
    assert code == 0, printed
    made = sorted((cluster.project / "pool").iterdir())
    assert len(made) == 10
    for path in made:
        assert sha256(path) == sha256(reproduced / "pool" / path.name), path.name


def test_no_secret_and_no_data_travel_with_a_job(cluster: LocalCluster) -> None:
    token = Path(cluster.driver["RAY_AUTH_TOKEN_PATH"]).read_text()
    reported = json.dumps(jobs(cluster))
    assert "AWS_SECRET_ACCESS_KEY" not in reported and token not in reported
    packages = re.findall(r"gcs://(_ray_pkg_\w+)\.zip", reported)
    (package,) = set(packages)
    # Only what was made from .py and .j2 files of the two packages.
    unpacked = list((cluster.home / "r").glob(f"session_*/runtime_resources/**/{package}"))
    kinds = {p.suffix for folder in unpacked for p in folder.rglob("*") if p.is_file()}
    assert kinds - {".pyc"} == {".py", ".j2"}


def test_no_secret_of_a_driver_or_node_is_left_on_a_cluster(cluster: LocalCluster) -> None:
    """Neither in the store, Ray's logs and jobs, nor in the project of the driver."""
    server = f"http://somebody:{project.CANARY}@127.0.0.1:9"
    stage, *arguments = long_training()
    secrets = {**project.SECRETS, **local_cluster.KEYS, "MLFLOW_TRACKING_URI": server}
    project.write_params(cluster.project, {**project.tiny(), "seed": 97})
    code, printed = run(cluster, stage, *arguments, **secrets)
    assert code == 0 and "MLflow at http://127.0.0.1:9 was not reached" in printed, printed
    token = Path(cluster.driver["RAY_AUTH_TOKEN_PATH"])
    words = [word.encode() for word in (project.CANARY, local_cluster.SECRET, token.read_text())]
    kept = {"jobs": json.dumps(jobs(cluster)).encode(), "printed": printed.encode()}
    store = local_cluster.client(cluster.driver["AWS_ENDPOINT_URL"])
    for each in store.list_objects_v2(Bucket=local_cluster.BUCKET)["Contents"]:
        answer = store.get_object(Bucket=local_cluster.BUCKET, Key=each["Key"])
        kept[f"s3 {each['Key']}"] = answer["Body"].read()
    for path in (*cluster.home.rglob("*"), *cluster.project.rglob("*")):
        # Git's own files name the remote as the user wrote it.
        if path.is_file() and path != token and ".git" not in path.parts:
            kept[str(path)] = path.read_bytes()
    assert len(kept) > 100 and any("/logs/" in name for name in kept)
    assert [name for name, found in kept.items() if any(word in found for word in words)] == []


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.faults)]
)
def test_an_interruption_stops_the_job(cluster: LocalCluster, number: int) -> None:
    process, known = begin(cluster, f"{number:d}")
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert "interrupted" in printed and "Traceback" not in printed
    new = {name: job for name, job in jobs(cluster).items() if name not in known}
    assert [job["status"] for job in new.values()] == ["STOPPED"]


def test_the_next_driver_finds_the_job_of_a_killed_one(cluster: LocalCluster) -> None:
    process, known = begin(cluster, "0", epochs=30)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    code, printed = run(cluster, *long_training())
    assert code == 0, printed
    new = {name: job for name, job in jobs(cluster).items() if name not in known}
    assert [job["status"] for job in new.values()] == ["SUCCEEDED"]


def begin(
    cluster: LocalCluster, seed: str, epochs: int = 2000, params: dict | None = None
) -> tuple[subprocess.Popen[str], set[str]]:
    """Start a long training; return it once its job runs, and the names of the jobs before it."""
    params = params or project.tiny()
    params["seed"] = 10 + int(seed)
    training = params["classifiers"]["standard"]["training"]
    params["classifiers"]["standard"]["training"] = {**training, "epochs": epochs}
    project.write_params(cluster.project, params)
    known = set(jobs(cluster))
    command = [sys.executable, "-m", "pipelines", *long_training()]
    process = project.start(cluster.project, *command, **cluster.driver)
    deadline = time.monotonic() + 60
    while not any(
        job["status"] == "RUNNING" for name, job in jobs(cluster).items() if name not in known
    ):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.2)
    return process, known


def requests(cluster: LocalCluster) -> str:
    """Return the log of all requests to the store."""
    return (cluster.home / "s3.log").read_text()


def long_training() -> list[str]:
    return ["train_classifier", "--name", "standard", *TRAIN, "--out", "models/long"]


@pytest.mark.faults
def test_a_failure_of_a_job_ends_the_stage_with_its_exit_code(cluster: LocalCluster) -> None:
    params = project.tiny()
    params["seed"] = 98
    training = params["classifiers"]["standard"]["training"]
    params["classifiers"]["standard"]["training"] = {**training, "batch_size": 4000}
    project.write_params(cluster.project, params)
    code, printed = run(cluster, *long_training())
    assert code == 2, printed
    assert "batch_size 4000 must be at most the 256 training images" in printed
    assert "Traceback" not in printed


def test_a_stage_that_no_node_can_hold_is_refused_before_anything_is_sent(
    cluster: LocalCluster,
) -> None:
    params = project.tiny()
    params["seed"] = 99  # With another seed, there is no result to download.
    params["resources"]["train"] = {"workers": 2, "cpus": 1, "gpus": 1}
    project.write_params(cluster.project, params)
    known, before = set(jobs(cluster)), requests(cluster)
    code, printed = run(cluster, *long_training())
    assert code == 2, printed
    assert "2 x 1 CPU and 1 GPU needed, and there are 2 nodes" in printed
    assert set(jobs(cluster)) == known
    # It is not even checked which inputs the store lacks.
    new = requests(cluster).removeprefix(before)
    assert "/jobs/" in new and "/cas/" not in new


def test_a_cluster_without_a_token_is_refused(cluster: LocalCluster) -> None:
    class Open(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"[]")

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    project.write_params(cluster.project, {**project.tiny(), "seed": 99})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Open)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for consent in ("", "yes"):
        named = {"RAY_API_SERVER_ADDRESS": address, "LIMPID_CLUSTER_WITHOUT_TOKEN": consent}
        code, printed = run(cluster, *long_training(), **named)
        assert code == 2 and "takes jobs without a token" in printed, printed
    named["LIMPID_CLUSTER_WITHOUT_TOKEN"] = "anyone-may-run-code-there"
    code, printed = run(cluster, *long_training(), **named)
    server.shutdown()
    assert code == 4 and "is no Ray" in printed, printed


def test_a_cluster_that_does_not_answer_is_named(cluster: LocalCluster) -> None:
    address = f"http://127.0.0.1:{local_cluster.free_port()}"
    code, printed = run(cluster, *long_training(), RAY_API_SERVER_ADDRESS=address)
    assert code == 4 and "no cluster answers" in printed, printed
    code, printed = run(cluster, *long_training(), LIMPID_STORAGE="")
    assert code == 2 and "LIMPID_STORAGE names no store" in printed, printed


@pytest.mark.faults
def test_a_stage_can_be_submitted_by_hand_and_fetched(
    cluster: LocalCluster, reproduced: Path
) -> None:
    folder = cluster.project
    project.write_params(folder, project.tiny())
    for name in ("dvc.lock", "models/unseen"):
        subprocess.run(["rm", "-rf", str(folder / name)], check=True)
    code, printed = project.run(
        folder, sys.executable, "-m", "pipelines", "fetch", "--send", "train_classifier@unseen",
        **cluster.driver,
    )  # fmt: skip
    assert code == 0, printed
    line = next(line for line in printed.splitlines() if line.startswith("ray job submit"))
    code, printed = project.run(folder, "sh", "-c", line, **cluster.driver)
    assert code == 0, printed
    command = ["python", "-m", "pipelines", "fetch", "train_classifier@unseen"]
    code, printed = project.run(folder, *command, **cluster.driver)
    assert code == 0, printed
    weights = "models/unseen/weights.safetensors"
    assert sha256(folder / weights) == sha256(reproduced / weights)
