"""A folder of Parquet parts with a manifest: how tables of images lie on disk.

Parts are written with page checksums and read with their verification, because a flipped bit is
otherwise returned as a wrong image without a word. `manifest.json` names every part with rows,
size and sha256 and is written last: a folder without it is not finished.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

MANIFEST = "manifest.json"


class DataError(ValueError):
    """Data that must not be used: damaged, incomplete, or not of the declared form."""


def shard_name(index: int) -> str:
    """Return the file name of part number `index`."""
    return f"part-{index:05d}.parquet"


def sha256(path: Path) -> str:
    """Return the hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it exists whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically, with sorted keys so that equal values are equal bytes."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False)
    write_bytes(path, text.encode() + b"\n")


def write_shard(path: Path, table: pa.Table) -> None:
    """Write one part, whole or not at all, the same bytes for the same table."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=False,
        row_group_size=1024,
        write_page_checksum=True,
    )
    write_bytes(path, sink.getvalue().to_pybytes())


def finish(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest over the parts in `folder`, with `facts` beside their checksums."""
    parts = sorted(folder.glob("part-*.parquet"))
    files = [
        {
            "path": part.name,
            "rows": pq.read_metadata(part).num_rows,
            "size": part.stat().st_size,
            "sha256": sha256(part),
        }
        for part in parts
    ]
    rows = sum(int(file["rows"]) for file in files)
    write_json(folder / MANIFEST, {**facts, "rows": rows, "files": files})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a finished folder; raise DataError where there is none."""
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder} has no {MANIFEST}: it is missing or was never finished")
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is not readable as JSON: {error}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), list):
        raise DataError(f"{path} does not list its files")
    return manifest


def read_parts(folder: Path, schema: pa.Schema, only: int | None = None) -> list[pa.Table]:
    """Return the parts of a folder in order, or `only` one, verified against manifest and schema.

    Raises DataError for a part that is missing, extra, altered or of another schema.
    """
    manifest = read_manifest(folder)
    listed = [str(file["path"]) for file in manifest["files"]]
    found = sorted(part.name for part in folder.glob("*.parquet"))
    if sorted(listed) != found:
        odd = sorted(set(listed) ^ set(found))
        raise DataError(f"{folder} and its manifest disagree about {', '.join(odd)}")
    files = manifest["files"] if only is None else [manifest["files"][only]]
    return [_read_part(folder / file["path"], file["sha256"], schema) for file in files]


def _read_part(path: Path, digest: str, schema: pa.Schema) -> pa.Table:
    if sha256(path) != digest:
        raise DataError(f"{path} was altered: its sha256 is not the one in the manifest")
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from None
    if not table.schema.equals(schema):
        raise DataError(f"{path} has columns {table.schema}, but {schema} is needed")
    return table


def fingerprint(folder: Path) -> str:
    """Return the sha256 of a finished folder's manifest: it changes with any byte inside."""
    read_manifest(folder)
    return sha256(folder / MANIFEST)
