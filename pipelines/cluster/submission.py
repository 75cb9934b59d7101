"""Sends a stage to a Ray cluster as a job, and brings home what it makes.

Two environment variables name the cluster: RAY_API_SERVER_ADDRESS, Ray's jobs endpoint, and
LIMPID_STORAGE, a store that the cluster and this machine both reach. Code alone travels with the
job. The job is named by the key of the stage: who comes back finds it running and listens on, or
done and only fetches. The log is for the eyes; what counts is the status of the job and the result
in the store.
"""

import os
import platform
import shlex
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.data.shards import DataError
from pipelines.cluster import capacity, session
from pipelines.cluster.job_events import Listener
from pipelines.config.resources import Resources
from pipelines.errors import ConfigError, Failed, Interrupted
from pipelines.storage import jobs
from pipelines.storage.jobs import Failure, Result, Spec, result_of
from pipelines.storage.object_store import Store

ADDRESS = "RAY_API_SERVER_ADDRESS"
OPEN = "LIMPID_CLUSTER_WITHOUT_TOKEN"
OPEN_WORDS = "anyone-may-run-code-there"
CODE_MIB = 5
POLL_S, LOST_S, STOP_S, ANSWER_S = 0.5, 60.0, 15.0, 5.0


def named() -> bool:
    """Say whether a cluster is named for the stages of this machine; ConfigError where half is."""
    if _inside() or not os.environ.get(ADDRESS):
        return False
    if not os.environ.get(jobs.STORAGE):
        raise ConfigError(
            f"{ADDRESS} names a cluster, but {jobs.STORAGE} names no store that it and this "
            "machine reach, as s3://bucket/limpid or file:///mnt/shared/limpid"
        )
    return True


def by_hand() -> bool:
    """Say whether this process was submitted as a job, but not by `run`."""
    return _inside() and jobs.job() is None


def versions() -> dict[str, str]:
    """Return the versions that must be the same on both sides of the seam."""
    import ray
    import torch

    return {
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "ray": ray.__version__,
        # How it was built differs by machine.
        "torch": torch.__version__.partition("+")[0],
    }


def _inside() -> bool:
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def run(
    name: str,
    resources: Resources,
    sent: Callable[[], Spec],
    listener: Listener,
) -> Result:
    """Have a cluster do a stage, under the name of its key, unless it has been done.

    `sent` sends what the stage reads and describes it, and is called only where the cluster can
    hold the stage and does not do it yet.
    Raises Failed with the exit code and sentence of the stage, ConnectionError when the cluster is
    lost, ConfigError where it cannot run the stage.
    """
    store = jobs.store()
    result = result_of(store, name)
    if result is None:
        address = os.environ[ADDRESS]
        _guarded(address)
        client = _client(address)
        attempt, known = _newest(client, name)
        if not known:
            _require_room(address, resources)
            store.write(f"jobs/{name}/spec.json", sent().model_dump_json().encode())
            _submit(client, name, attempt)
        status, last = _follow(client, f"{name}-{attempt}", listener)
        result = result_of(store, name)
        if result is None:
            raise _failed(store, name, attempt, status, last, listener)
    listener.all(result.events)
    return result


def _failed(
    store: Store, name: str, attempt: int, status: str, last: str, listener: Listener
) -> Failed:
    """Return what the job said of its failure, or what Ray says of it."""
    content = store.read(f"jobs/{name}/failure-{attempt}.json")
    if content is not None:
        failure = Failure.model_validate_json(content)
        listener.all(failure.events)
        return Failed(failure.code, f"{failure.message} (job {name}-{attempt})")
    return Failed(4, f"the job {name}-{attempt} ended as {status} without a result: {last}")


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except RuntimeError as error:
        raise ConnectionError(_first(error)) from None
    except (TypeError, KeyError, ValueError):
        raise ConnectionError(f"what answers at {address} is no Ray") from None


def _guarded(address: str) -> None:
    """Refuse a cluster that answers without a token: whoever reaches it runs code there."""
    if os.environ.get(OPEN) == OPEN_WORDS:
        return
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/api/jobs/", timeout=ANSWER_S):
            pass
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return
        raise ConnectionError(f"the cluster at {address} answers {error.code}") from None
    except (OSError, ValueError) as error:
        raise ConnectionError(f"no cluster answers at {address}: {_first(error)}") from None
    raise ConfigError(
        f"the cluster at {address} takes jobs without a token, so whoever reaches it runs code "
        f"there: start it with RAY_AUTH_MODE=token, or set {OPEN}={OPEN_WORDS}"
    )


