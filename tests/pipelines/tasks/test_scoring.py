"""Scoring in parts: no result depends on how many parts the test set has."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from small_scoring import (
    PGD,
    RUNGS,
    SHAPE,
    THREAT,
    VALIDATION,
    N,
    made,
    rewrite,
    scored_together,
    sound_sets,
)
from torch import Tensor

from components.attacks import Linf, craft
from components.attacks.sets import read_crafted, write_crafted, write_crafted_manifest
from components.checks.sets import in_levels, same_answer
from components.config import Config
from components.data import image_set, shards
from components.data.draws import NoiseStream
from components.data.shards import shard_name
from components.evaluation.detection import detection
from components.models.purifiers import Purifier
from components.models.purifiers.contract import StandIn
from components.models.purifiers.controls import GaussianNoise, Identity, Threshold
from pipelines.tasks.entries import Entry, Plan, check_set, other_baselines
from pipelines.tasks.scoring import Result, score_sets
from pipelines.tasks.subject import Subject
from pipelines.tasks.summary import summary


def scored(root: Path, control: Config, rows: int) -> Result:
    """Score a control whose test set has parts of `rows` images, all parts one by one."""
    entry, plan = made(root, control, rows)
    (result,) = scored_together([entry], plan)
    assert all(f.passed for f in result.findings), [f for f in result.findings if not f.passed]
    return result


def plain(value: Any) -> Any:
    """Return a result as values that can be compared, without its pictures."""
    if isinstance(value, Result):
        return {k: plain(v) for k, v in vars(replace(value, panels={}, detector=None)).items()}
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    return plain(vars(value)) if hasattr(value, "__dict__") else value


def test_agreement_is_with_the_prediction_of_the_bare_classifier_on_the_clean_image(
    tmp_path: Path,
) -> None:
    entry, plan = made(tmp_path, Threshold(kind="threshold", at=0.5), 5)
    (result,) = scored_together([entry], plan)
    images, defense = image_set.read(plan.test), entry.subject.defense()
    original = Subject(entry.subject.classifier).defense()(images.pixels()).argmax(1)
    attacked = {name: read_crafted(folder).images for name, folder in entry.sets.items()}
    assert set(result.agreed) == {"clean", *attacked}
    for name, x in {"clean": images.pixels(), **attacked}.items():
        agreed = (defense(x).argmax(1) == original).double()
        assert result.agreed[name].tolist() == agreed.tolist()
        assert result.agreed[name].mean() != result.scores[name].accuracy().mean()
    written = summary(entry, result, plan, images)
    assert written.clean.agreement == result.agreed["clean"].mean()
    assert written.attacks["bpda/pgd"].agreement == result.agreed["bpda/pgd"].mean()


def test_of_a_random_defense_agreement_is_the_mean_over_the_draws(tmp_path: Path) -> None:
    """The labels are those of the classifier, so to agree is to be right."""
    noise = GaussianNoise(kind="gaussian_noise", sigma=0.2)
    entry, plan = made(tmp_path, noise, N, right=True)
    (result,) = scored_together([entry], plan)
    for name, score in result.scores.items():
        assert result.agreed[name].tolist() == score.accuracy().tolist()
    assert {0.25, 0.5, 0.75} & set(result.agreed["full/pgd"].tolist())


@pytest.mark.parametrize(
    "control",
    [Threshold(kind="threshold", at=0.5), GaussianNoise(kind="gaussian_noise", sigma=0.2)],
    ids=lambda control: str(control.kind),
)
def test_more_parts_than_validation_images_give_the_result_of_one_part(
    control: Config, tmp_path: Path
) -> None:
    """Of twelve parts, nine have no validation image; a threshold changes nothing in the first."""
    whole, parted = scored(tmp_path / "one", control, N), scored(tmp_path / "many", control, 1)
    assert set(whole.scores) == {"clean", *RUNGS}, "a set was left out"
    assert plain(parted) == plain(whole)
    assert whole.detector is not None and parted.detector is not None
    assert len(parted.detector.validation) == VALIDATION
    figures = [detection(r.detector, r.inside, r.scores) for r in (whole, parted) if r.detector]
    assert figures[0] == figures[1]


def test_the_draws_of_a_random_defense_are_counted_where_attacks_average_over_them(
    tmp_path: Path,
) -> None:
    """Known noise is not averaged over, and a bare classifier has none."""
    rungs = ("classifier/pgd", "full/pgd", "fixed_noise/pgd")
    noise = GaussianNoise(kind="gaussian_noise", sigma=0.2)
    fixed = PGD.effort(10, stochastic=False)
    entry, plan = made(tmp_path, noise, N, rungs, fooled=False, cost=fixed)
    findings = [f for name in rungs for f in check_set(entry, name, plan, "cpu").findings]
    short = [f.name for f in findings if f.name.startswith("effort") and not f.passed]
    assert short == ["effort/full/pgd"]


class Remembering(Purifier):
    """Takes an image for the first near one at levels k/255 that this process was asked about."""

    asked: ClassVar[list[Tensor]] = []

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        seen = x.detach()
        levels = (255 * seen).round() / 255
        self.asked.append(seen[(seen == levels).flatten(1).all(1)])
        # An image that is near none is taken for itself.
        known = torch.cat([*self.asked, seen])
        far = torch.cdist(seen.flatten(1), known.flatten(1), p=torch.inf)
        place = torch.arange(len(known)).expand_as(far)
        first = place.where(far <= 1.01 * THREAT.eps, len(known)).amin(1)
        return 0.02 * x + 0.98 * known[first]


class Remembers(Config):
    kind: Literal["remembers"]

    def build(self, shape: tuple[int, int, int]) -> Purifier:
        return Remembering()


def crafted_in_another_process(entry: Entry, plan: Plan) -> None:
    """Put what PGD finds against the entry in the place of its first set, and forget the rest."""
    Remembering.asked.clear()
    images = image_set.read(plan.test)
    found = craft(PGD, entry.subject.defense(), "full", images, THREAT, 0, 5)
    Remembering.asked.clear()
    rewrite(entry.sets[RUNGS[0]], found)


@pytest.mark.parametrize("rows", [N, 4])
def test_a_defense_that_remembers_its_questions_is_caught(rows: int, tmp_path: Path) -> None:
    """In an attack it is asked about clean images first; so it must not be in the scoring."""
    entry, plan = made(tmp_path, Remembers(kind="remembers"), rows)
    crafted_in_another_process(entry, plan)
    first, second = scored_together([entry, replace(entry, name="again")], plan)
    for result in (first, second):
        assert result.answers[RUNGS[0]].right.sum() > 0
        score = result.scores[RUNGS[0]]
        found = same_answer(RUNGS[0], result.answers[RUNGS[0]], score.score, 1, rough=False)
        assert not found.passed, found.detail


class Negative(Purifier):
    """Leaves images as they are, and claims to come from a network whose pass is the negative."""

    stand_ins = ("direct",)

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        return x.clone()

    def stand_in(self, kind: StandIn, x: Tensor, stream: NoiseStream | None) -> Tensor:
        return 1 - x


class Negatives(Config):
    kind: Literal["negatives"]

    def build(self, shape: tuple[int, int, int]) -> Purifier:
        return Negative()


def test_what_an_attack_saw_of_one_pass_is_not_held_against_the_defense(tmp_path: Path) -> None:
    """The attack fools the pass at once and stops; the defense is right about what it left."""
    entry, plan = made(tmp_path, Negatives(kind="negatives"), N, ("network/pgd",), right=True)
    stops = PGD.model_copy(update={"steps": 3, "early_stop": True})
    entry = replace(entry, attacks={"network/pgd": stops})
    images = image_set.read(plan.test)
    found = craft(stops, entry.subject.defense(), "network", images, THREAT, 0, 5)
    saved = found.fooled & ~found.success
    assert saved.any() and found.forward[saved].max() < stops.effort(2, False).forward
    folder = entry.sets["network/pgd"]
    facts = {**shards.read_manifest(folder), "attack": stops.model_dump(mode="json")}
    write_crafted(folder / shard_name(0), found)
    write_crafted_manifest(folder, SHAPE, facts)
    (result,) = scored_together([entry], plan)
    scored = summary(entry, result, plan, images)
    findings = {finding.name: finding for finding in scored.checks.findings}
    assert findings["effort/network/pgd"].passed and findings["provenance/network/pgd"].passed
    assert "same_answer/network/pgd" not in findings and not result.answers
    assert scored.white_box is None and "network" in scored.rungs


def test_an_example_is_rounded_where_an_image_withstands(tmp_path: Path) -> None:
    """The clean image ties with its examples there, and rounding does not change it."""
    Remembering.asked.clear()
    entry, plan = made(tmp_path, Remembers(kind="remembers"), N)
    (result,) = scored_together([entry], plan)
    withstood = np.min([score.score for score in result.scores.values()], axis=0) > 0
    assert withstood.sum() > 1
    test = image_set.read(plan.test)
    last = in_levels(read_crafted(entry.sets[RUNGS[-1]]).images, test.pixels(), THREAT)
    asked = torch.cat(Remembering.asked).flatten(1)
    far = torch.cdist(last.flatten(1), asked, p=torch.inf).amin(1)
    assert far[torch.from_numpy(withstood)].max() < 1e-6


def attacked_baseline(root: Path, plan: Plan, attacked: Subject, threat: Linf = THREAT) -> Entry:
    """Attack a copy of the classifier of `made`; the set names the models of `attacked`."""
    if not (root / "copy").exists():
        shutil.copytree(root / "model", root / "copy")
    images = image_set.read(plan.test)
    crafted = craft(PGD, Subject(root / "copy").defense(), "full", images, threat, 0, 5)
    folder = root / "examples"
    write_crafted(folder / shard_name(0), crafted)
    facts: dict[str, Any] = {
        **attacked.facts(), "data": shards.fingerprint(plan.test), "seed": 0, "mode": "full",
        "attack": PGD.model_dump(mode="json"), "threat": threat.model_dump(mode="json"),
    }  # fmt: skip
    write_crafted_manifest(folder, SHAPE, facts)
    sets, attacks = {RUNGS[0]: folder}, {RUNGS[0]: PGD}
    return Entry("strong", "baseline", attacked, folder / "checks.json", sets, attacks)


@pytest.mark.parametrize("rows", [N, 5])
def test_examples_of_another_classifier_show_what_weak_attacks_left(
    rows: int, tmp_path: Path
) -> None:
    """The own sets are random; they cost what an attack costs, and find next to nothing."""
    entry, plan = made(tmp_path, Identity(kind="identity"), rows, right=True)
    images = image_set.read(plan.test)
    strong = attacked_baseline(tmp_path, plan, Subject(tmp_path / "copy"))
    (alone,) = scored_together([entry], plan)
    (result,) = scored_together([entry], replace(plan, baselines=[strong]))
    without, found = (summary(entry, one, plan, images) for one in (alone, result))
    assert "transfer_attack/strong" in found.checks.blocking_failed
    assert not [f for f in without.checks.findings if f.check == "transfer_attack"]
    nothing = replace(plan, baselines=[replace(strong, sets={})])
    (left,) = scored_together([entry], nothing)
    assert "transfer_attack/strong" in summary(entry, left, nothing, images).checks.warnings
    # Nothing else is different: these examples are no rung, and carry no image.
    assert found.headline.accuracy == without.headline.accuracy > 0.5
    assert found.rungs == without.rungs and found.attacks == without.attacks
    assert plain(replace(result, transferred={})) == plain(alone)


def test_only_sound_sets_of_another_classifier_are_tried(tmp_path: Path) -> None:
    entry, plan = made(tmp_path, Identity(kind="identity"), N, right=True)

    def tried(baseline: Entry) -> list[str]:
        tried_on = replace(plan, baselines=[baseline])
        sound = sound_sets([entry, baseline], tried_on)
        found = score_sets(entry, tried_on, sound, 0, "cpu")
        assert set(found.counted) == set(RUNGS)
        return list(found.transferred)

    other = Subject(tmp_path / "copy")
    strong = attacked_baseline(tmp_path, plan, other)
    assert tried(strong) == ["strong"]
    blind = {
        "sets": {"fixed_noise/pgd": strong.sets[RUNGS[0]]},
        "attacks": {"fixed_noise/pgd": PGD},
    }
    assert tried(replace(strong, **blind)) == []
    # Those against the own classifier are tried, too, unless the rung `classifier` has them.
    bare = Subject(entry.subject.classifier)
    own = replace(plan, baselines=[replace(strong, subject=bare)])
    assert other_baselines(entry, own) == own.baselines
    behind = {**entry.sets, "classifier/pgd": strong.sets[RUNGS[0]]}
    assert other_baselines(replace(entry, sets=behind), own) == []
    assert other_baselines(replace(entry, subject=bare), own) == []
    assert tried(attacked_baseline(tmp_path, plan, other, THREAT.scaled(2))) == []
    larger = attacked_baseline(tmp_path, plan, other)
    moved = read_crafted(larger.sets[RUNGS[0]])
    outside = replace(moved, images=(moved.images + 0.3).clamp(0, 1))
    rewrite(larger.sets[RUNGS[0]], outside)
    assert tried(larger) == []
