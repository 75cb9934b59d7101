"""Carved out of pipelines/params.py."""

from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from pipelines.errors import ConfigError


def read_yaml(path: Path) -> dict[str, Any]:
    """Return a YAML 1.2 mapping, read as DVC reads it: duplicate keys are errors."""
    try:
        value = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; run this where it lies") from None
    except (YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark is not None else ""
        problem = error.problem if isinstance(error, MarkedYAMLError) else str(error)
        raise ConfigError(f"{path}{where}: {problem}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must be a mapping of sections")
    return value


def write_yaml(value: Mapping[str, Any]) -> str:
    """Return YAML text of plain values, in the order given."""
    text = StringIO()
    yaml = YAML()
    yaml.width = 100
    yaml.dump(dict(value), text)
    return text.getvalue()


def edit_yaml(text: str, values: Mapping[str, Any]) -> str:
    """Return YAML text with `values` at places that are there, all else as it is written."""
    yaml = YAML()
    yaml.width, yaml.preserve_quotes = 4096, True
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.add_representer(
        type(None), lambda dumper, _: dumper.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    document = yaml.load(text)
    for place, value in values.items():
        node = document
        *folders, last = place.split(".")
        for folder in folders:
            if node[folder].yaml_anchor() is not None:
                # Others share this mapping under its name: from here on it is this place's own.
                shared = node[folder]
                node[folder] = CommentedMap(shared)
                if shared.fa.flow_style():
                    node[folder].fa.set_flow_style()
            node = node[folder]
        node[last] = value
    written = StringIO()
    yaml.dump(document, written)
    return written.getvalue()
