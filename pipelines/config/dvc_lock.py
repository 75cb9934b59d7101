"""DVC's record of what was made from what: the stages and outs in dvc.lock."""

from typing import Any

from pipelines.config.yaml_files import read_yaml
from pipelines.errors import ConfigError
from pipelines.layout import DVC_LOCK

DAMAGED = (
    f"{DVC_LOCK} is cut short or altered: `git checkout {DVC_LOCK}`; where it was never "
    "committed, remove it, and DVC takes what it can from its cache"
)


def stages() -> dict[str, dict[str, Any]]:
    """Return the stages by name; none where there is no lock. Raises ConfigError for a damaged one.

    A lock is damaged where it is no mapping of stages whose deps and outs all have paths.
    """
    if not DVC_LOCK.exists():
        return {}
    try:
        found: dict[str, dict[str, Any]] = read_yaml(DVC_LOCK)["stages"]
        entries = [e for one in found.values() for of in ("deps", "outs") for e in one.get(of, [])]
        whole = all("path" in entry for entry in entries)
    except (ConfigError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ConfigError(DAMAGED)
    return found


def outs() -> dict[str, str]:
    """Return the md5 of every out by its path; raise ConfigError as `stages` does."""
    listed = [out for stage in stages().values() for out in stage.get("outs", [])]
    return {out["path"]: out["md5"] for out in listed if "md5" in out}
