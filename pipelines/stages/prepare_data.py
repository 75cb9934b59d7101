"""Prepare the training, validation and test images.

Reads the source named in params.yaml, writes data/{train,val,test}: Parquet shards and a manifest.
"""

import csv
import io
from pathlib import Path

from components.data import image_set
from components.data.shards import write_bytes
from components.sources import DataConfig, prepare
from pipelines.config.views import View
from pipelines.layout import DOWNLOADS, REJECTS
from pipelines.runner.context import Context

# The source is on this machine, also where a cluster is named.
LOCAL = True


class PrepareParams(View):
    """The source, and how its splits are cut."""

    seed: int
    data: DataConfig
    rows_per_part: int
    tracks = {"seed": "seed", "data": "data", "rows_per_part": "rows_per_part"}


def run(
    params: PrepareParams, context: Context, *, out_train: Path, out_val: Path, out_test: Path
) -> dict[str, float]:
    """Prepare the three splits; images that could not be read are listed in rejects.csv."""
    prepared = prepare(
        params.data,
        params.seed,
        DOWNLOADS,
        lambda name, done, total: context.progress.advance(done, total, f"bytes of {name}"),
    )
    for warning in prepared.warnings:
        context.progress.say(f"warning: {warning}")
    splits = {out_train: prepared.train, out_val: prepared.val, out_test: prepared.test}
    for out, split in splits.items():
        image_set.write(out, split, params.rows_per_part)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "row", "reason"])
    writer.writerows((reject.file, reject.row, reject.reason) for reject in prepared.rejects)
    write_bytes(REJECTS, text.getvalue().encode())
    return {
        "train": len(prepared.train),
        "val": len(prepared.val),
        "test": len(prepared.test),
        "rejected": len(prepared.rejects),
    }
