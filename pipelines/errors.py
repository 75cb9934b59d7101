"""ConfigError, Failed, Interrupted"""

import difflib
from collections.abc import Iterable


class Interrupted(BaseException):
    """Ctrl-C, SIGTERM, or the death of who started this."""


class Failed(Exception):
    """What ended elsewhere, with its exit code and its sentence."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class ConfigError(ValueError):
    """Parameters that cannot be used: one sentence, said before anything starts."""


def near(name: str, names: Iterable[str]) -> str:
    """Ask for the one of `names` that is most like a wrong one, to end a sentence with."""
    found = difflib.get_close_matches(name, sorted(names), 1)
    return f", did you mean {found[0]}?" if found else ""
