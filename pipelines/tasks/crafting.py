"""Crafting: one task per set and shard of the data; finished shards are kept by a key.

The key covers everything that a shard depends on: attack, threat, gradient mode, models, images,
seed and code. Whatever else in params.yaml has changed, a set with a known key is not crafted
again: one more attack costs only itself, and an interrupted stage continues where it stopped.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from components.attacks import L2, Attack, Linf, craft
from components.attacks.contract import Rung
from components.attacks.sets import write_crafted, write_crafted_manifest
from components.data import image_set, shards
from components.data.shards import read_manifest, shard_name, shard_rows
from pipelines.runner.context import Context
from pipelines.runner.provenance import code_digests
from pipelines.storage import job_files
from pipelines.tasks.subject import Subject


@dataclass(frozen=True)
class SetSpec:
    """One adversarial set to craft: the attack, the folder of images, and the folder to write."""

    subject: Subject
    mode: Rung
    attack: Attack
    images: Path
    threat: Linf | L2
    seed: int
    batch: int
    out: Path

    def facts(self) -> dict[str, Any]:
        """Return what the manifest says of the set."""
        return {
            **self.subject.facts(),
            "data": shards.fingerprint(self.images),
            "mode": self.mode,
            "attack": self.attack.model_dump(mode="json"),
            "threat": self.threat.model_dump(mode="json") if self.attack.bounded else None,
            "seed": self.seed,
            "batch": self.batch,
        }


def craft_all(specs: Sequence[SetSpec], context: Context) -> None:
    """Craft every set, shards side by side; shards that are known already are only copied."""
    if not specs:
        return
    code = code_digests(sys.modules[__name__])
    facts = [spec.facts() for spec in specs]
    kept = [context.crafted / _key(one, code) for one in facts]
    shape, count = read_manifest(specs[0].images)["shape"], len(shard_rows(specs[0].images))
    tasks: list[dict[str, Any]] = [
        {"spec": spec, "shard": shard, "path": (folder / shard_name(shard)).absolute()}
        for shard in range(count)
        for spec, folder in zip(specs, kept, strict=True)
    ]
    there = job_files.available([task["path"] for task in tasks])
    missing = [task for task, done in zip(tasks, there, strict=True) if not done]
    context.map(craft_shard, missing)
    for spec, folder, fact in zip(specs, kept, facts, strict=True):
        spec.out.mkdir(parents=True, exist_ok=True)
        for shard in range(count):
            job_files.download(folder.absolute() / shard_name(shard))
            shutil.copyfile(folder / shard_name(shard), spec.out / shard_name(shard))
        write_crafted_manifest(spec.out, shape, fact)


def craft_shard(spec: SetSpec, shard: int, path: Path, device: str) -> None:
    """Craft one shard of one set; runs in a worker."""
    images = image_set.read(spec.images, shard_rows(spec.images)[shard])
    crafted = craft(
        spec.attack, spec.subject.defense(device), spec.mode, images, spec.threat, spec.seed,
        spec.batch,
    )  # fmt: skip
    write_crafted(path, crafted)
    job_files.upload(path)


def _key(facts: Mapping[str, Any], code: Mapping[str, str]) -> str:
    text = json.dumps({"facts": facts, "code": code, "torch": torch.__version__}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