def _require_room(address: str, resources: Resources) -> None:
    """Raise ConfigError at once for what this cluster can never hold, instead of waiting."""
    if capacity.AUTOSCALES in os.environ:
        return
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    try:
        nodes = list_nodes(address=address, timeout=int(ANSWER_S), detail=True)
    except (RayStateApiException, OSError) as error:
        raise ConnectionError(f"the cluster at {address}: {_first(error)}") from None
    alive = [node.resources_total for node in nodes if node.state == "ALIVE"]
    capacity.require_room([resources.train, resources.shards], alive)


def _newest(client: Any, name: str) -> tuple[int, bool]:
    """Return the number of the attempt to follow, and whether it is there already."""
    from ray.job_submission import JobStatus

    attempt = 1
    while True:
        try:
            status = client.get_job_status(f"{name}-{attempt}")
        except RuntimeError as error:
            if "404" not in str(error) and "does not exist" not in str(error):
                raise ConnectionError(_first(error)) from None
            return attempt, False
        if status in (JobStatus.PENDING, JobStatus.RUNNING):
            return attempt, True
        attempt += 1


def _submit(client: Any, name: str, attempt: int) -> None:
    words = ["python", "-m", "pipelines.runner.job", str(attempt)]
    variables = {n: os.environ[n] for n in session.CARRIED if n in os.environ}
    variables |= {jobs.JOB: name, "PYTHONUNBUFFERED": "1"}
    began = time.monotonic()
    with _code() as folder, session.quiet():
        while True:
            try:
                client.submit_job(
                    entrypoint=shlex.join(words),
                    submission_id=f"{name}-{attempt}",
                    runtime_env={"working_dir": str(folder), "env_vars": variables},
                    entrypoint_num_cpus=0,
                )
                return
            except RuntimeError as error:
                # A cluster that has only just begun has no agent yet that takes jobs.
                late = time.monotonic() - began > LOST_S
                if late or "No available agent" not in str(error):
                    raise ConnectionError(_first(error)) from None
                time.sleep(POLL_S)


@contextmanager
def _code() -> Iterator[Path]:
    """Yield a folder with the code of this project and nothing else."""
    root = Path(__file__).parent.parent.parent
    with tempfile.TemporaryDirectory() as name:
        folder, size = Path(name), 0
        for package in ("components", "pipelines"):
            for path in (root / package).rglob("*"):
                if path.suffix in (".py", ".j2"):
                    target = folder / path.relative_to(root)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, target)
                    size += path.stat().st_size
        if size > CODE_MIB << 20:
            raise ConfigError(f"the code is {size >> 20} MiB, and {CODE_MIB} travel with a job")
        yield folder


def _follow(client: Any, job: str, listener: Listener) -> tuple[str, str]:
    """Listen until the job has ended; return its status, and the last that Ray says of it.

    An interruption stops the job. ConnectionError when the cluster does not answer for long.
    """
    heard, answered = 0, time.monotonic()
    try:
        while True:
            try:
                info = client.get_job_info(job)
                log = client.get_job_logs(job)
            except (OSError, RuntimeError) as error:
                if time.monotonic() - answered > LOST_S:
                    address = os.environ[ADDRESS]
                    raise ConnectionError(f"cluster lost: {address}: {_first(error)}") from None
                time.sleep(POLL_S)
                continue
            answered = time.monotonic()
            ended = info.status.is_terminal()
            whole = len(log) if ended else log.rfind("\n") + 1
            for line in log[heard:whole].splitlines():
                listener.line(line)
            heard = max(heard, whole)
            if ended:
                return str(info.status.value), _first(info.message or "Ray does not say why")
            time.sleep(POLL_S)
    except Interrupted:
        _stop(client, job)
        raise


def _stop(client: Any, job: str) -> None:
    began = time.monotonic()
    try:
        client.stop_job(job)
        while time.monotonic() - began < STOP_S:
            if client.get_job_status(job).is_terminal():
                return
            time.sleep(POLL_S)
    except (OSError, RuntimeError):
        return


def _first(error: object) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


def bring(name: str, result: Result, outs: Mapping[str, Path]) -> None:
    """Put the outputs of a job where they belong; DataError where the store has lost them."""
    store = jobs.store()
    try:
        for option, path in outs.items():
            store.pull(result.outs[option], path)
    except DataError as error:
        # Else the next run would only find the same again.
        store.drop(f"jobs/{name}/result.json")
        raise DataError(f"{error}; the same command makes it anew") from None
