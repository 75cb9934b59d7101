"""Every probe fails on the fault that is planted for it, and passes on an honest small defense."""

from collections.abc import Mapping
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from toy_networks import Blurred, Detached, Noisy, Rounded
from toys import LINF, failed, head

from components import probes
from components.attacks import craft
from components.attacks.gradient import Noise
from components.data.draws import NoiseStream
from components.data.image_set import ImageSet
from components.models.accuracy import count_correct
from components.models.classifiers import Classifier
from components.models.defense import Defense, Mode
from components.models.identity import state_digest
from components.models.purifiers import Purifier
from components.models.purifiers.controls import BitDepth
from components.probes import Finding, answers, models
from components.probes.bench import Bench


class SecretlyNoisy(Noisy):
    """Random, declared deterministic."""

    stochastic = False

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        return (x + 0.05 * torch.randn_like(x)).clamp(0, 1)


class SecretlyFixed(Blurred):
    """Deterministic, declared random."""

    stochastic = True


class Often(Purifier):
    """Cuts the gradient of the brightest tenth of the images only."""

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        bright = x.flatten(1).sum(1) > x.flatten(1).sum(1).quantile(0.9)
        return torch.where(bright[:, None, None, None], x.detach(), x)


class Nan(Purifier):
    """The gradient is NaN, the value is not."""

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        return x + 0 * (x - x).sqrt()


class Head(nn.Module):
    """The shared classifier with some function of its logits."""

    def __init__(self, classifier: Classifier, kind: str) -> None:
        super().__init__()
        self.classifier, self.kind = classifier, kind

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(x)
        if self.kind == "softmax":
            return logits.softmax(1)
        if self.kind == "constant":
            return 0 * logits + torch.arange(10.0)
        if self.kind == "reversed":
            return 2 * logits.detach() - logits
        if self.kind == "rippled":
            return logits + 6 * (1000 * x.flatten(1).cumsum(1)[:, 20:30]).sin()
        if self.kind == "plateaus":
            return logits + 60 * nn.functional.one_hot(logits.argmax(1), 10)
        if self.kind == "nan":
            return logits * torch.nan
        if self.kind == "one nan":
            return torch.where(torch.arange(10) == 3, torch.nan, logits)
        raise AssertionError(self.kind)


def probe(
    data: ImageSet, classifier: nn.Module, purifier: Purifier | None, modes: tuple[Mode, ...]
) -> list[Finding]:
    return run(Defense(classifier, purifier).freeze(), modes, data)


def run(defense: Defense, modes: tuple[Mode, ...], data: ImageSet) -> list[Finding]:
    """Probe a defense on 200 images, beside 100 others."""
    test, val = head(data, 200), data[torch.arange(200, 300)]
    return probes.probe(defense, modes, test, LINF, 0, 64, 4, 50, None, val, thorough=False)


def test_a_check_from_elsewhere_is_asked_like_any_other(
    classifier: Classifier, test_set: ImageSet
) -> None:
    """It gets the images that our own probes look at, and its finding has its name."""
    defense = Defense(classifier, None).freeze()
    found = Finding(name="anything", level="block", passed=False, detail="It is dark.")
    benches: list[Bench] = []

    def ask(name: str, answer: object) -> list[Finding]:
        def check(bench: Bench) -> Finding:
            benches.append(bench)
            return answer  # type: ignore[return-value]

        data = head(test_set, 200)
        return probes.probe(
            defense, (), data, LINF, 0, 64, 4, 50, None, None, thorough=False,
            others={name: check},
        )  # fmt: skip

    *ours, last = ask("too_dark", found)
    assert last == found.model_copy(update={"name": "too_dark"}) and "logits" in [
        one.name for one in ours
    ]
    assert benches[0].x.shape[0] == 64 and benches[0].defense is defense
    for name, answer, reason in (
        ("logits", found, "the check logits of a plugin has the name of one of ours: rename it"),
        ("too_dark", True, "the check too_dark of a plugin returned True, which is no Finding"),
    ):
        with pytest.raises(ValueError, match=reason):
            ask(name, answer)


FULL: tuple[Mode, ...] = ("full",)
BOTH: tuple[Mode, ...] = ("full", "bpda")


# Honest defenses


