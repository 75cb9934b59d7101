"""`limpid NAME ...`, or `python -m pipelines NAME ...`: every stage and every command, by its name."""

import importlib
import pkgutil
import sys
from collections.abc import Sequence

from pipelines import commands, stages

FOUND = {
    one.name: f"{package.__name__}.{one.name}"
    for package in (stages, commands)
    for one in pkgutil.iter_modules(package.__path__)
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is named; 2 where nothing has this name."""
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or ["help"]
    if name not in FOUND:
        print(f"usage: limpid NAME ...; there are {', '.join(FOUND)}", file=sys.stderr)
        return 2
    module = importlib.import_module(FOUND[name])
    if hasattr(module, "run"):
        from pipelines.runner import stage

        stage.main(FOUND[name], rest, here=name == "prepare_data")
    sys.argv = [f"limpid {name}", *rest]
    return int(module.main())


if __name__ == "__main__":
    raise SystemExit(main())
