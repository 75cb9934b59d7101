"""Whether `components` and `pipelines` are ours.

Other distributions have top-level packages of these names, too, and whichever lies first on the
path of Python is imported.
"""

from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent.parent
OURS = ("components", "pipelines")


class Shadowed(ImportError):
    """Another package has the name of one of ours; the text is one sentence."""


def require_ours() -> None:
    """Raise Shadowed where `components` or `pipelines` is not that of this Limpid."""
    for name in OURS:
        spec = find_spec(name)
        place = Path(spec.origin).parent if spec and spec.origin else None
        if place is None or place.parent.resolve() != HERE.resolve():
            found = f"that of {place.parent}" if place else "not there"
            raise Shadowed(
                f"the package {name} is {found}, and Limpid is that of {HERE}: another "
                "distribution has a package of that name; install Limpid into an environment of "
                "its own"
            )
