"""Write params.yaml from a profile and overrides, or from a search.

`limpid configure mnist data.path=DIR attacks.pgd.steps=100` lays profiles/mnist.yaml and the
overrides over profiles/digits.yaml, shows what changes and writes the complete result, which a
person reads and commits. Of an overlay, `external`, `classifiers`, `purifiers`, `students`, `atop`,
`attacks`, `baselines`, `defenses`, `controls`, `published`, `tuning` and any mapping whose `kind`
or `norm` changes replace those of the profile; everything else is merged. `data` with another
`kind` keeps the keys that both kinds know: how the splits are cut. A data set other than the
profile's loses the published accuracies of that one; Parquet files and folders may hold any data
set, and keep them.

`limpid configure --from reports/tuning/NAME/best.yaml` puts what a search found into
params.yaml, and leaves everything else there as it is written.

`limpid configure --migrate` adds the keys to params.yaml that this version needs and an older one
did not have, with the values that the older one took.

`limpid configure --plugins` writes into every section of a plugin's kind which plugin is installed:
name, version and digest of its code. What depends on these sections is then out of date for DVC. A
profile with such kinds gets them right away.

Where Limpid is installed without its sources, every form also writes dvc.yaml and code.yaml, by
which DVC sees which code is installed (`pipelines/runner/installed.py`).
"""

import argparse
import copy
import difflib
import sys
from collections.abc import Collection, Mapping, Sequence
from functools import reduce
from io import StringIO
from operator import getitem
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import YAMLError

from components.data.shards import write_bytes
from pipelines.config.search_space import flatten, put
from pipelines.config.yaml_files import edit_yaml, read_yaml, round_trip, write_yaml
from pipelines.errors import ConfigError
from pipelines.layout import PARAMS, PROFILES

