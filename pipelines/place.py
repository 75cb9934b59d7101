"""Where this process is: the folder of work in progress, and what a job on a cluster has instead.

On a laptop all work lies in one folder beside the data, and paths mean the same for every process.
The processes of a job lie on machines that share no disk: each has a folder of its own with the
same absolute path, `home()`, into which `localise` brings the inputs; what one process leaves for
another goes through the store (`share`, `see`). Outside a job these do nothing. What is kept under
`.limpid` is named by all it depends on, so in the store it outlives its job.
"""

import contextlib
import fcntl
import functools
import os
import platform
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from components.config import Config
from components.shards import MANIFEST, DataError, write_bytes
from pipelines.store import Listing, Store, inside

ROOT = Path(".limpid")
JOB, STORAGE, SCRATCH = "LIMPID_JOB", "LIMPID_STORAGE", "LIMPID_SCRATCH"
# What nobody has used for so long is removed from a node.
STALE_S = 2 * 24 * 3600
# How long a stage waits for another of its name that is ending, and how often it looks.
ENDING_S, LOOK_S = 20.0, 0.25
_shared: dict[Path, tuple[int, int]] = {}


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


@contextlib.contextmanager
def lock(name: str, folder: Path = ROOT) -> Iterator[None]:
    """Hold a lock of this name among the processes that work in this folder."""
    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def alone(label: str) -> Iterator[None]:
    """Be the only one here that runs a stage; BlockingIOError, naming the other, where it stays.

    Who dies lets go by that. Another that is just ending is waited for.
    """
    folder = ROOT / "running"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / label).open("a+") as file:
        for _ in range(int(ENDING_S / LOOK_S)):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(LOOK_S)
        else:
            file.seek(0)
            raise BlockingIOError(f"{label} is being run already, by {file.read() or 'another'}")
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


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


def localise() -> None:
    """Bring the inputs of this job to this node, once for all its processes."""
    name = job()
    if name is None:
        return
    with lock(name, scratch()):
        _prune()
        missing = {p: listing for p, listing in spec().deps.items() if not (home() / p).exists()}
        for path, listing in missing.items():
            store().pull(listing, home() / path, cache=scratch() / "cas")


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
            "python -m pipelines.fetch --send has not brought it there"
        )
    return Published.model_validate_json(content)


def share(path: Path) -> None:
    """Bring a file or folder of this job's to the store; what left the folder leaves the store.

    That is what this process brought there, or found there: another may work there too, where this
    one was cut off and given up.
    """
    if job() is None:
        return
    there = store()
    files = [path] if path.is_file() else [p for p in sorted(path.rglob("*")) if p.is_file()]
    # A manifest last: where it is, all it names is.
    for file in sorted(files, key=lambda file: file.name == MANIFEST):
        mark = _mark(file)
        if _shared.get(file) != mark:
            there.write(_name(file), file.read_bytes())
            _shared[file] = mark
    for file in [file for file in _shared if file.is_relative_to(path) and not file.exists()]:
        there.drop(_name(file))
        del _shared[file]


def _mark(file: Path) -> tuple[int, int]:
    """Say what may change where a file does."""
    state = file.stat()
    return state.st_mtime_ns, state.st_size


def see(path: Path) -> bool:
    """Bring a file that a process of this job shared to this node; say whether there is one."""
    if job() is None:
        return path.exists()
    content = store().read(_name(path))
    if content is not None:
        write_bytes(path, content)
    return content is not None


def see_folder(path: Path, into: Path | None = None) -> None:
    """Bring a folder that a process of this job shared, in place of what is here, or elsewhere."""
    if job() is None:
        return
    there, name, target = store(), _name(path), into or path
    shutil.rmtree(target, ignore_errors=True)
    for inner in there.names(name):
        content = there.read(inner)
        if content is not None:
            file = target / inner[len(name) + 1 :]
            write_bytes(file, content)
            if into is None:
                _shared[file] = _mark(file)


def forget(path: Path) -> None:
    """Remove a folder, here and where it was shared."""
    shutil.rmtree(path, ignore_errors=True)
    if job() is not None:
        for name in store().names(_name(path)):
            store().drop(name)


def shared(paths: list[Path]) -> list[bool]:
    """Say which of these files are there already, here or in the store."""
    if job() is None:
        return [path.exists() for path in paths]
    folders = {_name(path.parent) for path in paths}
    there = {name for folder in folders for name in store().names(folder)}
    return [_name(path) in there for path in paths]


def _name(path: Path) -> str:
    relative = path.absolute().relative_to(home())
    if relative.parts[0] == ROOT.name:
        return Path("kept", *relative.parts[1:]).as_posix()
    return Path("jobs", job() or "", *relative.parts).as_posix()


def _prune() -> None:
    """Remove from this node what earlier jobs left."""
    old = time.time() - STALE_S
    for path in [*scratch().glob("cas/*/*"), *scratch().iterdir()]:
        with contextlib.suppress(FileNotFoundError):
            if path.name != "cas" and path.stat().st_mtime < old:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
