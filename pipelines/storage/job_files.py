"""The files of a job: the nodes share no disk, so files travel through the store.

Outside of a job, all work is in one folder and paths mean the same for every process: the functions
here then only look at the local disk. In a job every node has its own copy of the same absolute
path, `home()`. `download_inputs` fills it, and processes exchange files by `upload` and `download`.
Work in progress under `.limpid` is named by all it depends on, so the store keeps it after the job.
"""

import contextlib
import shutil
import time
from pathlib import Path

from components.data.shards import MANIFEST, write_bytes
from pipelines.layout import ROOT
from pipelines.storage.jobs import home, job, scratch, spec, store
from pipelines.storage.locks import lock

# Files of earlier jobs that were not used for so long are removed from a node.
STALE_S = 2 * 24 * 3600
# The files that this process has uploaded, or downloaded with their folder, and their state then.
_synced: dict[Path, tuple[int, int]] = {}


def download_inputs() -> None:
    """Download the inputs of this job to this node, once for all processes there."""
    name = job()
    if name is None:
        return
    with lock(name, scratch()):
        _prune()
        missing = {p: listing for p, listing in spec().deps.items() if not (home() / p).exists()}
        for path, listing in missing.items():
            store().pull(listing, home() / path, cache=scratch() / "cas")


def upload(path: Path) -> None:
    """Upload a file, or the changes of a folder, to the store.

    Files that are gone from the folder are removed from the store, but only those that this process
    uploaded, or downloaded with their folder: if it was cut off and replaced, another process works
    in the same folder of the store.
    """
    if job() is None:
        return
    files = [path] if path.is_file() else [p for p in sorted(path.rglob("*")) if p.is_file()]
    # A manifest last, so that every manifest in the store names files that are there.
    for file in sorted(files, key=lambda file: file.name == MANIFEST):
        state = _state(file)
        if _synced.get(file) != state:
            store().write(_name(file), file.read_bytes())
            _synced[file] = state
    for file in [file for file in _synced if file.is_relative_to(path) and not file.exists()]:
        store().drop(_name(file))
        del _synced[file]


def _state(file: Path) -> tuple[int, int]:
    """Return the time of modification and the size, which change when the file does."""
    status = file.stat()
    return status.st_mtime_ns, status.st_size


def download(path: Path) -> bool:
    """Download a file that a process of this job uploaded; return whether there is one."""
    if job() is None:
        return path.exists()
    content = store().read(_name(path))
    if content is not None:
        write_bytes(path, content)
    return content is not None


def download_folder(path: Path, into: Path | None = None) -> None:
    """Replace a folder by what processes of this job uploaded of it; or put that into another."""
    if job() is None:
        return
    name, target = _name(path), into or path
    shutil.rmtree(target, ignore_errors=True)
    for inner in store().names(name):
        content = store().read(inner)
        if content is not None:
            file = target / inner[len(name) + 1 :]
            write_bytes(file, content)
            if into is None:
                _synced[file] = _state(file)


def remove(path: Path) -> None:
    """Remove a folder from this node and from the store."""
    shutil.rmtree(path, ignore_errors=True)
    if job() is not None:
        for name in store().names(_name(path)):
            store().drop(name)


def available(paths: list[Path]) -> list[bool]:
    """Return for each file whether it exists: on this disk, or in a job in the store."""
    if job() is None:
        return [path.exists() for path in paths]
    folders = {_name(path.parent) for path in paths}
    stored = {name for folder in folders for name in store().names(folder)}
    return [_name(path) in stored for path in paths]


def _name(path: Path) -> str:
    """Return the name of a file in the store."""
    relative = path.absolute().relative_to(home())
    if relative.parts[0] == ROOT.name:
        return Path("kept", *relative.parts[1:]).as_posix()
    return Path("jobs", job() or "", *relative.parts).as_posix()


def _prune() -> None:
    """Remove the files of earlier jobs from this node."""
    old = time.time() - STALE_S
    for path in [*scratch().glob("cas/*/*"), *scratch().iterdir()]:
        with contextlib.suppress(FileNotFoundError):
            if path.name != "cas" and path.stat().st_mtime < old:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