@pytest.mark.parametrize("purifier", [None, Blurred(), Noisy(0.05)], ids=["none", "soft", "noisy"])
def test_an_honest_defense_passes_every_probe(
    purifier: Purifier | None, classifier: Classifier, test_set: ImageSet
) -> None:
    modes = FULL if purifier is None else BOTH
    findings = probe(test_set, classifier, purifier, modes)
    names = [finding.name for finding in findings]
    assert set(names) == set(probes.required(modes, isinstance(purifier, Noisy), True, False))
    assert names == [
        "input_convention", "logits", "randomness_declared", "one_answer", "looks_around",
        *(f"{name}/{mode}" for mode in modes for name in ("gradient_present", "loss_alive")),
        "gradient_honest/full", "gradient_pays/full", "gradient_adds_up/full",
        *(["eot_agreement"] if isinstance(purifier, Noisy) else []),
        "stored_attacks", "blind_attack", "remembered", "unbounded_by_gradient", "unbounded",
    ]  # fmt: skip
    assert failed(findings) == failed(findings, "warn") == []
    assert all(finding.detail for finding in findings)


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        ("honest", None), ("plateaus", "gradient_adds_up"), ("reversed", "gradient_honest"),
        ("rippled", "gradient_pays"),
    ],
)  # fmt: skip
def test_behind_stand_ins_the_classifier_is_asked_in_every_mode(
    kind: str, check: str | None, classifier: Classifier, test_set: ImageSet
) -> None:
    modes: tuple[Mode, ...] = ("bpda", "soft")
    behind = classifier if kind == "honest" else Head(classifier, kind)
    defense = Defense(behind, BitDepth(kind="bit_depth", bits=3).build(test_set.shape)).freeze()
    findings = run(defense, modes, test_set)
    names = [finding.name for finding in findings]
    assert set(names) == set(probes.required(modes, False, False, False))
    assert {f"{check}/{mode}" for check in probes.LEADING for mode in modes} <= set(names)
    wrong = failed(findings, "warn")
    if check:
        assert {f"{check}/{mode}" for mode in modes} <= set(wrong)
    else:
        assert not [name for name in wrong if name.partition("/")[0] in probes.LEADING]


def test_without_a_stand_in_the_identity_must_pay(
    classifier: Classifier, test_set: ImageSet
) -> None:
    """Black and white pixels are far from the grey ones whose gradient the identity takes."""
    for levels, fails in ((1, True), (15, False)):
        findings = run(Defense(classifier, Rounded(levels)).freeze(), ("bpda",), test_set)
        assert ("gradient_pays/bpda" in failed(findings, "warn")) == fails


def test_where_no_image_is_right_nothing_breaks(classifier: Classifier, test_set: ImageSet) -> None:
    class Viewed(nn.Module):
        """Takes no batch without images."""

        def __init__(self) -> None:
            super().__init__()
            self.classifier = classifier

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.classifier(x.reshape(x.size(0), -1).reshape(x.shape)).roll(1, 1)
            return logits

    findings = run(Defense(Viewed(), None).freeze(), FULL, test_set)
    found = {finding.name: finding.detail for finding in findings}
    assert "too few" in found["gradient_adds_up/full"]


def test_probing_changes_nothing_and_repeats(classifier: Classifier, test_set: ImageSet) -> None:
    defense = Defense(classifier, Noisy(0.05)).freeze()
    before, stream = state_digest(defense), torch.get_rng_state()
    first = run(defense, BOTH, test_set)
    assert state_digest(defense) == before and not defense.training
    assert torch.equal(torch.get_rng_state(), stream)
    assert run(defense, BOTH, test_set) == first


# Gradients


@pytest.mark.parametrize(
    "purifier",
    [Rounded(7, differentiable=True), Detached(), Often(), Nan()],
    ids=lambda p: type(p).__name__,
)
def test_a_zero_or_non_finite_gradient_is_reported(
    purifier: Purifier, classifier: Classifier, test_set: ImageSet
) -> None:
    findings = probe(test_set, classifier, purifier, BOTH)
    assert "gradient_present/full" in failed(findings)
    assert "gradient_present/bpda" not in failed(findings)
    (found,) = [f for f in findings if f.name == "gradient_present/full"]
    percent = float(found.detail.split("%")[0])
    assert 5 < percent < 15 if isinstance(purifier, Often) else percent == 100
    assert "nothing to follow" in found.detail


# Logits and randomness


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("softmax", "already softmaxed"),
        ("constant", "constant"),
        ("nan", "not finite"),
        ("one nan", "not finite"),
    ],
)
def test_unusable_logits_are_reported(
    kind: str, fault: str, classifier: Classifier, test_set: ImageSet
) -> None:
    findings = probe(test_set, Head(classifier, kind), None, FULL)
    assert "logits" in failed(findings)
    (found,) = [f for f in findings if f.name == "logits"]
    assert fault in found.detail


def test_logits_pass_unless_softmaxed_constant_or_not_finite() -> None:
    sound = torch.tensor([[3.0, -1.0], [0.5, 2.0]])
    assert answers.logits_sound(sound).passed
    assert answers.logits_sound(torch.tensor([[0.3, 0.6], [0.2, 0.1]])).passed, "sums are not 1"
    assert not answers.logits_sound(torch.tensor([[0.3, 0.7], [0.9, 0.1]])).passed
    assert not answers.logits_sound(torch.tensor([[1.0, 2.0], [1.0, 2.0]])).passed
    assert not answers.logits_sound(torch.tensor([[1.0, torch.inf], [1.0, 2.0]])).passed
    assert answers.logits_sound(sound[:1]).passed, "one image alone is not constant"


@pytest.mark.parametrize(
    ("purifier", "declared"), [(SecretlyNoisy(), "deterministic"), (SecretlyFixed(), "stochastic")]
)
def test_randomness_other_than_declared_is_reported(
    purifier: Purifier, declared: str, classifier: Classifier, test_set: ImageSet
) -> None:
    findings = probe(test_set, classifier, purifier, FULL)
    assert "randomness_declared" in failed(findings)
    (found,) = [f for f in findings if f.name == "randomness_declared"]
    assert f"declared {declared}" in found.detail


