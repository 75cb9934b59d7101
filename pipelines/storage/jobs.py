"""Carved out of pipelines/place.py."""

import functools
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

from components.config import Config
from components.data.shards import DataError
from pipelines.storage.object_store import Listing, Store, inside

JOB, STORAGE, SCRATCH = "LIMPID_JOB", "LIMPID_STORAGE", "LIMPID_SCRATCH"


Event = list[Any]


class Spec(Config):
    """A stage to run on a cluster, as it lies in the store: nothing else travels but code.

    `options` are those of the command line, `deps` its inputs by path, `view` the section of the
    parameters as JSON, `resources` what the stage may use.
    """

    module: str
    options: dict[str, str]
    deps: dict[str, Listing]
    view: Any
    resources: Any
    work: str
    versions: dict[str, str]


def job() -> str | None:
    """Return the name of the job that this process is part of, or None outside of one."""
    return os.environ.get(JOB)


def store() -> Store:
    """Return the store of this cluster: one client for all that this process asks of it."""
    return _store(os.environ[STORAGE])


@functools.cache
def _store(uri: str) -> Store:
    return Store(uri)


def scratch() -> Path:
    """Return this node's folder for jobs, made for this user alone; DataError where it is not."""
    default = Path(tempfile.gettempdir()) / f"limpid-{os.getuid()}"
    folder = Path(os.environ.get(SCRATCH) or default)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    held = folder.stat()
    if held.st_uid != os.getuid() or stat.S_IMODE(held.st_mode) & 0o077:
        raise DataError(f"{folder} is open to others; it must be yours alone (chmod 700)")
    return folder


def home() -> Path:
    """Return the folder in which a job finds and leaves its files, on every node the same."""
    return scratch() / (job() or "")


def spec() -> Spec:
    """Return what this job is to do."""
    content = store().read(f"jobs/{job()}/spec.json")
    if content is None:
        raise DataError(f"{os.environ[STORAGE]} holds no job {job()}")
    return Spec.model_validate_json(content)


class Published(Config):
    """An output that has a name in the store, and the job that made it."""

    listing: Listing
    job: str


def below(text: str) -> Path:
    """Return a path as it is, and a URI in the store as the path below it.

    Raises ValueError for a URI elsewhere, or where no store is named.
    """
    if "://" not in text:
        return Path(text)
    root = os.environ.get(STORAGE, "").rstrip("/")
    if not root or not text.startswith(f"{root}/"):
        raise ValueError(f"{text} is not below {STORAGE} ({root or 'not set'})")
    return Path(inside(text.removeprefix(f"{root}/")))


def publish(path: Path, listing: Listing, made_by: str) -> None:
    """Give an output its name in the store."""
    content = Published(listing=listing, job=made_by).model_dump_json()
    store().write(f"named/{path.as_posix()}.json", content.encode())


def published(path: Path) -> Published:
    """Return what has this name in the store; DataError where nothing has."""
    content = store().read(f"named/{path.as_posix()}.json")
    if content is None:
        raise DataError(
            f"{os.environ[STORAGE]} holds no {path}: the job that makes it has not ended, or "
            "limpid fetch --send has not brought it there"
        )
    return Published.model_validate_json(content)


class Result(Config):
    """What a job leaves: the metrics of its stage, its outputs by option, and all it said."""

    metrics: dict[str, Any]
    outs: dict[str, Listing]
    events: list[Event]


class Failure(Config):
    """Why a job ended without a result."""

    code: int
    message: str
    events: list[Event]


def result_of(store: Store, job: str) -> Result | None:
    """Return what a job left, or None where it has not succeeded."""
    content = store.read(f"jobs/{job}/result.json")
    return None if content is None else Result.model_validate_json(content)
