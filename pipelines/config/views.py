"""Carved out of pipelines/params.py."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self, cast

from components.attacks import AttackConfig, Threat
from components.config import Config
from pipelines.config.schema import Checks, Name, Params


class View(Config):
    """What one stage sees of the parameters; `tracks` maps fields to keys of params.yaml."""

    tracks: ClassVar[Mapping[str, str]]

    @classmethod
    def of(cls, params: Params, name: str | None) -> Self:
        """Take this view of the parameters, for the foreach instance `name`."""
        values = {}
        for field, key in cls.tracks.items():
            value: Any = params
            for part in key.format(name=name).split("."):
                value = value[part] if isinstance(value, Mapping) else getattr(value, part)
            values[field] = value
        return cast(Self, cls.model_construct(**values))


class ThreatView(View):
    """What every stage sees that trains or attacks."""

    seed: int
    batch: int
    threat: Threat
    tracks = {"seed": "seed", "batch": "batch", "threat": "threat"}


class CraftingView(ThreatView):
    """What every stage sees that crafts ladders: all attacks these may name, and the probes."""

    attacks: dict[Name, AttackConfig]
    checks: Checks
    tracks = {**ThreatView.tracks, "attacks": "attacks", "checks": "checks"}
