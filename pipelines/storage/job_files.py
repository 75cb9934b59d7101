"""Where this process is: the folder of work in progress, and what a job on a cluster has instead.

On a laptop all work lies in one folder beside the data, and paths mean the same for every process.
The processes of a job lie on machines that share no disk: each has a folder of its own with the
same absolute path, `home()`, into which `localise` brings the inputs; what one process leaves for
another goes through the store (`share`, `see`). Outside a job these do nothing. What is kept under
`.limpid` is named by all it depends on, so in the store it outlives its job.
"""

import contextlib
import shutil
import time
from pathlib import Path

from components.data.shards import MANIFEST, write_bytes
from pipelines.layout import ROOT
from pipelines.storage.jobs import home, job, scratch, spec, store
from pipelines.storage.locks import lock

# What nobody has used for so long is removed from a node.
STALE_S = 2 * 24 * 3600
_shared: dict[Path, tuple[int, int]] = {}


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


def upload(path: Path) -> None:
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


def download(path: Path) -> bool:
    """Bring a file that a process of this job shared to this node; say whether there is one."""
    if job() is None:
        return path.exists()
    content = store().read(_name(path))
    if content is not None:
        write_bytes(path, content)
    return content is not None


def download_folder(path: Path, into: Path | None = None) -> None:
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


def remove(path: Path) -> None:
    """Remove a folder, here and where it was shared."""
    shutil.rmtree(path, ignore_errors=True)
    if job() is not None:
        for name in store().names(_name(path)):
            store().drop(name)


def available(paths: list[Path]) -> list[bool]:
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
