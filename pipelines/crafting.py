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
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from components import data, shards
from components.adversarial import seal, write_crafted
from components.attacks import L2, Attack, Linf, craft
from components.checkpoints import fingerprint, load, load_purifier, read_card, require_fit
from components.config import Config
from components.data import ImageSet
from components.defense import Defense, Mode
from components.purifiers import Inference, Purifier
from components.shards import part_name
from pipelines import place
from pipelines.place import ROOT
from pipelines.stage import Context, code_digests


@dataclass(frozen=True)
class Subject:
    """What is attacked: a classifier folder, and a purifier folder, a control or nothing.

    `inference` says how the network of a purifier folder is used.
    """

    classifier: Path
    purifier: Path | None = None
    control: Config | None = None
    inference: Inference | None = None

    @property
    def bare(self) -> bool:
        """Whether there is no purifier at all."""
        return self.purifier is None and self.control is None

    def require_fit(self, images: ImageSet) -> None:
        """Raise ValueError where a model was made for other images or classes."""
        for folder in (self.classifier, self.purifier):
            if folder is not None:
                require_fit(folder, images)

    def defense(self, device: str = "cpu") -> Defense:
        """Load it, frozen."""
        classifier = load(self.classifier, device)
        purifier: Purifier | None = None
        if self.purifier is not None:
            purifier = load_purifier(self.purifier, device, self.inference)
        elif self.control is not None:
            shape = read_card(self.classifier).shape
            purifier = self.control.build(tuple(shape))  # type: ignore[attr-defined]
        return Defense(classifier, purifier).freeze().to(device)

    def stand_ins(self) -> Sequence[str]:
        """Return the names of the purifier's stand-ins."""
        return self._traits[0]

    def differentiable(self) -> bool:
        """Say whether the exact gradient is usable."""
        return self._traits[1]

    @cached_property
    def _traits(self) -> tuple[Sequence[str], bool]:
        """Load the networks once to ask; a bare classifier needs no asking."""
        if self.bare:
            return (), True
        defense = self.defense()
        assert defense.purifier is not None
        return defense.purifier.stand_ins, defense.differentiable

    def facts(self) -> dict[str, str]:
        """Return the fingerprints that say which models these are."""
        purifier = "none"
        if self.purifier is not None:
            purifier = fingerprint(self.purifier)
        elif self.control is not None:
            purifier = hashlib.sha256(self.control.model_dump_json().encode()).hexdigest()
        inference = "none" if self.inference is None else self.inference.model_dump_json()
        return {
            "classifier": fingerprint(self.classifier),
            "purifier": purifier,
            "inference": inference,
        }


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
    images = data.read_by_part(orders[0].images)
    tasks: list[dict[str, Any]] = [
        {"order": order, "part": part, "path": (folder / part_name(part)).absolute()}
        for part in range(len(images))
        for order, folder in zip(orders, kept, strict=True)
    ]
    there = place.shared([task["path"] for task in tasks])
    missing = [task for task, done in zip(tasks, there, strict=True) if not done]
    context.map(craft_part, missing)
    for order, folder, fact in zip(orders, kept, facts, strict=True):
        order.out.mkdir(parents=True, exist_ok=True)
        for part in range(len(images)):
            place.see(folder.absolute() / part_name(part))
            shutil.copyfile(folder / part_name(part), order.out / part_name(part))
        seal(order.out, images[0].shape, fact)


def craft_part(order: Order, part: int, path: Path, device: str) -> None:
    """Craft one part of one set; runs in a worker."""
    torch.set_num_threads(1)
    (images,) = data.read_by_part(order.images, part)
    crafted = craft(
        order.attack, order.subject.defense(device), order.mode, images, order.threat, order.seed,
        order.batch,
    )  # fmt: skip
    write_crafted(path, crafted)
    place.share(path)


def _key(facts: Mapping[str, Any], code: Mapping[str, str]) -> str:
    text = json.dumps({"facts": facts, "code": code, "torch": torch.__version__}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
