"""Ladders are resolved entry by entry, so that DVC makes again what a change is about."""

import copy
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import project
import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML

from components.attacks import L2, Linf
from pipelines.config.schema import Params
from pipelines.config.sections import Resolved
from pipelines.stages.resolve_ladders import LaddersParams, resolve

WIDER = {"norm": "linf", "eps_255": 102.0}
FLIP = {"kind": "flip", "at": 0.5, "steps": 2, "candidates": 2, "eot": 1}


def resolved(name: str, **changes: Any) -> Resolved:
    params = Params.model_validate({**project.base(), **changes})
    return resolve(params.scored[name], LaddersParams.of(params, None))


def test_sets_of_a_bare_classifier_end_in_every_way_and_are_replayed_so() -> None:
    """An iterated attack ends with its last iterate and, under `_stop`, at its first success."""
    bare, defense = resolved("none"), resolved("student_grey")
    assert list(bare.ladder["full"]) == [
        "noise", "fgsm", "bim", "bim_stop", "pgd", "pgd_stop", "cw", "apgd_ce", "apgd_dlr", "apgd_t"
    ]  # fmt: skip
    ends = {name: getattr(one, "early_stop", None) for name, one in bare.ladder["full"].items()}
    assert (ends["pgd"], ends["pgd_stop"], ends["bim"], ends["bim_stop"]) == (False, True) * 2
    grey = defense.ladder["classifier"]
    assert {"pgd", "pgd_stop", "bim", "bim_stop"} <= set(grey)
    assert all(bare.ladder["full"][name] == attack for name, attack in grey.items())
    assert defense.replayed == {"classifier": "none"} and bare.replayed == {}
    # An attacker who sees through the purifier keeps the best that was found.
    assert "pgd_stop" not in defense.ladder["full"]
    assert defense.ladder["full"]["pgd"].early_stop


def test_no_attack_stops_on_a_random_classifier_so_each_ends_in_one_way() -> None:
    params = Params.model_validate(project.base())
    for name, rung in (("none", "full"), ("student_grey", "classifier")):
        found = resolve(params.scored[name], LaddersParams.of(params, None), random=True)
        assert found.ladder[rung] == {one: params.attacks[one] for one in found.ladder[rung]}
        assert {"pgd", "bim"} <= set(found.ladder[rung])


def test_sets_stand_in_the_order_of_the_attacks() -> None:
    """Of two equal attacks the first one counts for an image."""
    attacks = project.base()["attacks"]
    turned = resolved("student_grey", attacks=dict(reversed(attacks.items())))
    names = list(turned.ladder["full"])
    assert names == list(reversed(resolved("student_grey").ladder["full"]))
    again = Resolved.model_validate_json(turned.model_dump_json())
    assert list(again.ladder["full"]) == names


def test_an_entry_knows_only_the_attacks_of_its_ladder() -> None:
    attacks = project.base()["attacks"]
    before = {name: resolved(name) for name in ("none", "student_grey", "atop", "bit_depth")}
    unused = {**attacks, "later": {"kind": "noise", "tries": 3}}
    for name, one in before.items():
        assert resolved(name, attacks=unused) == one
    longer = {**attacks, "cw": {**attacks["cw"], "steps": 41}}
    changed = {name for name, one in before.items() if resolved(name, attacks=longer) != one}
    assert changed == {"none", "student_grey"}


def test_a_defense_replays_the_sets_of_its_own_classifier() -> None:
    defenses = project.base()["defenses"]
    hardened = {**defenses["student_grey"], "classifier": "robust"}
    found = resolved("hardened", defenses={**defenses, "hardened": hardened})
    assert found.classifier == "robust"
    assert found.replayed == {"classifier": "adversarial_training"}


def test_an_attack_keeps_the_threat_that_is_its_own() -> None:
    attacks = project.base()["attacks"]
    euclid = {**attacks["apgd_ce"], "threat": {"norm": "l2", "eps_l2": 1.5}}
    found = resolved("student_grey", attacks={**attacks, "apgd_ce": euclid})
    one = found.ladder["full"]["apgd_ce"]
    assert one.within(found.threat) == L2(norm="l2", eps_l2=1.5)
    assert one.region(found.threat) == "l2 1.5"
    assert found.ladder["full"]["pgd"].within(found.threat) == Linf(norm="linf", eps_255=51.0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda p: p["defenses"]["atop"].update(classifier="unseen"),
            "atop stands in front of unseen, which is not scored alone: add a baseline",
        ),
        (
            lambda p: p["baselines"].update(twice=p["baselines"]["none"]),
            "baselines.twice and baselines.none score the same classifier, standard: keep one",
        ),
        (
            lambda p: p["baselines"]["none"]["ladder"].update(full=["pgd", "fgsm"]),
            "the ladder of student_grey has noise, and no noise attacks its classifier alone",
        ),
        (
            lambda p: p["attacks"].update(pgd_stop=p["attacks"]["pgd"]),
            "attacks.pgd_stop has the name under which pgd is stored where it stops",
        ),
        (
            lambda p: p["attacks"]["cw"].update(threat=WIDER),
            "cw_l2 minimises a distance or has a bound of its own: no threat",
        ),
        (
            lambda p: (
                p.update(threat={"norm": "l2", "eps_l2": 1.0}),
                p["attacks"].update(flip=FLIP),
                p["controls"]["bit_depth"]["ladder"].update(bpda=["flip"]),
            ),
            "flip on the rung bpda: flip is for linf threats only, not l2",
        ),
    ],
)
def test_ladders_that_compare_unlike_things_are_refused(
    change: Callable[[dict[str, Any]], object], sentence: str
) -> None:
    params = copy.deepcopy(project.base())
    change(params)
    with pytest.raises(ValueError, match=sentence):
        Params.model_validate(params)


