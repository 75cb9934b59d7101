"""Probes are demanded by name, and count only for what they were made of."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import failed

from components.attacks import L2, Attack, Linf
from components.attacks.gradient import Pgd
from components.data import image_set
from components.data.image_set import ImageSet
from components.data.shards import write_json
from components.models.checkpoints import ModelCard, build, save
from components.models.purifiers.controls import GaussianNoise
from components.probes import Finding, required
from pipelines.config.sections import Checks, Scoring
from pipelines.tasks import probing
from pipelines.tasks.entries import Entry, Plan, probes_of
from pipelines.tasks.subject import Subject

SHAPE, NAMES = (1, 8, 8), ("a", "b")
PGD = Pgd(kind="pgd", steps=9, step=0.1, restarts=1, random_start=True, early_stop=True, eot=1)
BOTH = {"probes_complete", "provenance/probes"}


@dataclass(frozen=True)
class Probed:
    """A scored entry, the plan, and the file of its probes, with its content as it was written."""

    entry: Entry
    plan: Plan
    content: dict[str, Any]

    def failed(self, entry: Entry | None = None, plan: Plan | None = None) -> set[str]:
        return set(failed(probes_of(entry or self.entry, plan or self.plan)))

    def write(self, content: object) -> None:
        """Store some content under its right digest, if it is of the right form."""
        if isinstance(content, dict) and set(content) >= {"facts", "findings"}:
            probing.write(self.entry.probes, content["facts"], content["findings"])
        else:
            write_json(self.entry.probes, content)


@pytest.fixture
def probed(tmp_path: Path) -> Probed:
    images = torch.randint(256, (6, *SHAPE), dtype=torch.uint8)
    test = ImageSet(images, torch.arange(6) % 2, torch.arange(6), NAMES)
    image_set.write(tmp_path / "test", test, 6)
    image_set.write(tmp_path / "other", replace(test, images=255 - images), 6)
    for name in ("model", "another"):
        card = ModelCard(
            format=1, family="classifier", model={"kind": "small_cnn", "width": 2},
            shape=list(SHAPE), class_names=list(NAMES), provenance={},
        )  # fmt: skip
        save(tmp_path / name, build(card).eval(), card)
    subject = Subject(tmp_path / "model", control=GaussianNoise(kind="gaussian_noise", sigma=0.1))
    attacks: dict[str, Attack] = {"full/pgd": PGD, "classifier/pgd": PGD}
    plan = Plan(
        threat=Linf(norm="linf", eps_255=51.0), seed=0, batch=5,
        scoring=Scoring(select_draws=4, score_draws=4, shown=2), val=tmp_path / "test",
        checks=Checks(images=32, thorough=False), test=tmp_path / "test",
        unseen=tmp_path / "model", surrogate=None,
    )  # fmt: skip
    sets = {name: tmp_path / name for name in (*attacks, "bpda/pgd")}
    for folder in sets.values():
        # Any finished folder will do: what counts is the digest of its bytes.
        image_set.write(folder, test, 6)
    del sets["bpda/pgd"]
    entry = Entry("control", "control", subject, tmp_path / "checks.json", sets, attacks)
    facts = probing.facts(
        subject, attacks, sets, plan.threat, plan.checks, plan.seed, plan.batch, plan.val, plan.test
    )
    names = [*required(["full"], True, True, False), "state_unchanged"]
    findings = [Finding(name=name, level="block", passed=True, detail="well") for name in names]
    probing.write(entry.probes, facts, findings)
    return Probed(entry, plan, json.loads(entry.probes.read_text()))


def test_all_probes_of_what_is_scored_pass(probed: Probed) -> None:
    findings = probes_of(probed.entry, probed.plan)
    assert failed(findings) == []
    names = [finding.name for finding in findings]
    assert names[-2:] == ["probes_complete", "provenance/probes"] and "logits" in names


def test_a_missing_empty_or_damaged_file_blocks(probed: Probed) -> None:
    for content in ([], {}, {"findings": []}, probed.content["findings"], "text"):
        probed.write(content)
        assert probed.failed() == BOTH
    probed.entry.probes.write_text("{")
    assert probed.failed() == BOTH
    probed.entry.probes.unlink()
    findings = [one for one in probes_of(probed.entry, probed.plan) if not one.passed]
    assert {one.name for one in findings} == BOTH
    assert all(one.level == "block" for one in findings)


def test_every_finding_is_demanded_by_name(probed: Probed) -> None:
    findings = probed.content["findings"]
    for row, finding in enumerate(findings):
        probed.write({**probed.content, "findings": findings[:row] + findings[row + 1 :]})
        assert probed.failed() == {"probes_complete"}, finding["name"]
    probed.write({**probed.content, "findings": [*findings, findings[0]]})
    assert probed.failed() == set()


def test_a_rung_that_was_not_probed_blocks(probed: Probed) -> None:
    sets = {**probed.entry.sets, "bpda/pgd": probed.entry.probes.parent / "bpda/pgd"}
    entry = replace(probed.entry, sets=sets, attacks={**probed.entry.attacks, "bpda/pgd": PGD})
    assert probed.failed(entry) == BOTH
    (found,) = [f for f in probes_of(entry, probed.plan) if f.name == "probes_complete"]
    assert "gradient_present/bpda" in found.detail and "gradient_present/full" not in found.detail


def test_the_thorough_probes_are_demanded_where_they_were_asked_for(probed: Probed) -> None:
    plan = replace(probed.plan, checks=Checks(images=32, thorough=True))
    assert probed.failed(plan=plan) == BOTH


def test_the_checks_of_plugins_are_demanded_where_they_were_asked_for(probed: Probed) -> None:
    # As it is once it was read: the plugin itself is not needed to demand it.
    asked = Checks.model_construct(images=32, thorough=False, plugins={"dark": "first 1.0"})
    plan = replace(probed.plan, checks=asked)
    assert probed.failed(plan=plan) == BOTH
    (found,) = [f for f in probes_of(probed.entry, plan) if f.name == "probes_complete"]
    assert "dark" in found.detail


def test_probes_of_something_else_block(probed: Probed, tmp_path: Path) -> None:
    entry, plan, subject = probed.entry, probed.plan, probed.entry.subject
    others = {
        "threat": replace(plan, threat=L2(norm="l2", eps_l2=1.0)),
        "radius": replace(plan, threat=Linf(norm="linf", eps_255=8.0)),
        "seed": replace(plan, seed=1),
        "fewer images": replace(plan, checks=Checks(images=33, thorough=False)),
        "test set": replace(plan, test=tmp_path / "other"),
    }
    for name, other in others.items():
        assert probed.failed(plan=other) == {"provenance/probes"}, name
    longer = {**entry.attacks, "full/pgd": PGD.model_copy(update={"steps": 10})}
    assert probed.failed(replace(entry, attacks=longer)) == {"provenance/probes"}
    sigma = GaussianNoise(kind="gaussian_noise", sigma=0.2)
    for changed in (
        replace(subject, control=sigma),
        replace(subject, classifier=tmp_path / "another"),
    ):
        assert probed.failed(replace(entry, subject=changed)) == {"provenance/probes"}


def test_a_set_that_changed_after_the_probes_blocks(probed: Probed) -> None:
    test = image_set.read(probed.plan.test)
    image_set.write(probed.entry.sets["classifier/pgd"], replace(test, images=255 - test.images), 6)
    assert probed.failed() == set(), "replayed sets are not this defense's own"
    image_set.write(probed.entry.sets["full/pgd"], replace(test, images=255 - test.images), 6)
    assert probed.failed() == {"provenance/probes"}


@pytest.mark.parametrize("change", [{"passed": True}, {"level": "warn"}, {"figures": {"n": 1.0}}])
def test_a_finding_that_was_edited_by_hand_counts_for_nothing(
    change: dict[str, Any], probed: Probed
) -> None:
    first = {**probed.content["findings"][0], "passed": False}
    findings = [first, *probed.content["findings"][1:]]
    probed.write({**probed.content, "findings": findings})
    assert probed.failed() == {first["name"]}
    stored = json.loads(probed.entry.probes.read_text())
    stored["findings"][0] |= change
    write_json(probed.entry.probes, stored)
    assert probed.failed() == BOTH


@pytest.mark.parametrize("fact", ["defense", "code", "classifier", "purifier", "data"])
def test_every_digest_is_compared(fact: str, probed: Probed) -> None:
    assert len(probed.content["facts"][fact]) == 64
    probed.write({**probed.content, "facts": {**probed.content["facts"], fact: "0" * 64}})
    assert probed.failed() == {"provenance/probes"}
    facts = {key: value for key, value in probed.content["facts"].items() if key != fact}
    probed.write({**probed.content, "facts": facts})
    assert probed.failed() == {"provenance/probes"}
