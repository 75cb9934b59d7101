"""The seam in its smallest form: one stage of each kind on two nodes that share no disk."""

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

from cluster import stand
from cluster.stand import Stand
from components.data.shards import sha256

TRAIN = ["--train", "data/train", "--val", "data/val"]


@pytest.fixture(scope="module")
def there(reproduced: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    """Two nodes, and a project with data that neither of them sees."""
    reason = stand.possible()
    if reason:
        pytest.skip(reason)
    folder = project.copy_to(tmp_path_factory.mktemp("driver") / "project")
    subprocess.run(["cp", "-r", str(reproduced / "data"), str(folder)], check=True)
    (folder / "models").mkdir()
    with stand.standing(folder) as one:
        yield one


def run(there: Stand, module: str, *arguments: str, **environment: str) -> tuple[int, str]:
    """Run a stage as its DVC command would, with the cluster named."""
    command = [sys.executable, "-m", f"pipelines.{module}", *arguments]
    return project.run(there.project, *command, **{**there.driver, **environment})


def jobs(there: Stand) -> dict[str, dict]:
    """Return what the cluster tells of its jobs, by name."""
    token = Path(there.driver["RAY_AUTH_TOKEN_PATH"]).read_text()
    address = f"{there.driver['RAY_API_SERVER_ADDRESS']}/api/jobs/"
    asked = urllib.request.Request(address, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(asked, timeout=10) as answer:
        found = json.load(answer)
    return {job["submission_id"]: job for job in found if job["submission_id"]}


def test_a_training_is_the_same_there_and_is_fetched_when_it_is_done(
    there: Stand, reproduced: Path
) -> None:
    command = ["train_classifier", "--name", "standard", *TRAIN, "--out", "models/standard"]
    code, printed = run(there, *command)
    assert code == 0, printed
    assert "8/8 epochs" in printed or "val_accuracy" in printed
    weights = "models/standard/weights.safetensors"
    assert sha256(there.project / weights) == sha256(reproduced / weights)
    assert len(jobs(there)) == 1
    (there.project / weights).unlink()
    code, printed = run(there, *command)
    assert code == 0, printed
    assert sha256(there.project / weights) == sha256(reproduced / weights)
    assert len(jobs(there)) == 1, "it was trained again"


@pytest.mark.faults
def test_a_set_is_the_same_there(there: Stand, reproduced: Path) -> None:
    shutil.copytree(reproduced / "models", there.project / "models", dirs_exist_ok=True)
    command = ["--train", "data/train", "--classifier", "models/standard", "--out", "pool"]
    code, printed = run(there, "craft_training_set", *command)
    assert code == 0, printed
    made = sorted((there.project / "pool").iterdir())
    assert len(made) == 10
    for path in made:
        assert sha256(path) == sha256(reproduced / "pool" / path.name), path.name


def test_nothing_secret_and_no_data_travel_with_a_job(there: Stand) -> None:
    token = Path(there.driver["RAY_AUTH_TOKEN_PATH"]).read_text()
    told = json.dumps(jobs(there))
    assert "AWS_SECRET_ACCESS_KEY" not in told and token not in told
    packages = re.findall(r"gcs://(_ray_pkg_\w+)\.zip", told)
    (package,) = set(packages)
    # Only what was made from .py and .j2 files of the two packages.
    unpacked = list((there.home / "r").glob(f"session_*/runtime_resources/**/{package}"))
    kinds = {p.suffix for folder in unpacked for p in folder.rglob("*") if p.is_file()}
    assert kinds - {".pyc"} == {".py", ".j2"}


def test_no_secret_of_a_driver_or_node_is_left_on_a_cluster(there: Stand) -> None:
    """Neither in the store, nor in Ray's logs, nor with its jobs, nor at home."""
    server = f"http://somebody:{project.CANARY}@127.0.0.1:9"
    module, *arguments = long_training()
    secrets = {**project.SECRETS, **stand.KEYS, "MLFLOW_TRACKING_URI": server}
    project.write_params(there.project, {**project.tiny(), "seed": 97})
    code, printed = run(there, module, *arguments, **secrets)
    assert code == 0 and "MLflow at http://127.0.0.1:9 was not reached" in printed, printed
    token = Path(there.driver["RAY_AUTH_TOKEN_PATH"])
    words = [word.encode() for word in (project.CANARY, stand.SECRET, token.read_text())]
    kept = {"jobs": json.dumps(jobs(there)).encode(), "printed": printed.encode()}
    store = stand.client(there.driver["AWS_ENDPOINT_URL"])
    for each in store.list_objects_v2(Bucket=stand.BUCKET)["Contents"]:
        answer = store.get_object(Bucket=stand.BUCKET, Key=each["Key"])
        kept[f"s3 {each['Key']}"] = answer["Body"].read()
    for path in (*there.home.rglob("*"), *there.project.rglob("*")):
        # Git's own notes name the remote, as its user wrote it.
        if path.is_file() and path != token and ".git" not in path.parts:
            kept[str(path)] = path.read_bytes()
    assert len(kept) > 100 and any("/logs/" in name for name in kept)
    assert [name for name, found in kept.items() if any(word in found for word in words)] == []


@pytest.mark.parametrize(
    "sent", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.faults)]
)
def test_an_interruption_stops_the_job(there: Stand, sent: int) -> None:
    process, known = begin(there, f"{sent:d}")
    process.send_signal(sent)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert "interrupted" in printed and "Traceback" not in printed
    ours = {name: job for name, job in jobs(there).items() if name not in known}
    assert [job["status"] for job in ours.values()] == ["STOPPED"]


