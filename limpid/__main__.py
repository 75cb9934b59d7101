"""The command `limpid NAME ...`: what judges your own networks, and all of `pipelines`."""

import sys
from collections.abc import Mapping, Sequence

from limpid.shadowed import Shadowed, require_ours

OWN = {"limpid.commands": "your own networks"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command or stage, as `pipelines.__main__.main` does.

    Return 4 where another package has the name of one of ours.
    """
    try:
        require_ours()
    except Shadowed as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    from pipelines import __main__ as pipelines

    return pipelines.main(argv, groups(), "limpid")


def groups() -> Mapping[str, str]:
    """Return the packages of everything that can be run, and their titles."""
    from pipelines.__main__ import GROUPS

    return {**OWN, **GROUPS}


if __name__ == "__main__":
    raise SystemExit(main())
