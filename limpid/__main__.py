"""The command `limpid NAME ...`: what judges your own networks, and all of `pipelines`."""

from collections.abc import Sequence

from pipelines import __main__ as pipelines

GROUPS = {"limpid.commands": "your own networks", **pipelines.GROUPS}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command or stage, as `pipelines.__main__.main` does."""
    return pipelines.main(argv, GROUPS, "limpid")


if __name__ == "__main__":
    raise SystemExit(main())
