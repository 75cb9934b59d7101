"""Crafting: one task per part of the data, finished parts kept by their own key.

A set that was crafted before with the same attack, threat, gradient mode, models, images, seed and
code is not crafted again, whatever else in params.yaml has changed: one more attack costs itself,
and an interrupted stage goes on where it was.
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
from components.attacks.sets import seal, write_crafted
from components.data import image_set, shards
from components.data.shards import shard_name
from components.models.defense import Mode
from pipelines.layout import ROOT
from pipelines.runner.context import Context
from pipelines.runner.provenance import code_digests
from pipelines.storage import job_files
from pipelines.tasks.subject import Subject


@dataclass(frozen=True)
class Order:
    """One adversarial set to craft, and where to."""

    subject: Subject
    mode: Mode
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


def craft_all(orders: Sequence[Order], context: Context) -> None:
    """Craft every order, parts side by side; what is in the keep already is only copied."""
    if not orders:
        return
    code = code_digests(sys.modules[__name__])
    facts = [order.facts() for order in orders]
    kept = [ROOT / "sets" / _key(one, code) for one in facts]
    images = image_set.read_by_shard(orders[0].images)
    tasks: list[dict[str, Any]] = [
        {"order": order, "part": part, "path": (folder / shard_name(part)).absolute()}
        for part in range(len(images))
        for order, folder in zip(orders, kept, strict=True)
    ]
    there = job_files.available([task["path"] for task in tasks])
    missing = [task for task, done in zip(tasks, there, strict=True) if not done]
    context.map(craft_shard, missing)
    for order, folder, fact in zip(orders, kept, facts, strict=True):
        order.out.mkdir(parents=True, exist_ok=True)
        for part in range(len(images)):
            job_files.download(folder.absolute() / shard_name(part))
            shutil.copyfile(folder / shard_name(part), order.out / shard_name(part))
        seal(order.out, images[0].shape, fact)


def craft_shard(order: Order, part: int, path: Path, device: str) -> None:
    """Craft one part of one set; runs in a worker."""
    torch.set_num_threads(1)
    (images,) = image_set.read_by_shard(order.images, part)
    crafted = craft(
        order.attack, order.subject.defense(device), order.mode, images, order.threat, order.seed,
        order.batch,
    )  # fmt: skip
    write_crafted(path, crafted)
    job_files.upload(path)


def _key(facts: Mapping[str, Any], code: Mapping[str, str]) -> str:
    text = json.dumps({"facts": facts, "code": code, "torch": torch.__version__}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