BASE = "digits"
# Kinds of data that may hold any data set.
ANY = ("parquet", "image_folder")
REPLACED = {
    "external", "classifiers", "purifiers", "students", "atop", "attacks", "baselines", "defenses",
    "controls", "published", "tuning",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Write params.yaml; ConfigError for a profile, key or value that is not allowed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("profile", nargs="?", help="a file in profiles/, without .yaml")
    parser.add_argument("override", nargs="*", help="section.key=value, as in YAML")
    parser.add_argument(
        "--from", dest="found", type=Path, help="values to adopt, as a search found"
    )
    parser.add_argument(
        "--migrate", action="store_true", help="add the keys that an older params.yaml lacks"
    )
    parser.add_argument(
        "--plugins", action="store_true", help="name the plugins that are installed now"
    )
    options = parser.parse_args(argv)
    given = (options.profile, options.found, options.migrate, options.plugins)
    if sum(map(bool, given)) != 1:
        raise ConfigError(
            "give a profile, or --from a file of values, or --migrate, or --plugins, and only one"
        )
    before = PARAMS.read_text(encoding="utf-8") if PARAMS.exists() else ""
    if options.plugins:
        text, origin = renewed(before), "what it was, with the plugins that are installed"
    elif options.migrate:
        text, origin = migrated(before), "up to date with this version"
    elif options.found:
        text, origin = adopt(before, options.found), f"what it was, with {options.found}"
    else:
        text, origin = compose(options.profile, options.override), f"profile {options.profile}"
    sys.stdout.writelines(
        difflib.unified_diff(
            before.splitlines(keepends=True),
            text.splitlines(keepends=True),
            "before",
            str(PARAMS),
        )
    )
    # Imports torch.
    from pipelines.runner import installed

    if installed.needed():
        installed.write()
    write_bytes(PARAMS, text.encode())
    print(f"{PARAMS} is now {origin}; `dvc repro` runs it")
    return 0


def adopt(text: str, file: Path) -> str:
    """Return the YAML `text` with the values of a file, everything else as a person wrote it.

    Raises ConfigError for keys that do not exist, and where the result is not valid.
    """
    # Imports torch.
    from pipelines.config.schema import Params, explain

    values = dict(flatten(read_yaml(file)))
    try:
        Params.model_validate(put(read_yaml(PARAMS), values))
    except ValidationError as error:
        raise ConfigError(f"{file}: {explain(error)}") from None
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from None
    return edit_yaml(text, values)


def renewed(text: str) -> str:
    """Return the YAML `text` of params.yaml with the plugins that are installed in it.

    Everything else stays as a person wrote it. Raises ConfigError where the result is not valid.
    """
    # Imports torch.
    from pipelines.config.schema import Params, explain

    value, yaml = read_yaml(PARAMS), round_trip()
    document, pins = yaml.load(text), _pins(value)
    _name_plugins(value, pins)
    _name_plugins(document, pins)
    try:
        Params.model_validate(value)
    except ValidationError as error:
        raise ConfigError(f"{PARAMS}: {explain(error)}") from None
    written = StringIO()
    yaml.dump(document, written)
    return written.getvalue()


def _pins(value: Mapping[str, Any]) -> dict[tuple[Any, ...], Any]:
    """Return what must stand where another plugin is named than is installed, or none, by path."""
    # Imports torch.
    from components.plugins import OTHER
    from pipelines.config.schema import Params

    try:
        Params.model_validate(value)
    except ValidationError as error:
        return {
            (*_path(value, one["loc"][:-1]), one["loc"][-1]): one["ctx"]["right"]
            for one in error.errors()
            if one["type"] == OTHER
        }
    return {}


def _path(value: Any, location: Sequence[Any]) -> tuple[Any, ...]:
    """Return the keys to a place; pydantic has the tags of unions among them."""
    keys = []
    for part in location:
        if not isinstance(value, Mapping) or value.get("kind") != part:
            value = value[part]
            keys.append(part)
    return tuple(keys)


def _name_plugins(document: Any, pins: Mapping[tuple[Any, ...], Any]) -> None:
    """Put pins into a document, after the kind of a section where they are new."""
    for (*path, key), pin in pins.items():
        section = reduce(getitem, path, document)
        if key in section or not isinstance(section, CommentedMap):
            section[key] = pin
        else:
            section.insert(list(section).index("kind") + 1, key, pin)


def migrated(text: str) -> str:
    """Return the YAML `text` of an older params.yaml with the keys that this version needs.

    Everything else stays as a person wrote it. Raises ConfigError where there is nothing to read.
    """
    yaml = round_trip()
    document = yaml.load(text)
    if not isinstance(document, CommentedMap):
        raise ConfigError(f"{PARAMS} must be a mapping of sections: there is nothing to migrate")
    if "threat" in document and "training_threat" not in document:
        place = list(document).index("threat") + 1
        document.insert(place, "training_threat", copy.deepcopy(document["threat"]))
    # A profile has it from the one that it is laid on.
    if "external" not in document and {"seed", "classifiers"} <= set(document):
        document.insert(list(document).index("classifiers"), "external", CommentedMap())
        document["external"].fa.set_flow_style()
    sections = ("defenses", "controls", "attacks", "students", "purifiers", "atop")
    defenses, controls, attacks, students, purifiers, atop = (
        list((document.get(section) or {}).values()) for section in sections
    )
    for entry in (*defenses, *controls):
        if "classifier" not in entry:
            entry.insert(0, "classifier", "standard")
        inference = entry.get("inference") or {}
        if inference.get("mode") == "faithful":
            inference["mode"] = "ddim"
    for attack in attacks:
        if attack["kind"] == "bim" and "early_stop" not in attack:
            attack.insert(list(attack).index("eot"), "early_stop", True)
    for student in students:
        if "teachers" not in student:
            named = [student.pop(f"{one}_teacher") for one in ("adversarial", "normal")]
            student.insert(0, "teachers", CommentedSeq(named))
            student["teachers"].fa.set_flow_style()
    for network in (*purifiers, *atop):
        if network["objective"]["kind"] in ("reconstruction", "atop"):
            network["objective"].setdefault("loss", "mse")
        if network["training"]["optimiser"] == "adam_gan":
            network["training"]["optimiser"] = {"kind": "adam", "betas": [0.5, 0.9]}
    written = StringIO()
    yaml.dump(document, written)
    return written.getvalue()


def compose(profile: str, overrides: list[str]) -> str:
    """Return the YAML text of a profile with overrides; ConfigError where it is not valid."""
    # Imports torch.
    from pipelines.config.schema import Params, explain

    known = sorted(path.stem for path in PROFILES.glob("*.yaml"))
    if profile not in known:
        raise ConfigError(f"there is no profile {profile}; there are {', '.join(known)}")
    value = read_yaml(PROFILES / f"{BASE}.yaml")
    changes = [_parse(override) for override in overrides]
    if profile == BASE and not overrides:
        # The file itself, with its comments.
        return (PROFILES / f"{BASE}.yaml").read_text(encoding="utf-8")
    if profile != BASE or any("kind" in (change.get("data") or {}) for change in changes):
        # Limits that keep the demo short, and are not for another data set.
        value["resources"]["stages"] = {}
        value["data"]["test_limit"] = None
    if profile != BASE:
        value = merge(value, read_yaml(PROFILES / f"{profile}.yaml"), REPLACED)
    kind = value["data"]["kind"]
    for change in changes:
        value = merge(value, change)
    _name_plugins(value, _pins(value))
    try:
        Params.model_validate(value)
    except ValidationError as error:
        raise ConfigError(f"profile {profile}: {explain(error)}") from None
    if value["data"]["kind"] not in (kind, *ANY) and not any("published" in c for c in changes):
        value["published"] = {}
    return write_yaml(value)


def merge(
    base: Mapping[str, Any], over: Mapping[str, Any], replaced: Collection[str] = (), path: str = ""
) -> dict[str, Any]:
    """Return `base` with `over` laid on it; the sections in `replaced` come from `over` alone."""
    # Imports torch.
    from components.plugins import members
    from components.sources import DataConfig

    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = value
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            whole = not path and key in replaced
            same = all(value.get(tag, old.get(tag)) == old.get(tag) for tag in ("kind", "norm"))
            if not whole and same:
                merged[key] = merge(old, value, replaced, f"{path}{key}.")
            elif key == "data" and not path and value["kind"] in members(DataConfig):
                fields = members(DataConfig)[value["kind"]].model_fields
                merged[key] = {k: v for k, v in {**old, **value}.items() if k in fields}
    return merged


def _parse(override: str) -> dict[str, Any]:
    """Turn `a.b=value` into a nested mapping."""
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"{override} is not of the form section.key=value")
    try:
        value: Any = YAML(typ="safe", pure=True).load(StringIO(text))
    except YAMLError:
        raise ConfigError(f"the value of {override} is not readable as YAML") from None
    for key in reversed(name.split(".")):
        value = {key: value}
    assert isinstance(value, dict)
    return value