def test_a_driver_that_was_killed_finds_its_job(there: Stand) -> None:
    process, known = begin(there, "0", epochs=30)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    code, printed = run(there, *long_training())
    assert code == 0, printed
    ours = {name: job for name, job in jobs(there).items() if name not in known}
    assert [job["status"] for job in ours.values()] == ["SUCCEEDED"]


def begin(
    there: Stand, seed: str, epochs: int = 2000, params: dict | None = None
) -> tuple[subprocess.Popen[str], set[str]]:
    """Start a training that takes a while; return it when its job runs, and the jobs before it."""
    params = params or project.tiny()
    params["seed"] = 10 + int(seed)
    training = params["classifiers"]["standard"]["training"]
    params["classifiers"]["standard"]["training"] = {**training, "epochs": epochs}
    project.write_params(there.project, params)
    known = set(jobs(there))
    module, *arguments = long_training()
    command = [sys.executable, "-m", f"pipelines.{module}", *arguments]
    process = project.start(there.project, *command, **there.driver)
    until = time.monotonic() + 60
    while not any(
        job["status"] == "RUNNING" for name, job in jobs(there).items() if name not in known
    ):
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
        time.sleep(0.2)
    return process, known


def stored(there: Stand) -> str:
    """Return what the store was asked."""
    return (there.home / "s3.log").read_text()


def long_training() -> list[str]:
    return ["train_classifier", "--name", "standard", *TRAIN, "--out", "models/long"]


@pytest.mark.faults
def test_what_goes_wrong_there_ends_here_with_its_code(there: Stand) -> None:
    params = project.tiny()
    params["seed"] = 98
    training = params["classifiers"]["standard"]["training"]
    params["classifiers"]["standard"]["training"] = {**training, "batch_size": 4000}
    project.write_params(there.project, params)
    code, printed = run(there, *long_training())
    assert code == 2, printed
    assert "batch_size 4000 must be at most the 256 training images" in printed
    assert "Traceback" not in printed


def test_what_no_node_can_hold_is_refused_before_anything_is_sent(there: Stand) -> None:
    params = project.tiny()
    params["seed"] = 99  # Else what was done already is only fetched.
    params["resources"]["train"] = {"workers": 2, "cpus": 1, "gpus": 1}
    project.write_params(there.project, params)
    known, asked = set(jobs(there)), stored(there)
    code, printed = run(there, *long_training())
    assert code == 2, printed
    assert "2 x 1 CPU and 1 GPU needed, and there are 2 nodes" in printed
    assert set(jobs(there)) == known
    # Nor is it looked which of the inputs would have to be sent.
    new = stored(there).removeprefix(asked)
    assert "/jobs/" in new and "/cas/" not in new


def test_a_cluster_without_a_token_is_refused(there: Stand) -> None:
    class Open(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"[]")

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    project.write_params(there.project, {**project.tiny(), "seed": 99})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Open)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for words in ("", "yes"):
        told = {"RAY_API_SERVER_ADDRESS": address, "LIMPID_CLUSTER_WITHOUT_TOKEN": words}
        code, printed = run(there, *long_training(), **told)
        assert code == 2 and "takes jobs without a token" in printed, printed
    told["LIMPID_CLUSTER_WITHOUT_TOKEN"] = "anyone-may-run-code-there"
    code, printed = run(there, *long_training(), **told)
    server.shutdown()
    assert code == 4 and "is no Ray" in printed, printed


def test_a_cluster_that_is_not_there_is_said(there: Stand) -> None:
    address = f"http://127.0.0.1:{stand.free_port()}"
    code, printed = run(there, *long_training(), RAY_API_SERVER_ADDRESS=address)
    assert code == 4 and "no cluster answers" in printed, printed
    code, printed = run(there, *long_training(), LIMPID_STORAGE="")
    assert code == 2 and "LIMPID_STORAGE names no store" in printed, printed


@pytest.mark.faults
def test_a_stage_submitted_by_hand_and_fetched(there: Stand, reproduced: Path) -> None:
    folder = there.project
    project.write_params(folder, project.tiny())
    for name in ("dvc.lock", "models/unseen"):
        subprocess.run(["rm", "-rf", str(folder / name)], check=True)
    code, printed = project.run(
        folder, sys.executable, "-m", "pipelines", "fetch", "--send", "train_classifier@unseen",
        **there.driver,
    )  # fmt: skip
    assert code == 0, printed
    line = next(line for line in printed.splitlines() if line.startswith("ray job submit"))
    code, printed = project.run(folder, "sh", "-c", line, **there.driver)
    assert code == 0, printed
    command = ["python", "-m", "pipelines", "fetch", "train_classifier@unseen"]
    code, printed = project.run(folder, *command, **there.driver)
    assert code == 0, printed
    weights = "models/unseen/weights.safetensors"
    assert sha256(folder / weights) == sha256(reproduced / weights)