# Pixels


def test_pixels_outside_0_to_1_or_normalised_are_reported(test_set: ImageSet) -> None:
    pixels = test_set.pixels()
    assert models.convention(pixels).passed
    normalised = (pixels - pixels.mean()) / pixels.std()
    wrong = {
        "normalised": normalised,
        "0 to 255": 255 * pixels,
        "-1 to 1": 2 * pixels - 1,
        "divided twice": pixels / 255,
        "one grey": torch.full_like(pixels, 0.5),
        "a hair above": pixels + 0.01,
        "not a number": pixels.where(pixels > 0, torch.nan),
    }
    for name, images in wrong.items():
        found = models.convention(images)
        assert not found.passed and found.level == "block", name


# State


def test_another_accuracy_than_recorded_is_reported() -> None:
    assert models.recorded_accuracy(96, 96, 100).passed
    for now in (95, 97, 0):
        assert not models.recorded_accuracy(now, 96, 100).passed
    assert models.recorded_accuracy(9590, 9600, 10_000).passed, "0.1 points, for another device"
    assert not models.recorded_accuracy(9589, 9600, 10_000).passed


def test_another_checkpoint_has_another_accuracy(
    classifier: Classifier, test_set: ImageSet
) -> None:
    def right(model: nn.Module) -> int:
        defense = Defense(model, None).freeze()
        pixels, labels, ids = test_set.pixels(), test_set.labels, test_set.ids
        return int(count_correct(defense, pixels, labels, ids, 0, "clean", 1, 250).sum())

    then, other = right(classifier), deepcopy(classifier)
    for parameter in other.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    assert models.recorded_accuracy(right(classifier), then, len(test_set)).passed
    assert not models.recorded_accuracy(right(other), then, len(test_set)).passed


def test_scoring_that_changes_the_model_is_reported(
    classifier: Classifier, test_set: ImageSet
) -> None:
    model = deepcopy(classifier)
    before = state_digest(model)
    model(test_set.pixels())
    assert models.unchanged(before, state_digest(model), model.training).passed
    assert not models.unchanged(before, state_digest(model), True).passed
    model.train()(test_set.pixels())
    model.eval()
    found = models.unchanged(before, state_digest(model), model.training)
    assert not found.passed and "changed" in found.detail and found.level == "block"


# Stored examples


@pytest.mark.parametrize("part", [False, True], ids=["whole sets", "the probed images, reversed"])
def test_the_worst_stored_example_of_each_probed_image_is_probed(
    part: bool, classifier: Classifier, test_set: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    defense = Defense(classifier, None).freeze()
    data = head(test_set, 100)
    rows = probes.spread(data.ids, defense.digest, 0, 20)
    sets = [
        craft(Noise(kind="noise", tries=tries), defense, "full", data, LINF, 0, 50)
        for tries in (1, 9)
    ]
    worst = torch.where(
        (sets[0].margin <= sets[1].margin)[:, None, None, None], sets[0].images, sets[1].images
    )
    seen: list[Tensor | None] = []

    def note(bench: Bench, points: Mapping[str, Tensor]) -> Finding:
        seen.append(bench.stored)
        return Finding(name="one_answer", level="block", passed=True, detail="noted")

    monkeypatch.setattr(answers, "one_answer", note)
    some = [one.pick(rows.flip(0)) for one in sets] if part else sets
    stored = probes.Stored(some, defense.digest, 0)
    probes.probe(defense, FULL, data, LINF, 0, 20, 1, 50, stored, None, thorough=False)
    assert seen[0] is not None and torch.equal(seen[0], worst[rows])


# What every run contains


@pytest.mark.parametrize("purifier", [None, Noisy(0.05)], ids=["none", "noisy"])
@pytest.mark.parametrize("modes", [(), ("bpda",), ("full", "fixed_noise")], ids=str)
@pytest.mark.parametrize("thorough", [False, True], ids=["quick", "thorough"])
def test_the_names_that_are_required_are_those_that_probing_gives(
    purifier: Purifier | None, modes: tuple[Mode, ...], thorough: bool, classifier: Classifier,
    test_set: ImageSet, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The thorough probes are shortened to their names."""
    names = {name: name for name in ("converged", "planted", "repeatable", "eot_enough")}
    names |= {"radii": "radius_pays", "fixed_noise": "chance"}
    for function, name in names.items():
        found = Finding(name=name, level="block", passed=True, detail="")
        monkeypatch.setattr(probes.attacks, function, lambda *_, found=found: found)
    defense = Defense(classifier, purifier).freeze()
    findings = probes.probe(defense, modes, test_set, LINF, 0, 16, 1, 16, None, None, thorough)
    given = [finding.name for finding in findings]
    assert sorted(given) == sorted(
        probes.required(modes, defense.stochastic, defense.differentiable, thorough)
    )
