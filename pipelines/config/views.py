"""What a stage sees of the parameters, and nothing else of them.

`tracks` names the keys of params.yaml that a view consists of; a test compares it with dvc.yaml.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self, cast

from components.attacks import Threat
from components.config import Config
from pipelines.config.schema import Params
from pipelines.errors import ConfigError, near
from pipelines.layout import PARAMS

INSTANCE = "{name}"


class View(Config):
    """What one stage sees of the parameters; `tracks` maps fields to keys of params.yaml."""

    tracks: ClassVar[Mapping[str, str]]

    @classmethod
    def of(cls, params: Params, name: str | None) -> Self:
        """Return this view of the parameters, for the foreach instance `name`.

        Raises ConfigError for a name that params.yaml does not have.
        """
        values = {}
        for field, key in cls.tracks.items():
            value: Any = params
            for part in key.split("."):
                if part == INSTANCE:
                    value = value[_known(key, name, value)]
                else:
                    value = value[part] if isinstance(value, Mapping) else getattr(value, part)
            values[field] = value
        return cast(Self, cls.model_construct(**values))


def _known(key: str, name: str | None, entries: Mapping[str, Any]) -> str:
    """Return `name` if it is among the entries; else raise ConfigError, which lists them."""
    section = key.partition(f".{INSTANCE}")[0]
    listed = f"there are {', '.join(entries)}" if entries else "there is none"
    if name is None:
        raise ConfigError(f"name one of {section} in {PARAMS}: {listed}")
    if name not in entries:
        hint = near(name, entries)
        raise ConfigError(f"{PARAMS} has no {name} in {section}{hint}; {listed}")
    return name


class SharedView(View):
    """What every stage sees that trains or attacks."""

    seed: int
    batch: int
    tracks = {"seed": "seed", "batch": "batch"}


class TrainingView(SharedView):
    """What every stage sees that trains: the threat of attacks in training, which is not scored."""

    training_threat: Threat
    tracks = {**SharedView.tracks, "training_threat": "training_threat"}
