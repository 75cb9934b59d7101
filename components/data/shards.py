"""A folder of Parquet shards with a manifest: how tables of images are stored.

Shards are written with page checksums, which are verified when they are read: without them a
flipped bit would be returned as a wrong image, and no error raised. `manifest.json` lists rows,
size and sha256 of every shard. It is written last, so a folder without it is unfinished.
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
    """Data that must not be used: damaged, incomplete, or of another form than declared."""


def shard_name(index: int) -> str:
    """Return the file name of shard number `index`."""
    return f"part-{index:05d}.parquet"


def sha256(path: Path) -> str:
    """Return the hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: it exists whole or not at all, even after a crash."""
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
    """Write JSON atomically, with sorted keys, so that equal values give equal bytes."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False)
    write_bytes(path, text.encode() + b"\n")


def write_shard(path: Path, table: pa.Table) -> None:
    """Write one shard atomically; the same table gives the same bytes."""
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


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Finish a folder: write the manifest over its shards, with `facts` beside their checksums."""
    shards = sorted(folder.glob("part-*.parquet"))
    files = [
        {
            "path": shard.name,
            "rows": pq.read_metadata(shard).num_rows,
            "size": shard.stat().st_size,
            "sha256": sha256(shard),
        }
        for shard in shards
    ]
    rows = sum(int(file["rows"]) for file in files)
    write_json(folder / MANIFEST, {**facts, "rows": rows, "files": files})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a finished folder; raise DataError if it is missing or broken."""
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder} has no {MANIFEST}: it is missing or was never finished")
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), list):
        raise DataError(f"{path} does not list its files")
    return manifest


def shard_rows(folder: Path) -> list[range]:
    """Return the rows of every shard, counted over the whole folder; no shard is read."""
    rows, start = [], 0
    for file in read_manifest(folder)["files"]:
        rows.append(range(start, start + int(file["rows"])))
        start = rows[-1].stop
    return rows


def read_rows(folder: Path, schema: pa.Schema, rows: range | None = None) -> pa.Table:
    """Return all rows of a folder, or those of `rows` that there are, verified by manifest.

    Only shards that hold some of these rows are read, but each is verified whole. Raises DataError
    for one that is missing, extra, altered, of another length or another schema.
    """
    manifest = read_manifest(folder)
    listed = [str(file["path"]) for file in manifest["files"]]
    found = sorted(shard.name for shard in folder.glob("*.parquet"))
    if sorted(listed) != found:
        different = sorted(set(listed) ^ set(found))
        raise DataError(f"{folder} and its manifest disagree about {', '.join(different)}")
    tables = [schema.empty_table()]
    for file, there in zip(manifest["files"], shard_rows(folder), strict=True):
        wanted = (
            there
            if rows is None
            else range(max(rows.start, there.start), min(rows.stop, there.stop))
        )
        if wanted:
            table = _read_shard(folder / file["path"], file["sha256"], schema)
            if len(table) != len(there):
                raise DataError(f"{folder} and its manifest disagree about {file['path']}")
            tables.append(table.slice(wanted.start - there.start, len(wanted)))
    return pa.concat_tables(tables)


def _read_shard(path: Path, digest: str, schema: pa.Schema) -> pa.Table:
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
    """Return the sha256 of a finished folder's manifest: it changes if any byte of a shard does."""
    read_manifest(folder)
    return sha256(folder / MANIFEST)
