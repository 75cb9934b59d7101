"""Runs a stage on a Ray cluster as a job, and downloads its outputs.

Two environment variables name the cluster: RAY_API_SERVER_ADDRESS, Ray's jobs endpoint, and
LIMPID_STORAGE, a store that the cluster and this machine both reach. Only code travels with the
job. A job is named by the key of its stage, so a driver that returns finds it running and follows
it, or finished and only downloads. The log is for people; the status of the job and the result in
the store decide what happened.
"""

import os
import platform
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
from pipelines.layout import SOURCES
from pipelines.storage import jobs
from pipelines.storage.jobs import JobFolder, Result, Spec

ADDRESS = "RAY_API_SERVER_ADDRESS"
OPEN = "LIMPID_CLUSTER_WITHOUT_TOKEN"
OPEN_CONSENT = "anyone-may-run-code-there"
MAX_CODE_MIB = 5
POLL_S, LOST_S, STOP_S, ANSWER_S = 0.5, 60.0, 15.0, 5.0


def cluster_is_named() -> bool:
    """Return whether stages run on a cluster; ConfigError for one that is named without a store."""
    if _inside_job() or not os.environ.get(ADDRESS):
        return False
    if not os.environ.get(jobs.STORAGE):
        raise ConfigError(
            f"{ADDRESS} names a cluster, but {jobs.STORAGE} names no store that both it and this "
            "machine reach, such as s3://bucket/limpid or file:///mnt/shared/limpid"
        )
    return True


def submitted_by_hand() -> bool:
    """Return whether this process is a job that a person submitted, and not `run`."""
    return _inside_job() and jobs.job() is None


def versions() -> dict[str, str]:
    """Return the versions that must be the same on this machine and on the cluster."""
    import ray
    import torch

    return {
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "ray": ray.__version__,
        # What follows a "+" says how it was built, which differs by machine.
        "torch": torch.__version__.partition("+")[0],
    }


def _inside_job() -> bool:
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def run(name: str, resources: Resources, prepare: Callable[[], Spec], listener: Listener) -> Result:
    """Run a stage as the job of this name, unless its result is in the store already.

    `prepare` uploads the inputs and returns the spec; it is called only where the cluster can hold
    the stage and does not run it yet. Raises Failed with the exit code and sentence of the stage,
    ConnectionError when the cluster is lost, ConfigError where it cannot run the stage.
    """
    folder = JobFolder(jobs.store(), name)
    result = folder.result()
    if result is None:
        address = os.environ[ADDRESS]
        _require_token(address)
        client = _client(address)
        attempt, submitted = _latest_attempt(client, name)
        if not submitted:
            _require_room(address, resources)
            folder.write_spec(prepare())
            _submit(client, name, attempt)
        status, last = _follow(client, f"{name}-{attempt}", listener)
        result = folder.result()
        if result is None:
            raise _failed(folder, attempt, status, last, listener)
    listener.all(result.events)
    return result


def _failed(folder: JobFolder, attempt: int, status: str, last: str, listener: Listener) -> Failed:
    """Return the failure that the job has stored, or what Ray says of it."""
    job = f"{folder.name}-{attempt}"
    failure = folder.failure(str(attempt))
    if failure is not None:
        listener.all(failure.events)
        return Failed(failure.code, f"{failure.message} (job {job})")
    return Failed(4, f"the job {job} ended as {status} without a result: {last}")


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except RuntimeError as error:
        raise ConnectionError(_first(error)) from None
    except (TypeError, KeyError, ValueError):
        raise ConnectionError(f"the server at {address} is no Ray cluster") from None


def _require_token(address: str) -> None:
    """Refuse a cluster that accepts jobs without a token: everybody who reaches it runs code there.

    Raises ConnectionError where no cluster answers.
    """
    if os.environ.get(OPEN) == OPEN_CONSENT:
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
        f"the cluster at {address} takes jobs without a token, so everybody who reaches it can run "
        f"code there: start it with RAY_AUTH_MODE=token, or set {OPEN}={OPEN_CONSENT}"
    )


def _require_room(address: str, resources: Resources) -> None:
    """Raise ConfigError where this cluster can never hold the stage, instead of waiting."""
    if capacity.AUTOSCALES in os.environ:
        return
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    try:
        nodes = list_nodes(address=address, timeout=int(ANSWER_S), detail=True)
    except (RayStateApiException, OSError) as error:
        raise ConnectionError(f"the cluster at {address}: {_first(error)}") from None
    alive = [node.resources_total for node in nodes if node.state == "ALIVE"]
    there = resources.on(lambda: capacity.gpus_of(alive))
    capacity.require_room([there.train, there.shards], alive)


def _latest_attempt(client: Any, name: str) -> tuple[int, bool]:
    """Return the number of the attempt to follow, and whether it is submitted already."""
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
    variables = {n: os.environ[n] for n in session.CARRIED if n in os.environ}
    variables |= {jobs.JOB: name, "PYTHONUNBUFFERED": "1"}
    began = time.monotonic()
    with _code() as folder, session.quiet():
        while True:
            try:
                client.submit_job(
                    entrypoint=f"python -m pipelines.runner.job {attempt}",
                    submission_id=f"{name}-{attempt}",
                    runtime_env={"working_dir": str(folder), "env_vars": variables},
                    entrypoint_num_cpus=0,
                )
                return
            except RuntimeError as error:
                # A cluster that has just started has no agent yet that takes jobs.
                late = time.monotonic() - began > LOST_S
                if late or "No available agent" not in str(error):
                    raise ConnectionError(_first(error)) from None
                time.sleep(POLL_S)


@contextmanager
def _code() -> Iterator[Path]:
    """Yield a folder that holds the code of this project and nothing else."""
    with tempfile.TemporaryDirectory() as name:
        folder, size = Path(name), 0
        for package in ("components", "pipelines"):
            for path in (SOURCES / package).rglob("*"):
                if path.suffix in (".py", ".j2"):
                    target = folder / path.relative_to(SOURCES)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, target)
                    size += path.stat().st_size
        if size > MAX_CODE_MIB << 20:
            raise ConfigError(
                f"the code is {size >> 20} MiB; at most {MAX_CODE_MIB} travel with a job"
            )
        yield folder


def _follow(client: Any, job: str, listener: Listener) -> tuple[str, str]:
    """Read the log of a job until its end; return its status and Ray's last message of it.

    An interruption stops the job. Raises ConnectionError when the cluster does not answer for long.
    """
    position, answered = 0, time.monotonic()
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
            whole_lines = len(log) if ended else log.rfind("\n") + 1
            for line in log[position:whole_lines].splitlines():
                listener.line(line)
            position = max(position, whole_lines)
            if ended:
                return str(info.status.value), _first(info.message or "Ray does not say why")
            time.sleep(POLL_S)
    except Interrupted:
        _stop(client, job)
        raise


def _stop(client: Any, job: str) -> None:
    """Stop a job, and wait a while for its end."""
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


def download(name: str, result: Result, outs: Mapping[str, Path]) -> None:
    """Download the outputs of a job, by option; DataError where the store has lost them."""
    store = jobs.store()
    try:
        for option, path in outs.items():
            store.pull(result.outs[option], path)
    except DataError as error:
        # Else the next run would find the same result without its outputs.
        JobFolder(store, name).drop_result()
        raise DataError(f"{error}; the same command makes it anew") from None
