"""Limpid for your own code: verdicts on your own networks, and the contract of what you add.

`evaluate` judges a classifier and a purifier in front of it; `preprocessed`, `from_timm`,
`from_torchvision`, `from_hugging_face` and `read_weights` make a network from elsewhere take pixels
in [0,1]; `AutoAttack` has the signature of its authors' class; `testing` holds the checks of
purifiers, attacks and classifiers. All are imported when they are first used: torch takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from limpid.shadowed import require_ours

if TYPE_CHECKING:
    from components.models.preprocessing import (
        from_hugging_face,
        from_timm,
        from_torchvision,
        preprocessed,
        read_weights,
    )
    from limpid import testing
    from limpid.autoattack import AutoAttack
    from limpid.judging import Verdict, evaluate

__all__ = [
    "AutoAttack", "Verdict", "evaluate", "from_hugging_face", "from_timm", "from_torchvision",
    "preprocessed", "read_weights", "testing",
]  # fmt: skip
_HOMES = {
    "AutoAttack": "limpid.autoattack", "Verdict": "limpid.judging", "evaluate": "limpid.judging",
    "from_hugging_face": "components.models.preprocessing",
    "from_timm": "components.models.preprocessing",
    "from_torchvision": "components.models.preprocessing",
    "preprocessed": "components.models.preprocessing",
    "read_weights": "components.models.preprocessing",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    require_ours()
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name == "testing":
        return import_module("limpid.testing")
    raise AttributeError(f"limpid has no {name}; it has {', '.join(__all__)}")
