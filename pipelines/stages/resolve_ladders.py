"""Write what the adversarial sets of every scored entry depend on, a file for each.

Reads params.yaml alone, writes ladders/<entry>.json. DVC compares these files, so an attack that is
added or changed in params.yaml makes only those entries again whose ladders name it.
"""

import argparse
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from components.attacks import AttackConfig
from components.attacks.contract import MODES, SURROGATE, UNASKED
from components.data.shards import write_bytes
from pipelines import layout
from pipelines.config import schema
from pipelines.config.schema import Params
from pipelines.config.sections import Baseline, Control, Defended, Resolved


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files into place at once; ConfigError for parameters that are not valid."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = layout.STAGES["resolve_ladders"]["out"]
    parser.add_argument("--out", type=Path, default=Path(default), help=f"by default {default}")
    out: Path = parser.parse_args(argv).out
    params = schema.load()
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for name in params.scored:
        text = resolve(params, name).model_dump_json(indent=2)
        write_bytes(part / f"{name}.json", text.encode() + b"\n")
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)
    print(f"{len(params.scored)} ladders are resolved")
    return 0


def resolve(params: Params, name: str) -> Resolved:
    """Return all that the sets of one scored entry depend on, attacks in the order of params.yaml.

    The order breaks ties.
    """
    entry = params.scored[name]
    replayed = {"classifier": params.bare(entry.classifier), "transfer": SURROGATE}
    return Resolved(
        classifier=entry.classifier,
        model=entry.model if isinstance(entry, Defended) else None,
        inference=entry.inference if isinstance(entry, Defended) else None,
        control=entry.purifier if isinstance(entry, Control) else None,
        ladder={m: dict(_attacks(entry, m, params.attacks)) for m in MODES if m in entry.ladder},
        replayed={
            mode: baseline
            for mode, baseline in replayed.items()
            if mode in entry.ladder and baseline is not None
        },
        threat=params.threat,
        checks=params.checks,
    )


def _attacks(
    entry: Baseline | Defended | Control, mode: str, attacks: Mapping[str, AttackConfig]
) -> Iterator[tuple[str, AttackConfig]]:
    """Yield the attacks of one rung by the names of their sets.

    Where papers replay sets against a purifier that the attack never asked, iterated attacks end in
    every way they can: on bare classifiers, on the rungs that replay their sets, and on `network`.
    """
    for name, attack in attacks.items():
        if name not in entry.ladder[mode]:
            continue
        if isinstance(entry, Baseline) or mode in UNASKED:
            yield from ((name + end, one) for end, one in attack.endings().items())
        else:
            yield name, attack
