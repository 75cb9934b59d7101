"""A Ray cluster of two nodes on this machine, as far apart as one machine allows.

Each node has a mount namespace of its own in which the project lies under an empty disk, and
scratch space that the other does not see; both ask for a token. Where asked for, one has a network
of its own too, on a cable that can be pulled. Beside them an S3 endpoint and an MLflow server.
`python tests/cluster/stand.py PROJECT` starts all of it, prints what a driver's environment needs,
and takes it down at Ctrl-C: only its own processes, each by its id.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
SECRET = "k3y-0f-th3-st4nd"
KEYS = {"AWS_ACCESS_KEY_ID": "stand", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"}
BUCKET = "limpid"


def possible() -> str:
    """Say why this machine cannot hold a stand; nothing where it can."""
    for module in ("moto.server", "aiohttp_cors"):
        try:
            __import__(module)
        except ImportError:
            return f"{module} is not installed (pip install -e '.[test]')"
    done = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True
    )
    return "" if done.returncode == 0 else "no mount namespace of one's own (root is needed)"


@contextlib.contextmanager
def object_store() -> Iterator[dict[str, str]]:
    """Hold an S3 endpoint with one bucket; yield what the environment of a client needs."""
    port = free_port()
    process = subprocess.Popen(
        [str(BIN / "moto_server"), "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    environment = {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    try:
        _await(environment["AWS_ENDPOINT_URL"])
        _make_bucket(environment["AWS_ENDPOINT_URL"])
        yield environment
    finally:
        process.kill()
        process.wait()


def _await(address: str) -> None:
    """Wait until something answers there."""
    for _ in range(240):
        try:
            urllib.request.urlopen(address, timeout=5)
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.25)
    raise TimeoutError(f"nothing answers at {address}")


def _make_bucket(endpoint: str) -> None:
    client(endpoint).create_bucket(Bucket=BUCKET)


def client(endpoint: str) -> Any:
    """Return a client of an S3 endpoint that owes nothing to ours."""
    import boto3

    keys = {"aws_access_key_id": KEYS["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": SECRET}
    return boto3.client("s3", endpoint_url=endpoint, region_name=KEYS["AWS_REGION"], **keys)


class Cable:
    """A network namespace of that name, on one cable to this machine."""

    HERE, THERE = "10.213.77.1", "10.213.77.2"

    def __init__(self, name: str) -> None:
        self.name = name

    def lay(self) -> None:
        """Make the namespace, and connect the two."""
        name = self.name
        _ip("netns", "add", name)
        _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("addr", "add", f"{self.HERE}/30", "dev", name)
        _ip("-n", name, "addr", "add", f"{self.THERE}/30", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        _ip("-n", name, "link", "set", "lo", "up")
        self.plug()

    def plug(self) -> None:
        """Connect the two."""
        _ip("link", "set", self.name, "up")

    def pull(self) -> None:
        """Part them, without a word to either."""
        _ip("link", "set", self.name, "down")

    def remove(self) -> None:
        """Take the namespace and its cable away."""
        _ip("netns", "del", self.name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


class Stand:
    """The processes of a cluster, by name, and what a driver must know of it."""

    def __init__(
        self,
        project: Path,
        home: Path,
        workers: int = 1,
        mlflow: bool = False,
        cable: Cable | None = None,
    ) -> None:
        """`home` must be short (Ray's sockets lie below) and hold `scratch`, which nodes cover.

        With a cable, the node `worker0` is at its far end.
        """
        self.project, self.home, self.cable = project, home, cable
        self.host = cable.HERE if cable else "127.0.0.1"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.ports = {name: free_port() for name in ("gcs", "dashboard", "s3", "mlflow")}
        (home / "scratch").mkdir(parents=True)
        token = home / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.common = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "LIMPID_"))},
            **KEYS,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "AWS_ENDPOINT_URL": f"http://{self.host}:{self.ports['s3']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_WAIT_POLICY": "passive",
        }
        self.driver = {
            **{k: self.common[k] for k in (*KEYS, "AWS_ENDPOINT_URL", "RAY_AUTH_MODE")},
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_API_SERVER_ADDRESS": f"http://{self.host}:{self.ports['dashboard']}",
            "LIMPID_STORAGE": f"s3://{BUCKET}/limpid",
            "LIMPID_SCRATCH": str(home / "scratch"),
        }
        if mlflow:
            self.driver["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{self.ports['mlflow']}"
        self.workers, self.mlflow = workers, mlflow

    def up(self) -> None:
        """Start everything, and wait until it answers."""
        moto = str(BIN / "moto_server")
        self._start("s3", moto, "-H", self.host, "-p", str(self.ports["s3"]))
        self.start_head()
        if self.mlflow:
            store = f"sqlite:///{self.home}/mlflow.db"
            self._start(
                "mlflow", str(BIN / "mlflow"), "server", "--host", "127.0.0.1", "--port",
                str(self.ports["mlflow"]), "--workers", "1", "--backend-store-uri", store,
                "--artifacts-destination", str(self.home / "artifacts"),
                MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
            )  # fmt: skip
        _await(self.common["AWS_ENDPOINT_URL"])
        _make_bucket(self.common["AWS_ENDPOINT_URL"])
        _await(f"{self.driver['RAY_API_SERVER_ADDRESS']}/api/version")
        for number in range(self.workers):
            self.start_worker(f"worker{number}")
        self.wait_for_nodes(1 + self.workers)
        if self.mlflow:
            _await(self.driver["MLFLOW_TRACKING_URI"])

    def start_head(self) -> None:
        """Start the node that leads, with one CPU of its own."""
        self._node(
            "head", "--head", "--port", str(self.ports["gcs"]), "--dashboard-host", self.host,
            "--dashboard-port", str(self.ports["dashboard"]), "--include-dashboard", "true",
            "--ray-client-server-port", str(free_port()), "--num-cpus", "1",
            "--temp-dir", str(self.home / "r"),
        )  # fmt: skip

    def start_worker(self, name: str, cpus: int = 2) -> None:
        """Start a node that follows."""
        self._node(name, "--address", f"{self.host}:{self.ports['gcs']}", "--num-cpus", str(cpus))

    def _node(self, name: str, *arguments: str) -> None:
        """Start a Ray node that sees neither the project nor the scratch space of another."""
        far = self.cable if name == "worker0" else None
        address = far.THERE if far else self.host
        ray = " ".join(
            [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", *arguments,
             "--node-ip-address", address, "--object-store-memory", "200000000",
             # Else they meet those of any other Ray on this machine, and no job can be taken.
             "--dashboard-agent-listen-port", str(free_port()),
             "--dashboard-agent-grpc-port", str(free_port()),
             "--metrics-export-port", str(free_port())]
        )  # fmt: skip
        covered = [self.project, self.home / "scratch"]
        if name != "head":
            # Else the code of a job, which every node lays down for itself, lies in one place.
            session = (self.home / "r/session_latest").resolve()
            covered.append(session / "runtime_resources")
        script = "mount --make-rprivate / && " + " && ".join(
            f"mkdir -p {path} && mount -t tmpfs -o mode=700 none {path}" for path in covered
        )
        entered = ["ip", "netns", "exec", far.name] if far else []
        script = f"{script} && cd / && exec {ray}"
        self._start(name, *entered, "unshare", "--mount", "sh", "-c", script)

    def _start(self, name: str, *command: str, **environment: str) -> None:
        with (self.home / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, env={**self.common, **environment}, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL, start_new_session=True, cwd="/",
            )  # fmt: skip

    def nodes(self) -> list[str]:
        """Return the ids of the nodes that live."""
        token = Path(self.driver["RAY_AUTH_TOKEN_PATH"]).read_text()
        address = f"{self.driver['RAY_API_SERVER_ADDRESS']}/api/v0/nodes"
        asked = urllib.request.Request(address, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(asked, timeout=5) as answer:
            found = json.load(answer)["data"]["result"]["result"]
        return [node["node_id"] for node in found if node["state"] == "ALIVE"]

    def wait_for_nodes(self, count: int) -> None:
        """Wait until so many live."""
        for _ in range(120):
            with contextlib.suppress(Exception):
                if len(self.nodes()) >= count:
                    return
            time.sleep(0.5)
        raise TimeoutError(f"the cluster has no {count} nodes: {self.log('head')}")

    def log(self, name: str) -> str:
        """Return the end of what a process printed."""
        return (self.home / f"{name}.log").read_text()[-3000:]

    def kill(self, name: str) -> None:
        """End a process and all it started, without warning."""
        for pid in _family(self.processes.pop(name).pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def down(self) -> None:
        """End everything that was started here."""
        for name in reversed(list(self.processes)):
            process = self.processes[name]
            self.kill(name)
            process.wait()


def _family(pid: int) -> list[int]:
    """Return a process and its descendants."""
    import psutil

    try:
        process = psutil.Process(pid)
        return [pid, *(child.pid for child in process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def standing(
    project: Path, workers: int = 1, mlflow: bool = False, cabled: bool = False
) -> Iterator[Stand]:
    """Hold a stand whose nodes do not see `project`."""
    home = Path(tempfile.mkdtemp(prefix="ls", dir="/tmp"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        cable = Cable(home.name) if cabled else None
        if cable:
            stack.callback(cable.remove)
            cable.lay()
        stand = Stand(project, home, workers, mlflow, cable)
        stack.callback(stand.down)
        stand.up()
        yield stand


if __name__ == "__main__":
    # Also where Ctrl-C is ignored, as it is in the background of a script.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with standing(Path(sys.argv[1]).absolute(), mlflow=True) as one:
        for name, value in one.driver.items():
            print(f"export {name}={value}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
