"""Write what the adversarial sets of each scored entry depend on.

Reads params.yaml alone, writes ladders/<entry>.json. DVC compares these files, so an attack that is
added or changed in params.yaml makes only those entries again whose ladders name it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from components.attacks import AttackConfig, Threat
from components.attacks.contract import MODES, SURROGATE, UNASKED
from components.data.shards import write_bytes
from pipelines.config.sections import (
    Baseline,
    Checks,
    Control,
    Defended,
    Name,
    Resolved,
    bare_baseline,
    usage,
)
from pipelines.config.views import View
from pipelines.runner.context import Context

# It takes no time, whatever cluster is named.
LOCAL = True


class LaddersParams(View):
    """All that is attacked, and how."""

    threat: Threat
    attacks: dict[Name, AttackConfig]
    checks: Checks
    baselines: dict[Name, Baseline]
    defenses: dict[Name, Defended]
    controls: dict[Name, Control]
    tracks = {n: n for n in ("threat", "attacks", "checks", "baselines", "defenses", "controls")}


def run(params: LaddersParams, context: Context, *, out: Path) -> dict[str, float]:
    """Write the ladder of every scored entry."""
    scored: dict[str, Baseline | Defended | Control] = {
        **params.baselines, **params.defenses, **params.controls
    }  # fmt: skip
    out.mkdir()
    for name, entry in scored.items():
        text = resolve(entry, params).model_dump_json(indent=2)
        write_bytes(out / f"{name}.json", text.encode() + b"\n")
    return {"ladders": len(scored)}


def resolve(
    entry: Baseline | Defended | Control, params: LaddersParams, random: bool = False
) -> Resolved:
    """Return all that the sets of one scored entry depend on, attacks in the order of params.yaml.

    The order breaks ties. `random` says whether its classifier is known to draw noise.
    """
    bare = bare_baseline(params.baselines, entry.classifier)
    replayed = {"classifier": bare, "transfer": SURROGATE}
    return Resolved(
        **usage(entry),
        ladder={
            m: dict(_attacks(entry, m, params.attacks, random)) for m in MODES if m in entry.ladder
        },
        replayed={m: of for m, of in replayed.items() if m in entry.ladder and of is not None},
        threat=params.threat,
        checks=params.checks,
    )


def _attacks(
    entry: Baseline | Defended | Control,
    mode: str,
    attacks: Mapping[str, AttackConfig],
    random: bool,
) -> Iterator[tuple[str, AttackConfig]]:
    """Yield the attacks of one rung by the names of their sets.

    Where papers replay sets against a purifier that the attack never asked, iterated attacks end in
    every way they can: on bare classifiers, on the rungs that replay their sets, and on `network`.
    """
    for name, attack in attacks.items():
        if name not in entry.ladder[mode]:
            continue
        if isinstance(entry, Baseline) or mode in UNASKED:
            yield from ((name + end, one) for end, one in attack.endings(random).items())
        else:
            yield name, attack
