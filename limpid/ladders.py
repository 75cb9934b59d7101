"""The ladders of `limpid.evaluate`: attacks on each rung, for what a defense turned out to be."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from components.attacks import L2, AttackConfig, Linf
from components.attacks.contract import MODES, REPLAYED
from components.models.defense import Defense, draws_noise
from pipelines.config.schema import explain, require_fit
from pipelines.errors import ConfigError

NAMES = ("standard", "quick")
# Draws that attacks on a random defense average over.
EOT, QUICK_EOT = 20, 4
PGD = {"kind": "pgd", "steps": 40, "step": 0.1, "restarts": 1, "random_start": True,
       "early_stop": True, "eot": 1}  # fmt: skip
APGD = {"steps": 100, "restarts": 1, "eot": 1}
ATTACKS: dict[str, dict[str, Any]] = {
    "pgd": PGD,
    "autoattack": {"kind": "autoattack", "version": "standard"},
    "pgd_eot": {**PGD, "eot": EOT},
    "autoattack_rand": {"kind": "autoattack", "version": "rand"},
    "a3": {"kind": "a3"},
    "pgd_quick": {**PGD, "steps": 20, "step": 0.2, "eot": QUICK_EOT},
    "dlr_quick": {"kind": "apgd_dlr", **APGD, "steps": 20, "eot": QUICK_EOT},
    "margin_quick": {"kind": "apgd_margin", **APGD, "steps": 20, "eot": QUICK_EOT},
}


@dataclass(frozen=True)
class Ladders:
    """The settings of attacks by name, and which of them run on which rung.

    `bare` is the ladder of the classifier alone, `defended` that of the purifier in front of it.
    """

    attacks: Mapping[str, AttackConfig]
    bare: Mapping[str, list[str]]
    defended: Mapping[str, list[str]]
    quick: bool


def choose(
    ladder: str | Mapping[str, Any], defense: Defense, classes: int, threat: Linf | L2
) -> Ladders:
    """Return the ladders for a defense; raise ConfigError for one that there is not.

    A mapping gives for each rung the attacks by name, each a name of `ATTACKS` or its settings as
    in params.yaml: {"full": {"mine": {"kind": "apgd_t", ...}}, "bpda": ["pgd"]}.
    """
    if isinstance(ladder, Mapping):
        return _own(ladder, defense, threat)
    if ladder not in NAMES:
        raise ConfigError(
            f"ladder is {ladder!r}; it may be {' or '.join(map(repr, NAMES))}, or a dict of rungs"
        )
    quick = ladder == "quick"
    random = draws_noise(defense.classifier)
    bare, through = (_names(quick, one, classes) for one in (random, defense.stochastic))
    rungs: dict[str, list[str]] = {"classifier": bare}
    if defense.differentiable:
        rungs |= {} if quick else {"bpda": through[:1]}
        rungs["full"] = through
    else:
        rungs |= {"bpda": through, "full": through[:1]}
    if defense.purifier is not None:
        rungs |= dict.fromkeys(defense.purifier.stand_ins, through)
    names = dict.fromkeys([*bare, *(name for some in rungs.values() for name in some)])
    attacks = {name: TypeAdapter(AttackConfig).validate_python(ATTACKS[name]) for name in names}
    replayed = [name for name in dict.fromkeys([*bare, *through]) if attacks[name].fits(random)]
    return Ladders(attacks, {"full": replayed}, rungs, quick)


def _names(quick: bool, random: bool, classes: int) -> list[str]:
    """Return the names of the attacks for what draws noise, or draws none."""
    if not random:
        return ["a3"] if quick else ["pgd", "autoattack"]
    margin = "dlr_quick" if classes > 3 else "margin_quick"
    return ["pgd_quick", margin] if quick else ["pgd_eot", "autoattack_rand"]


def _own(ladder: Mapping[str, Any], defense: Defense, threat: Linf | L2) -> Ladders:
    """Return a caller's ladder.

    The classifier alone meets all that it has on the rungs `classifier` and `full`, where that is
    for such a classifier.
    """
    random = draws_noise(defense.classifier)
    attacks: dict[str, AttackConfig] = {}
    rungs: dict[str, list[str]] = {}
    for rung, some in ladder.items():
        if rung not in MODES or rung == "transfer":
            known = ", ".join(mode for mode in MODES if mode != "transfer")
            raise ConfigError(f"the ladder has a rung {rung!r}; there are {known}")
        if not isinstance(some, Mapping | list | tuple):
            raise ConfigError(f"the ladder's rung {rung} is {some!r}; give a list of attacks")
        settings = some if isinstance(some, Mapping) else {name: name for name in some}
        for name, given in settings.items():
            found = _attack(f"{rung}/{name}", given)
            if attacks.setdefault(name, found) != found:
                first = next(other for other in rungs if name in rungs[other])
                raise ConfigError(
                    f"the ladder's attack {name} has other settings on the rung {rung} than on "
                    f"{first}; give each of the two a name of its own"
                )
        rungs[rung] = list(settings)
    full = [
        n for rung in (*REPLAYED, "full") for n in rungs.get(rung, []) if attacks[n].fits(random)
    ]
    try:
        require_fit("the ladder", rungs, attacks, defense.stochastic, threat, random)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not full and rungs.get("full"):
        raise ConfigError(
            f"the ladder has {', '.join(rungs['full'])} on the rung full, for a random defense "
            "only; it needs an attack that is for the classifier alone, too, which draws no noise: "
            "add one, like pgd, on the rung classifier"
        )
    if not full:
        raise ConfigError("the ladder needs an attack on the rung full")
    return Ladders(attacks, {"full": list(dict.fromkeys(full))}, rungs, quick=False)


def _attack(where: str, given: str | Mapping[str, Any]) -> AttackConfig:
    if isinstance(given, str) and given not in ATTACKS:
        raise ConfigError(
            f"the ladder names {where}; give its settings, or one of {', '.join(ATTACKS)}"
        )
    settings = ATTACKS[given] if isinstance(given, str) else given
    try:
        found: AttackConfig = TypeAdapter(AttackConfig).validate_python(settings)
    except ValidationError as error:
        raise ConfigError(f"the ladder's {where} is not valid: {explain(error)}") from None
    return found
