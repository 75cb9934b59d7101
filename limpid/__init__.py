"""Limpid for your own code: verdicts on your own networks, and the contract of what you add.

`evaluate` judges a classifier and a purifier in front of it; `AutoAttack` has the signature of its
authors' class; `testing` holds the checks of purifiers, attacks and classifiers. All are imported
when they are first used: torch takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from limpid import testing
    from limpid.autoattack import AutoAttack
    from limpid.judging import Verdict, evaluate

__all__ = ["AutoAttack", "Verdict", "evaluate", "testing"]
_HOMES = {"AutoAttack": "autoattack", "Verdict": "judging", "evaluate": "judging"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"limpid.{_HOMES[name]}"), name)
    if name == "testing":
        return import_module("limpid.testing")
    raise AttributeError(f"limpid has no {name}; it has {', '.join(__all__)}")
