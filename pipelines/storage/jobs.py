"""What the store holds of a job, and what the environment tells a process of its job.

`jobs/NAME/` holds the spec of a job, then its result, or one failure for each attempt.
`named/PATH.json` says which bytes, from which job, the project has at this path.
"""

import functools
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from components.config import Config
from components.data.shards import DataError
from pipelines.storage.object_store import Listing, Store, inside

JOB, STORAGE, SCRATCH = "LIMPID_JOB", "LIMPID_STORAGE", "LIMPID_SCRATCH"
Event = list[Any]


class Spec(Config):
    """One stage to run as a job; nothing but code travels beside it.

    `options` are those of the command line, `deps` the inputs by path, `view` the stage's section
    of the parameters as JSON, `resources` what the stage may use, `work` its folder of work in
    progress, `versions` those of the machine that sends it.
    """

    stage: str
    options: dict[str, str]
    deps: dict[str, Listing]
    view: Any
    resources: Any
    work: str
    versions: dict[str, str]


class Result(Config):
    """What a job leaves: the metrics of its stage, its outputs by option, and all its events."""

    metrics: dict[str, Any]
    outs: dict[str, Listing]
    events: list[Event]


class Failure(Config):
    """Why one attempt at a job ended without a result."""

    code: int
    message: str
    events: list[Event]


class Published(Config):
    """The bytes at one path of the project, and the job that made them."""

    listing: Listing
    job: str


Record = TypeVar("Record", bound=Config)


@dataclass(frozen=True)
class JobFolder:
    """The objects of one job in a store."""

    store: Store
    name: str

    def spec(self) -> Spec:
        """Return what the job is to do; DataError where the store has no spec of it."""
        found = _read(self.store, self._path("spec"), Spec)
        if found is None:
            raise DataError(f"{self.store.uri} has no job {self.name}")
        return found

    def result(self) -> Result | None:
        """Return what the job left, or None where it has not succeeded."""
        return _read(self.store, self._path("result"), Result)

    def failure(self, attempt: str) -> Failure | None:
        """Return why an attempt failed, or None where the store does not say."""
        return _read(self.store, self._path(f"failure-{attempt}"), Failure)

    def write_spec(self, spec: Spec) -> None:
        """Store what the job is to do."""
        self._write("spec", spec)

    def write_failure(self, attempt: str, failure: Failure) -> None:
        """Store why an attempt failed."""
        self._write(f"failure-{attempt}", failure)

    def write_result(self, result: Result) -> None:
        """Store the result, by which the job has succeeded; then drop all else of the job."""
        self._write("result", result)
        for name in self.store.names(f"jobs/{self.name}"):
            if name != self._path("result"):
                self.store.drop(name)

    def drop_result(self) -> None:
        """Forget the result, so that the job runs again."""
        self.store.drop(self._path("result"))

    def _path(self, kind: str) -> str:
        return f"jobs/{self.name}/{kind}.json"

    def _write(self, kind: str, record: Config) -> None:
        self.store.write(self._path(kind), record.model_dump_json().encode())


def job() -> str | None:
    """Return the name of the job that this process is part of, or None outside of a job."""
    return os.environ.get(JOB)


def store() -> Store:
    """Return the store that LIMPID_STORAGE names, with one client for the whole process."""
    return _store(os.environ[STORAGE])


@functools.cache
def _store(uri: str) -> Store:
    return Store(uri)


def spec() -> Spec:
    """Return what this job is to do."""
    return JobFolder(store(), job() or "").spec()


def scratch() -> Path:
    """Return this node's folder for jobs; DataError where other users may enter it."""
    default = Path(tempfile.gettempdir()) / f"limpid-{os.getuid()}"
    folder = Path(os.environ.get(SCRATCH) or default)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise DataError(f"{folder} is open to others; it must be yours alone (chmod 700)")
    return folder


def home() -> Path:
    """Return the working folder of this job: the same path on every node."""
    return scratch() / (job() or "")


def below_project(text: str) -> Path:
    """Return a path as it is, and a URI in the store as the path of the project that it stands for.

    Raises ValueError for a URI elsewhere, or where no store is named.
    """
    if "://" not in text:
        return Path(text)
    root = os.environ.get(STORAGE, "").rstrip("/")
    if not root or not text.startswith(f"{root}/"):
        raise ValueError(f"{text} is not below {STORAGE} ({root or 'not set'})")
    return Path(inside(text.removeprefix(f"{root}/")))


def publish(path: Path, listing: Listing, made_by: str) -> None:
    """Store which bytes the project has at a path, and the job that made them."""
    content = Published(listing=listing, job=made_by).model_dump_json()
    store().write(_published(path), content.encode())


def published(path: Path) -> Published:
    """Return what was published for a path; DataError where nothing was."""
    found = _read(store(), _published(path), Published)
    if found is None:
        raise DataError(
            f"{store().uri} has no {path}: the job that makes it has not ended, or limpid fetch "
            "--send has not sent it"
        )
    return found


def _published(path: Path) -> str:
    return f"named/{path.as_posix()}.json"


def _read(store: Store, name: str, kind: type[Record]) -> Record | None:
    """Return a record, or None where there is none; DataError for one of another version."""
    content = store.read(name)
    if content is None:
        return None
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        fields = ", ".join(sorted({".".join(map(str, one["loc"][:1])) for one in error.errors()}))
        raise DataError(
            f"{store.uri}/{name} is damaged or of another version of Limpid ({fields}): delete it, "
            "then run the same command again"
        ) from None
