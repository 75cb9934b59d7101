"""What is stored of the probes of a defense: their findings, and what they were made of.

A finding that can clear a defense counts only for that defense and for the code that found it, so
it is stored with their digests, and `scoring` compares them with what is scored.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from components import probes
from components.attacks import L2, Attack, Linf
from components.attacks.contract import GIVEN, REPLAYED
from components.config import Config
from components.data import shards
from components.data.shards import write_json
from components.models.identity import sources, stripped
from components.probes import Finding
from pipelines.config.sections import Checks
from pipelines.tasks.subject import Subject


class Probed(Config):
    """The content of `checks.json`: the findings on one entry, and the facts behind them.

    `digest` is that of both. It shows an edit by hand, and is no signature.
    """

    facts: dict[str, Any]
    findings: list[Finding]
    digest: str = ""

    def signed(self) -> "Probed":
        """Return the same content with its digest."""
        content = json.dumps(self.model_dump(mode="json", exclude={"digest"}), sort_keys=True)
        return self.model_copy(update={"digest": hashlib.sha256(content.encode()).hexdigest()})


def facts(
    subject: Subject, attacks: Mapping[str, Attack], sets: Mapping[str, Path], threat: Linf | L2,
    checks: Checks, seed: int, batch: int, val: Path | None, test: Path,
) -> dict[str, Any]:  # fmt: skip
    """Return what the findings on `subject` depend on: digests of models, images, sets and code.

    `attacks` are those of its ladder, and `sets` the folders of their sets, by rung/attack; those
    that are replayed or given do not count.
    """
    others = (*REPLAYED, GIVEN)
    own = {name: one for name, one in attacks.items() if name.split("/")[0] not in others}
    return {
        **subject.facts(),
        "data": shards.fingerprint(test),
        "val": shards.fingerprint(val) if val else "none",
        "threat": threat.model_dump(mode="json"),
        "seed": seed,
        "batch": batch,
        "checks": checks.model_dump(mode="json"),
        "attacks": {name: one.model_dump(mode="json") for name, one in own.items()},
        "sets": {name: shards.fingerprint(sets[name]) for name in own},
        "code": _code(),
    }


def write(path: Path, facts: dict[str, Any], findings: list[Finding]) -> None:
    """Store findings with the facts behind them."""
    write_json(path, Probed(facts=facts, findings=findings).signed().model_dump(mode="json"))


def read(path: Path) -> Probed:
    """Return what is stored; nothing, where the file is missing, empty, damaged or edited."""
    try:
        found = Probed.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return Probed(facts={}, findings=[])
    edited = found.digest != found.signed().digest
    return Probed(facts={}, findings=[]) if edited else found


@lru_cache
def _code() -> str:
    """Return one sha256 of the probes and of all that they import, without comments."""
    files = sorted(sources([probes.__name__]).items())
    text = {name: stripped(path.read_text(encoding="utf-8")) for name, path in files}
    return hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()
