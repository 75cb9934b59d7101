"""An attacker neither gets in, nor gets code run, nor reads a secret."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import project
import psutil
import pytest
from cluster.local_cluster import free_port

from pipelines.errors import ConfigError
from pipelines.runner.exit_codes import outcome

ROOT = project.ROOT

# The embedded Ray

EMBEDDED = """
import json, os
import psutil
from pipelines.cluster import session
from pipelines.config.resources import Workers
import ray
from ray._raylet import GcsClient

def mode_of_worker():
    return os.environ["RAY_AUTH_MODE"]

with session.hold(Workers(workers=1, cpus=1, gpus=0)):
    me = psutil.Process()
    family = [me, *me.children(recursive=True)]
    token = os.environ["RAY_AUTH_TOKEN"]
    print(json.dumps({
        "mode": ray.get(ray.remote(mode_of_worker).remote()),
        "token": token,
        "address": ray.get_runtime_context().gcs_address,
        "listens_on": sorted({
            c.laddr.ip for p in family for c in p.net_connections("inet") if c.status == "LISTEN"
        }),
        "shown": [p.name() for p in family if token in " ".join(p.cmdline())],
    }), flush=True)
    input()
"""
STRANGER = """
import sys
from ray._raylet import GcsClient
print(GcsClient(address=sys.argv[1]).internal_kv_keys(b"", None, timeout=5))
"""


def test_an_embedded_ray_serves_only_its_own_process(tmp_path: Path) -> None:
    inherited = {k: v for k, v in os.environ.items() if k != "HOME" and not k.startswith("RAY_")}
    # Settings for a cluster must not reach the embedded Ray.
    set_before = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "known"}
    process = subprocess.Popen(
        [sys.executable, "-c", EMBEDDED], cwd=tmp_path, text=True,
        env={**inherited, **set_before, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        found = json.loads(process.stdout.readline())
        assert found["mode"] == "token" and re.fullmatch("[0-9a-f]{64}", found["token"])
        assert found["shown"] == []
        assert {ip.removeprefix("::ffff:") for ip in found["listens_on"]} == {"127.0.0.1"}
        stranger = subprocess.run(
            [sys.executable, "-c", STRANGER, found["address"]], capture_output=True, text=True,
            env={**inherited, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "known"}, timeout=60,
        )  # fmt: skip
        assert stranger.returncode == 1 and "InvalidAuthToken" in stranger.stderr
    finally:
        process.communicate("\n", timeout=60)
    # The token is in memory alone.
    assert process.returncode == 0 and not [p for p in tmp_path.rglob("*") if p.is_file()]


# Secrets


def files_with_canary(folder: Path) -> list[str]:
    """Return the files in a folder that contain the canary, except git's own."""
    inner = {path: path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    files = [path for path, name in inner.items() if ".git" not in name.parts]
    return [str(inner[path]) for path in files if project.CANARY.encode() in path.read_bytes()]


def test_the_line_writes_no_secret_of_its_environment(reproduced: Path) -> None:
    """The line ran with secrets in its environment and in the URL of its remote."""
    assert project.CANARY in (reproduced / ".git/config").read_text()
    stores = ("mlflow.db", "mlruns", ".limpid", "reports/report.html", "data/train", "models")
    assert [name for name in stores if not (reproduced / name).exists()] == []
    assert files_with_canary(reproduced.parent) == []


SERVER = f"http://somebody:{project.CANARY}@127.0.0.1:9"


def test_the_password_of_an_unreachable_server_is_neither_printed_nor_stored(
    tmp_path: Path,
) -> None:
    folder = project.copy_to(tmp_path / "project")
    command = [sys.executable, "-m", "pipelines", "prepare_data"]
    command += [f"--out-{split}=data/{split}" for split in ("train", "val", "test")]
    code, printed = project.run(folder, *command, MLFLOW_TRACKING_URI=SERVER)
    assert code == 0 and "MLflow at http://127.0.0.1:9 was not reached" in printed
    assert project.CANARY not in printed
    assert list((folder / ".limpid/spool").iterdir()) and files_with_canary(tmp_path) == []


@pytest.mark.parametrize("kind", [ConnectionError, ConfigError, RuntimeError])
def test_errors_hide_passwords_of_urls(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sentence = outcome(kind(f"no cluster answers at {SERVER}/api"))[1]
    assert "no cluster answers at http://127.0.0.1:9/api" in sentence
    assert (tmp_path / ".limpid/last_error.txt").is_file() == (kind is RuntimeError)
    assert files_with_canary(tmp_path) == []


# The code


# Patterns of code that trusts the content of a file, each with a line that it matches.
FORBIDDEN = {
    r"weights_only\s*=\s*(?!True)": "torch.load(path, weights_only=False)",
    r"torch\.load\((?!.*weights_only=True)": "torch.load(path)",
    r"\bpickle\.loads?\(|from pickle import": "pickle.load(file)",
    r"\bjoblib\b": "joblib.load(path)",
    r"\bnp\.load\(|allow_pickle": "np.load(path, allow_pickle=True)",
    r"^\s*(import|from) yaml\b|typ=.unsafe": "import yaml",
    r"\.extractall\(|unpack_archive\(": "tar.extractall(folder)",
    r"shell\s*=\s*True|os\.(system|popen)\(": "subprocess.run(command, shell=True)",
    r"(?<![\w.])(eval|exec)\(": "eval(text)",
}


def test_the_code_never_trusts_what_it_reads() -> None:
    assert [
        planted for pattern, planted in FORBIDDEN.items() if not re.search(pattern, planted)
    ] == []
    files = [p for name in ("components", "pipelines") for p in (ROOT / name).rglob("*.py")]
    assert len(files) > 80
    # An open bracket goes on in the next line.
    joined = {path: re.sub(r"\(\n\s*", "(", path.read_text()) for path in files}
    lines = [(path, line) for path, text in joined.items() for line in text.splitlines()]
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path, line in lines
        if any(re.search(pattern, line) for pattern in FORBIDDEN)
    ]
    assert found == []


# What is installed


def pinned_versions(text: str) -> dict[str, str]:
    pins = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", text, re.M)
    return {re.sub("[-_.]+", "-", name).lower(): version for name, version in pins}


def test_the_lock_has_hashes_of_every_pinned_version_except_torch() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    pinned = pinned_versions((ROOT / "constraints.txt").read_text())
    assert pinned.pop("torch")
    assert pinned_versions(lock) == pinned
    entries = lock.replace("\\\n", " ").splitlines()
    assert len(entries) == len(pinned)
    one = r"[A-Za-z0-9_.\[\]-]+==[^\s;]+( ; [^-]+)?( +--hash=sha256:[0-9a-f]{64})+"
    assert [entry for entry in entries if not re.fullmatch(one, entry)] == []


def test_an_audit_without_network_says_that_it_checked_nothing(tmp_path: Path) -> None:
    audit, nowhere = str(ROOT / ".ci/audit"), {"https_proxy": "http://127.0.0.1:9"}
    code, printed = project.run(tmp_path, audit, **nowhere)
    assert code == 0 and "SKIPPED, nothing was checked: https://api.osv.dev does not" in printed
    (tmp_path / "ignored.txt").write_text("# a comment\n\nPYSEC-2026-1\n")
    code, printed = project.run(tmp_path, audit, str(tmp_path / "ignored.txt"), **nowhere)
    assert code == 2 and "gives no reason for PYSEC-2026-1" in printed


# MLflow's pages


@pytest.fixture
def pages(tmp_path: Path) -> Iterator[str]:
    """The address of a server that `make ui` started."""
    port = free_port()
    process = project.start(
        tmp_path, "make", "-f", str(ROOT / "Makefile"), "ui", f"PORT={port}",
        to=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while status_of(f"{url}/version") != 200:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


def status_of(url: str, body: Any = None, **headers: str) -> int:
    content = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **headers}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, content, headers), timeout=10) as r:
            return int(r.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def test_the_pages_serve_only_this_machine(pages: str) -> None:
    api = f"{pages}/api/2.0/mlflow"
    search, model = f"{api}/experiments/search", f"{api}/registered-models/create"
    assert status_of(f"{search}?max_results=1") == 200
    assert status_of(f"{search}?max_results=1", Host="evil.example") == 403
    assert status_of(model, {"name": "ours"}) == 200
    assert status_of(model, {"name": "theirs"}, Origin="https://evil.example") == 403
    assert status_of(f"{api}/registered-models/get?name=ours") == 200
    assert status_of(f"{api}/registered-models/get?name=theirs") == 404
    version = f"{api}/model-versions/create"
    assert 400 <= status_of(version, {"name": "ours", "source": "file:///etc"}) < 500
    jobs = {"job_name": "invoke_scorer", "params": {}}
    assert status_of(f"{pages}/ajax-api/3.0/jobs", jobs) in (403, 404, 405, 501)
    port = int(pages.rpartition(":")[2])
    addresses = {c.laddr.ip for c in psutil.net_connections("inet") if c.laddr.port == port}
    assert addresses == {"127.0.0.1"}
