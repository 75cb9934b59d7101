"""Errors that end a process, and the nearest name for a wrong one."""

import difflib
from collections.abc import Iterable


class Interrupted(BaseException):
    """Ctrl-C, SIGTERM, or the death of the process that started this one."""


class Failed(Exception):
    """An error with an exit code of its own; the text is one sentence for a person."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class ConfigError(ValueError):
    """Parameters that cannot be used, found before anything starts; the text is one sentence."""


def near(name: str, names: Iterable[str]) -> str:
    """Return the end of a sentence that asks for the nearest of `names`, or "" if none is near."""
    found = difflib.get_close_matches(name, sorted(names), 1)
    return f", did you mean {found[0]}?" if found else ""
