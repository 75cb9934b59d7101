"""Limpid for your own code: attacks on any classifier, and the contract of what you add.

`AutoAttack` has the signature of its authors' class, `testing` holds the checks of purifiers,
attacks and classifiers. Both are imported when they are first used: torch takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from limpid import testing
    from limpid.autoattack import AutoAttack

__all__ = ["AutoAttack", "testing"]


def __getattr__(name: str) -> Any:
    if name == "AutoAttack":
        from limpid.autoattack import AutoAttack

        return AutoAttack
    if name == "testing":
        return import_module("limpid.testing")
    raise AttributeError(f"limpid has no {name}; it has {', '.join(__all__)}")
