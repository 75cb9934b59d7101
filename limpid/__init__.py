"""Limpid for your own code: attacks and verdicts on your own networks, without a pipeline.

`evaluate` judges a classifier and a purifier in front of it; `AutoAttack` has the signature of its
authors' class. Both are imported when they are first used: torch takes seconds.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from limpid.autoattack import AutoAttack
    from limpid.judging import Verdict, evaluate

__all__ = ["AutoAttack", "Verdict", "evaluate"]
_HOMES = {"AutoAttack": "autoattack", "Verdict": "judging", "evaluate": "judging"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"limpid.{_HOMES[name]}"), name)
    raise AttributeError(f"limpid has no {name}; it has {', '.join(__all__)}")
