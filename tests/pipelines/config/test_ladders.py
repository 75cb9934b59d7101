"""The ladders of every shipped profile hold what a claim takes."""

from collections.abc import Sequence

import pytest
from project import ROOT
from ruamel.yaml import YAML

from components.attacks import Attack
from components.attacks.contract import UNASKED
from components.checks.scores import strong_enough, without_gradients
from components.models.purifiers import Purifier
from pipelines.commands import configure
from pipelines.config.schema import Params
from pipelines.config.sections import Ladder

PROFILES = sorted(path.stem for path in (ROOT / "profiles").glob("*.yaml"))
SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
CLASSES = 10


@pytest.fixture(scope="module")
def composed() -> dict[str, Params]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        texts = {name: configure.compose(name, []) for name in PROFILES}
    load = YAML(typ="safe", pure=True).load
    return {name: Params.model_validate(load(text)) for name, text in texts.items()}


def bounded(params: Params, ladder: Ladder) -> dict[str, list[Attack]]:
    attacks = {mode: [params.attacks[name] for name in names] for mode, names in ladder.items()}
    return {mode: [one for one in some if one.bounded] for mode, some in attacks.items()}


def missing(params: Params, ladder: Ladder, stand_ins: Sequence[str], usable: bool) -> str:
    found = strong_enough(bounded(params, ladder), stand_ins, usable, CLASSES)
    return "" if found.passed else found.detail


@pytest.mark.parametrize("profile", PROFILES)
def test_every_baseline_meets_strong_attacks(profile: str, composed: dict[str, Params]) -> None:
    params = composed[profile]
    lacking = {n: missing(params, one.ladder, (), True) for n, one in params.baselines.items()}
    assert not any(lacking.values()), lacking


def behind(params: Params, name: str) -> Purifier:
    """Return the purifier of a defense or control, untrained."""
    shape = SHAPES[params.data.kind]
    if name in params.controls:
        control: Purifier = params.controls[name].purifier.build(shape)
        return control
    one = params.defenses[name]
    network = params.model_of(one.model).build(shape)
    return network if one.inference is None else one.inference.wrap(network)


@pytest.mark.parametrize("profile", PROFILES)
def test_what_has_no_gradient_meets_a_search_without_gradients(
    profile: str, composed: dict[str, Params]
) -> None:
    params = composed[profile]
    lacking = {}
    for name in (*params.defenses, *params.controls):
        purifier, met = behind(params, name), bounded(params, params.scored[name].ladder)
        seen = {mode: attacks for mode, attacks in met.items() if mode not in UNASKED}
        found = without_gradients(seen, [], purifier.stochastic, purifier.differentiable)
        lacking[name] = "" if found.passed else found.detail
    assert lacking and not any(lacking.values()), lacking


@pytest.mark.parametrize("profile", PROFILES)
def test_every_defense_meets_strong_attacks(profile: str, composed: dict[str, Params]) -> None:
    params = composed[profile]
    lacking = {}
    for name, one in params.defenses.items():
        purifier = behind(params, name)
        args = purifier.stand_ins, purifier.differentiable
        lacking[name] = missing(params, one.ladder, *args)
    assert lacking and not any(lacking.values()), lacking


def test_the_random_defense_of_the_demo_is_attacked_on_its_margin_over_its_noise(
    composed: dict[str, Params],
) -> None:
    params = composed["digits"]
    attack = params.attacks["apgd_dlr"]
    assert "apgd_dlr" in params.defenses["atop"].ladder["full"]
    assert attack.kind == "apgd_dlr" and attack.eot == 4


def test_the_ladder_of_before_is_not_enough(composed: dict[str, Params]) -> None:
    """The demo's random defense met PGD and APGD on the cross-entropy alone."""
    params = composed["digits"]
    before = {"bpda": ["pgd"], "full": ["fgsm", "pgd", "apgd_ce"]}
    assert "margin on full" in missing(params, before, (), True)
