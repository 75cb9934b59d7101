"""Reading and writing YAML files: strictly, and with the rest of a file as a person wrote it."""

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
        raise ConfigError(f"{path} does not exist; run this in the folder of the project") from None
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


def round_trip() -> YAML:
    """Return a reader and writer of YAML that keeps comments, quotes and the style of lists."""
    yaml = YAML()
    yaml.width, yaml.preserve_quotes = 4096, True
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.add_representer(
        type(None), lambda dumper, _: dumper.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    return yaml


def edit_yaml(text: str, values: Mapping[str, Any]) -> str:
    """Return YAML text with `values` at existing keys, and everything else as it is written."""
    yaml = round_trip()
    document = yaml.load(text)
    for key, value in values.items():
        node = document
        *sections, last = key.split(".")
        for section in sections:
            if node[section].yaml_anchor() is not None:
                # Aliases elsewhere refer to this mapping: copy it, so that only this key changes.
                shared = node[section]
                node[section] = CommentedMap(shared)
                if shared.fa.flow_style():
                    node[section].fa.set_flow_style()
            node = node[section]
        node[last] = value
    written = StringIO()
    yaml.dump(document, written)
    return written.getvalue()
