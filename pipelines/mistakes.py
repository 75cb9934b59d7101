"""Mistakes in parameters, said in one sentence."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """Parameters that cannot be used: one sentence, said before anything starts."""


def near(name: str, names: Iterable[str]) -> str:
    """Ask for the one of `names` that is most like a wrong one, to end a sentence with."""
    found = difflib.get_close_matches(name, sorted(names), 1)
    return f", did you mean {found[0]}?" if found else ""
