"""A project without the sources of Limpid: its dvc.yaml, and the installed code that it depends on.

In a checkout, dvc.yaml names the files of code that each stage depends on. An installed Limpid has
them elsewhere. `limpid configure` then writes a dvc.yaml whose stages depend on keys of code.yaml
in their place: one digest for each stage, over the same files. A stage runs no other code than is
named there.
"""

import hashlib
import importlib.util
import json
from typing import Any

from components.data.shards import write_bytes
from pipelines import layout
from pipelines.config.yaml_files import read_yaml, write_yaml
from pipelines.errors import ConfigError
from pipelines.layout import CODE, DVC_YAML, SOURCES, TEMPLATES
from pipelines.runner.provenance import code_digests

WRITTEN = "# Written by `limpid configure`, for the Limpid that is installed.\n"
HEAD = (
    WRITTEN
    + "# The next `configure` writes it anew: changes of yours, such as stages, are lost then.\n"
)
PACKAGES = ("components", "pipelines")
RUN = ("exec pipelines/limpid ", "exec limpid ")


def needed() -> bool:
    """Say whether Limpid is installed without its sources."""
    return TEMPLATES != SOURCES


def write() -> None:
    """Write dvc.yaml and code.yaml; raise ConfigError where another hand has written a dvc.yaml."""
    if DVC_YAML.exists() and not DVC_YAML.read_text(encoding="utf-8").startswith(WRITTEN):
        raise ConfigError(
            f"this folder has a {DVC_YAML} of its own: run this in another folder, or remove it"
        )
    document = read_yaml(TEMPLATES / DVC_YAML)
    for name, stage in document["stages"].items():
        _depend_on_installed(name, stage.get("do", stage))
    write_bytes(DVC_YAML, (HEAD + write_yaml(document)).encode())
    digests = {name: digest(name) for name in layout.STAGES}
    write_bytes(CODE, (HEAD + write_yaml(digests)).encode())


def digest(stage: str) -> str:
    """Return one sha256 of the code that the result of a stage depends on."""
    spec = importlib.util.find_spec(f"pipelines.stages.{stage}")
    assert spec is not None
    # Not imported: a stage may need seconds for that.
    files = code_digests(importlib.util.module_from_spec(spec))
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def require(stage: str) -> None:
    """Raise ConfigError where code.yaml names other code of a stage than is installed."""
    if CODE.exists() and read_yaml(CODE).get(stage) != digest(stage):
        raise ConfigError(
            f"{CODE} names other code of {stage} than that of the Limpid that is installed: "
            "`limpid configure --plugins` writes it"
        )


def _depend_on_installed(name: str, stage: dict[str, Any]) -> None:
    """Change a stage of a checkout into one that needs no files of code."""
    stage["cmd"] = stage["cmd"].replace(*RUN)
    stage["params"] = [*stage.get("params", []), {str(CODE): [name]}]
    stage["deps"] = [one for one in stage["deps"] if not one.startswith(PACKAGES)]