# Which stages DVC makes again. Their outputs are stood in for by files: only DVC's graph is asked.


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which DVC holds every stage for finished."""
    folder = project.copy_to(tmp_path_factory.mktemp("finished") / "project")
    params = project.tiny()
    # A classifier that is trained and waits for a baseline.
    params["classifiers"]["robust"] = project.base()["classifiers"]["robust"]
    params["classifiers"]["robust"]["training"] |= {"epochs": 1}
    project.write_params(folder, params)
    commit(folder)
    return folder


def commit(folder: Path) -> None:
    project.resolve(folder)
    with chdir(folder), Repo() as repo:
        for out in repo.index.outs:
            path = Path(out.fs_path)
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(path.name)
        repo.commit(force=True)


def again(folder: Path, change: Callable[[dict[str, Any]], object]) -> set[str]:
    """Return the stages that DVC makes again after a change of params.yaml, by their inputs.

    What they write decides whether those behind them run, too.
    """
    before = (folder / "params.yaml").read_text()
    params = copy.deepcopy(YAML(typ="safe", pure=True).load(before))
    change(params)
    project.write_params(folder, params)
    try:
        project.resolve(folder)
        with chdir(folder), Repo() as repo:
            return set(repo.status()) - {"resolve_ladders"}
    finally:
        (folder / "params.yaml").write_text(before)
        project.resolve(folder)


def test_an_attack_that_nobody_runs_makes_nothing_again(finished: Path) -> None:
    later = {"kind": "noise", "tries": 3}
    assert again(finished, lambda p: p["attacks"].update(later=later)) == set()


def test_a_setting_makes_those_entries_again_that_run_the_attack(finished: Path) -> None:
    """`evaluate` runs behind them, since it reads their ladders and sets."""
    found = again(finished, lambda p: p["attacks"]["square"].update(queries=150))
    assert found == {"generate_controls@bit_depth", "evaluate"}
    found = again(finished, lambda p: p["attacks"]["apgd_ce"].update(threat=WIDER))
    assert found == {
        "evaluate",
        "generate_baseline@none",
        *(f"generate_adversarial@{name}" for name in project.tiny()["defenses"]),
    }


def test_an_attack_added_to_one_ladder_makes_that_entry_again(finished: Path) -> None:
    def change(params: dict[str, Any]) -> None:
        params["attacks"]["apgd_wide"] = {**params["attacks"]["apgd_ce"], "threat": WIDER}
        ladder = copy.deepcopy(params["defenses"]["student_grey"]["ladder"])
        ladder["full"].append("apgd_wide")
        params["defenses"]["student_grey"]["ladder"] = ladder

    found = again(finished, change)
    assert found == {"generate_adversarial@student_grey", "evaluate"}


def test_the_radius_of_a_test_retrains_nothing(finished: Path) -> None:
    found = again(finished, lambda p: p["threat"].update(eps_255=25.5))
    scored = Params.model_validate(project.tiny())
    assert found == {
        "evaluate",
        *(f"generate_baseline@{name}" for name in scored.baselines),
        *(f"generate_adversarial@{name}" for name in scored.defenses),
        *(f"generate_controls@{name}" for name in scored.controls),
    }
    found = again(finished, lambda p: p["training_threat"].update(eps_255=25.5))
    assert not any(name.startswith("generate") for name in found) and "evaluate" not in found
    assert {"craft_training_set", "train_classifier@standard"} <= found


def test_a_defense_on_another_classifier_makes_its_own_rows(finished: Path) -> None:
    """The classifier is there, and so is the purifier."""

    def change(params: dict[str, Any]) -> None:
        params["baselines"]["hardened"] = {**params["baselines"]["none"], "classifier": "robust"}
        params["defenses"]["behind"] = {
            **params["defenses"]["student_grey"], "classifier": "robust"
        }  # fmt: skip

    found = again(finished, change)
    assert found == {"generate_baseline@hardened", "generate_adversarial@behind", "evaluate"}


def test_a_classifier_that_is_added_is_trained_and_nothing_else(finished: Path) -> None:
    def change(params: dict[str, Any]) -> None:
        params["classifiers"]["later"] = params["classifiers"]["unseen"]

    assert again(finished, change) == {"train_classifier@later"}
