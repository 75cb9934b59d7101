"""A Ray cluster of two nodes on this machine, separated as far as one machine allows.

Each node has its own mount namespace, in which an empty disk covers the project, and its own
scratch space. Both require a token. On request one node has its own network as well, on a cable
that can be pulled. An S3 endpoint and an MLflow server run beside them.
`python tests/cluster/local_cluster.py PROJECT` starts everything, prints the environment for a
driver, and stops everything at Ctrl-C: only its own processes, each by its id.
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
SECRET = "k3y-0f-th3-cl5t3r"
KEYS = {"AWS_ACCESS_KEY_ID": "cluster", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"}
BUCKET = "limpid"


def missing() -> str:
    """Return what this machine lacks for such a cluster, or an empty string."""
    for module in ("moto.server", "aiohttp_cors"):
        try:
            __import__(module)
        except ImportError:
            return f"{module} is not installed (pip install -e '.[test]')"
    done = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True
    )
    return "" if done.returncode == 0 else "no own mount namespace (root is needed)"


@contextlib.contextmanager
def object_store() -> Iterator[dict[str, str]]:
    """Run an S3 endpoint with one bucket; yield the environment variables of a client."""
    port = free_port()
    process = subprocess.Popen(
        [str(BIN / "moto_server"), "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    environment = {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    try:
        _wait_for(environment["AWS_ENDPOINT_URL"])
        _make_bucket(environment["AWS_ENDPOINT_URL"])
        yield environment
    finally:
        process.kill()
        process.wait()


def _wait_for(address: str) -> None:
    """Wait until a server answers."""
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
    """Return an S3 client that shares no code with the store."""
    import boto3

    keys = {"aws_access_key_id": KEYS["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": SECRET}
    return boto3.client("s3", endpoint_url=endpoint, region_name=KEYS["AWS_REGION"], **keys)


class Cable:
    """A network namespace with this name, connected to this machine by one virtual cable."""

    HERE, THERE = "10.213.77.1", "10.213.77.2"

    def __init__(self, name: str) -> None:
        self.name = name

    def set_up(self) -> None:
        """Create the namespace and connect it."""
        name = self.name
        _ip("netns", "add", name)
        _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("addr", "add", f"{self.HERE}/30", "dev", name)
        _ip("-n", name, "addr", "add", f"{self.THERE}/30", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        _ip("-n", name, "link", "set", "lo", "up")
        self.plug()

    def plug(self) -> None:
        """Connect the namespace."""
        _ip("link", "set", self.name, "up")

    def pull(self) -> None:
        """Disconnect the namespace; neither side gets a message."""
        _ip("link", "set", self.name, "down")

    def remove(self) -> None:
        """Remove the namespace and its cable."""
        _ip("netns", "del", self.name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


class LocalCluster:
    """The processes of the cluster, by name, and the environment of its driver."""

    def __init__(
        self,
        project: Path,
        home: Path,
        workers: int = 1,
        mlflow: bool = False,
        cable: Cable | None = None,
    ) -> None:
        """The path `home` must be short: Ray's sockets are below it.

        With a cable, the node `worker0` is at its other end.
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

    def start(self) -> None:
        """Start everything and wait until it answers."""
        moto = str(BIN / "moto_server")
        self._spawn("s3", moto, "-H", self.host, "-p", str(self.ports["s3"]))
        self.start_head()
        if self.mlflow:
            store = f"sqlite:///{self.home}/mlflow.db"
            self._spawn(
                "mlflow", str(BIN / "mlflow"), "server", "--host", "127.0.0.1", "--port",
                str(self.ports["mlflow"]), "--workers", "1", "--backend-store-uri", store,
                "--artifacts-destination", str(self.home / "artifacts"),
                MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
            )  # fmt: skip
        _wait_for(self.common["AWS_ENDPOINT_URL"])
        _make_bucket(self.common["AWS_ENDPOINT_URL"])
        _wait_for(f"{self.driver['RAY_API_SERVER_ADDRESS']}/api/version")
        for number in range(self.workers):
            self.start_worker(f"worker{number}")
        self.wait_for_nodes(1 + self.workers)
        if self.mlflow:
            _wait_for(self.driver["MLFLOW_TRACKING_URI"])

    def start_head(self) -> None:
        """Start the head node, with one CPU."""
        self._node(
            "head", "--head", "--port", str(self.ports["gcs"]), "--dashboard-host", self.host,
            "--dashboard-port", str(self.ports["dashboard"]), "--include-dashboard", "true",
            "--ray-client-server-port", str(free_port()), "--num-cpus", "1",
            "--temp-dir", str(self.home / "r"),
        )  # fmt: skip

    def start_worker(self, name: str, cpus: int = 2) -> None:
        """Start another node."""
        self._node(name, "--address", f"{self.host}:{self.ports['gcs']}", "--num-cpus", str(cpus))

    def _node(self, name: str, *arguments: str) -> None:
        """Start a Ray node that sees neither the project nor the scratch space of other nodes."""
        far = self.cable if name == "worker0" else None
        address = far.THERE if far else self.host
        ray = " ".join(
            [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", *arguments,
             "--node-ip-address", address, "--object-store-memory", "200000000",
             # The default ports may be taken by another Ray on this machine; then jobs are refused.
             "--dashboard-agent-listen-port", str(free_port()),
             "--dashboard-agent-grpc-port", str(free_port()),
             "--metrics-export-port", str(free_port())]
        )  # fmt: skip
        covered = [self.project, self.home / "scratch"]
        if name != "head":
            # Every node unpacks the code of a job for itself; without this, all into one folder.
            session = (self.home / "r/session_latest").resolve()
            covered.append(session / "runtime_resources")
        script = "mount --make-rprivate / && " + " && ".join(
            f"mkdir -p {path} && mount -t tmpfs -o mode=700 none {path}" for path in covered
        )
        enter = ["ip", "netns", "exec", far.name] if far else []
        script = f"{script} && cd / && exec {ray}"
        self._spawn(name, *enter, "unshare", "--mount", "sh", "-c", script)

    def _spawn(self, name: str, *command: str, **environment: str) -> None:
        with (self.home / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, env={**self.common, **environment}, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL, start_new_session=True, cwd="/",
            )  # fmt: skip

    def nodes(self) -> list[str]:
        """Return the ids of the living nodes."""
        token = Path(self.driver["RAY_AUTH_TOKEN_PATH"]).read_text()
        address = f"{self.driver['RAY_API_SERVER_ADDRESS']}/api/v0/nodes"
        asked = urllib.request.Request(address, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(asked, timeout=5) as answer:
            found = json.load(answer)["data"]["result"]["result"]
        return [node["node_id"] for node in found if node["state"] == "ALIVE"]

    def wait_for_nodes(self, count: int) -> None:
        """Wait until so many nodes are alive."""
        for _ in range(360):
            with contextlib.suppress(Exception):
                if len(self.nodes()) >= count:
                    return
            time.sleep(0.5)
        raise TimeoutError(f"the cluster has no {count} nodes: {self.log('head')}")

    def log(self, name: str) -> str:
        """Return the last part of the output of a process."""
        return (self.home / f"{name}.log").read_text()[-3000:]

    def kill(self, name: str) -> None:
        """Kill a process and all its descendants."""
        for pid in _family(self.processes.pop(name).pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """Kill everything that was started here."""
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
    """Return a port that no process listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def running(
    project: Path, workers: int = 1, mlflow: bool = False, cabled: bool = False
) -> Iterator[LocalCluster]:
    """Run a cluster whose nodes do not see `project`."""
    home = Path(tempfile.mkdtemp(prefix="lt", dir="/tmp"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        cable = Cable(home.name) if cabled else None
        if cable:
            stack.callback(cable.remove)
            cable.set_up()
        cluster = LocalCluster(project, home, workers, mlflow, cable)
        stack.callback(cluster.stop)
        cluster.start()
        yield cluster


if __name__ == "__main__":
    # Processes in the background of a script ignore Ctrl-C by default.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with running(Path(sys.argv[1]).absolute(), mlflow=True) as cluster:
        for name, value in cluster.driver.items():
            print(f"export {name}={value}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
