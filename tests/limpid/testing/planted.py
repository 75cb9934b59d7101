"""What the tests of planted faults share."""

from collections.abc import Callable, Iterable
from typing import Any

from limpid.testing import Check


def failures(checks: Iterable[Check], make: Callable[..., Any]) -> dict[str, str]:
    """Return the sentence of every check that fails, by name."""
    found = {}
    for check in checks:
        try:
            check(make)
        except AssertionError as error:
            found[check.name] = str(error)
    return found
