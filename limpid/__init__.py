"""Limpid for your own code: attacks on any classifier, without a pipeline.

`AutoAttack` has the signature of its authors' class. It is imported when it is first used: torch
takes seconds.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from limpid.autoattack import AutoAttack

__all__ = ["AutoAttack"]


def __getattr__(name: str) -> Any:
    if name == "AutoAttack":
        from limpid.autoattack import AutoAttack

        return AutoAttack
    raise AttributeError(f"limpid has no {name}; it has {', '.join(__all__)}")
