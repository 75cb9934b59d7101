"""AutoAttack is the published ensemble; each attack gets the images that none before it fooled."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from toy_networks import Constant, Noisy, Precise
from toys import LINF, THREATS, distances, fooled, linear_task, resized

from components.attacks import L2, Attack, Crafted, Linf, autoattack, craft
from components.attacks.apgd import ApgdDlr
from components.attacks.autoattack import AutoAttack
from components.attacks.contract import Outcome
from components.attacks.distance.fab import FabT
from components.data.draws import Draws, NoiseStream
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.defense import Defense, Target, bind

STANDARD = AutoAttack(kind="autoattack", version="standard")
RAND = AutoAttack(kind="autoattack", version="rand")
SMALL: dict[str, Attack] = {
    "fab_t": FabT(kind="fab_t", steps=8, targets=3, restarts=2),
    "apgd_dlr": ApgdDlr(kind="apgd_dlr", steps=8, restarts=2, eot=2),
    "standard": STANDARD,
    "rand": RAND,
}
EVERY = pytest.mark.parametrize("name", SMALL)


@pytest.fixture
def shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten AutoAttack to seconds, for tests that do not need its strength."""
    for name, value in {"STEPS": 6, "TARGETS": 3, "QUERIES": 30, "EOT": 2}.items():
        monkeypatch.setattr(autoattack, name, value)


def test_autoattack_is_the_published_ensemble() -> None:
    """Croce and Hein 2020, section 5, and the authors' code; targets are at most K - 1."""
    assert [attack.model_dump(exclude_none=True) for attack in STANDARD.ensemble(10)] == [
        {"kind": "apgd_ce", "steps": 100, "restarts": 1, "eot": 1},
        {"kind": "apgd_t", "steps": 100, "targets": 9, "eot": 1},
        {"kind": "fab_t", "steps": 100, "targets": 9, "restarts": 1},
        {"kind": "square", "queries": 5000, "eot": 1},
    ]
    assert [attack.model_dump(exclude_none=True) for attack in RAND.ensemble(10)] == [
        {"kind": "apgd_ce", "steps": 100, "restarts": 1, "eot": 20},
        {"kind": "apgd_dlr", "steps": 100, "restarts": 1, "eot": 20},
    ]
    assert [attack.model_dump().get("targets") for attack in STANDARD.ensemble(5)] == [
        None,
        4,
        4,
        None,
    ]
    assert [attack.model_dump().get("targets") for attack in STANDARD.ensemble(100)] == [
        None,
        9,
        9,
        None,
    ]
    few = [[attack.kind for attack in STANDARD.ensemble(classes)] for classes in (2, 3)]
    assert few == [["apgd_ce", "apgd_margin", "fab_t", "square"]] * 2
    kinds = [[attack.kind for attack in RAND.ensemble(classes)] for classes in (2, 3)]
    assert kinds == [["apgd_ce", "apgd_margin"], ["apgd_ce", "apgd_dlr"]]
    labels = [attack.label("mine", k) for attack in (STANDARD, RAND) for k in (2, 3, 4)]
    assert labels == ["mine (K<4)", "mine (K<4)", "mine", "mine (K<4)", "mine", "mine"]
    assert (STANDARD.eot, RAND.eot) == (1, 20)
    with pytest.raises(ValueError, match="Extra inputs"):
        AutoAttack(kind="autoattack", version="standard", steps=10)  # type: ignore[call-arg]


def test_the_wrong_version_is_refused_and_the_right_one_named(
    classifier: Classifier, test_set: ImageSet
) -> None:
    data = test_set[torch.arange(4)]
    with pytest.raises(ValueError, match="not for stochastic defenses: use version: rand"):
        craft(STANDARD, Defense(classifier, Noisy()).freeze(), "full", data, LINF, 0, 4)
    with pytest.raises(ValueError, match="not for deterministic defenses: use version: standard"):
        craft(RAND, Defense(classifier, None).freeze(), "full", data, LINF, 0, 4)


def scripted(
    margins: Sequence[dict[int, float]], seen: list[list[int]]
) -> Callable[[AutoAttack, int], list[Attack]]:
    """Return a stand-in for `AutoAttack.ensemble`: attacks that shift an image by a thousandth of
    their number and claim the margin given for its id (10 if none is); `seen` collects the ids.
    """

    class Scripted(Attack):
        kind: Literal["scripted"]
        number: int

        def run(
            self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
        ) -> Outcome:
            assert torch.equal(target.draws.ids, draws.ids) and len(images) == len(labels)
            seen.append(draws.ids.tolist())
            claimed = [margins[self.number - 1].get(i, 10.0) for i in seen[-1]]
            return Outcome(
                images + self.number / 1000, torch.tensor(claimed), 10**self.number + 0 * labels
            )

    attacks: list[Attack] = [Scripted(kind="scripted", number=k + 1) for k in range(len(margins))]
    return lambda self, classes: attacks


def test_each_attack_gets_the_images_not_fooled_yet_and_the_lowest_margin_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, data = linear_task(4, 5)
    data = ImageSet(data.images, data.labels, torch.arange(100, 105), data.class_names)
    seen: list[list[int]] = []
    margins = [{100: -1.0, 101: 2.0, 102: 3.0}, {101: 0.0, 102: 4.0, 103: 5.0}, {104: -torch.inf}]
    monkeypatch.setattr(AutoAttack, "ensemble", scripted(margins, seen))
    defense = Defense(Constant([1.0, 0.0, 0.0, 0.0]), None).freeze()
    crafted = craft(STANDARD, defense, "full", data, LINF, 0, 5)
    assert seen == [[100, 101, 102, 103, 104], [101, 102, 103, 104], [102, 103, 104]]
    assert crafted.iterations.tolist() == [10, 110, 1110, 1110, 1110]
    shifts = 1000 * (crafted.images - data.pixels()).amax((1, 2, 3))
    assert shifts.tolist() == pytest.approx([1, 2, 1, 2, 3], abs=1e-3)
    assert torch.equal(crafted.success, data.labels != 0), "success is not measured on the defense"


def test_no_attack_runs_once_all_images_are_fooled(monkeypatch: pytest.MonkeyPatch) -> None:
    _, data = linear_task(4, 5)
    seen: list[list[int]] = []
    margins = [dict.fromkeys(data.ids.tolist(), lowest) for lowest in (-1.0, -2.0)]
    monkeypatch.setattr(AutoAttack, "ensemble", scripted(margins, seen))
    defense = Defense(Constant([1.0, 0.0, 0.0, 0.0]), None).freeze()
    craft(STANDARD, defense, "full", data, LINF, 0, 5)
    assert seen == [data.ids.tolist()]


def test_rand_runs_every_attack_on_every_image_and_keeps_the_stronger(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever margins the attacks claim: each measured them under noise of its own."""
    _, data = linear_task(4, 5)
    clean, fooled_by = data.pixels(), torch.tensor([2, 1, 1, 2, 1])

    class Identity(Noisy):
        def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
            return x

    class Scripted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.anchor = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            rows = torch.cdist(x.flatten(1), clean.flatten(1)).argmin(1)
            number = (1000 * (x - clean[rows]).amax((1, 2, 3))).round()
            fooled = torch.where(number == fooled_by[rows], -1.0, 1.0)
            return functional.pad(fooled[:, None], (0, 3))

    labels = torch.zeros_like(data.labels)
    data = ImageSet(data.images, labels, data.ids, data.class_names)
    seen: list[list[int]] = []
    margins = [{0: -9.0, 3: -9.0}, {1: -9.0, 2: -9.0, 4: -9.0}]
    monkeypatch.setattr(AutoAttack, "ensemble", scripted(margins, seen))
    defense = Defense(Scripted(), Identity()).freeze()
    crafted = craft(RAND, defense, "full", data, LINF, 0, 5)
    assert seen == [data.ids.tolist()] * 2
    shifts = 1000 * (crafted.images - clean).amax((1, 2, 3))
    assert shifts.tolist() == pytest.approx(fooled_by.tolist(), abs=1e-3)
    assert crafted.iterations.tolist() == [110] * 5


@pytest.mark.usefixtures("shortened")
def test_rand_averages_every_gradient_over_its_draws(
    classifier: Classifier, test_set: ImageSet
) -> None:
    data, defense = test_set[torch.arange(8)], Defense(classifier, Noisy()).freeze()
    crafted = craft(RAND, defense, "full", data, LINF, 0, 8)
    assert (crafted.iterations == 2 * 7).all() and (crafted.backward == 2 * 2 * 7).all()
    assert RAND.effort(10, True).backward == 2 * 2 * 7


@pytest.mark.parametrize("name", ["fab_t", "apgd_dlr", "standard"])
@pytest.mark.usefixtures("shortened")
def test_an_image_that_withstands_costs_the_promised_effort(
    name: str, classifier: Classifier, test_set: ImageSet
) -> None:
    data, defense = test_set[torch.arange(20)], Defense(classifier, None).freeze()
    crafted = craft(SMALL[name], defense, "full", data, LINF.scaled(0.1), 0, 20)
    withstood = ~crafted.success
    assert withstood.sum() > 10
    assert (crafted.backward[withstood] == SMALL[name].effort(10, False).backward).all()
    assert SMALL[name].strong() == (name == "standard")


# What holds for both versions, for FAB-T and for APGD-DLR


def defense_for(name: str, classifier: nn.Module) -> Defense:
    return Defense(classifier, Noisy() if name == "rand" else None).freeze()


@EVERY
@THREATS
@pytest.mark.parametrize("mode", ["full", "bpda"])
@pytest.mark.usefixtures("shortened")
def test_images_lie_in_the_ball_and_lower_the_accuracy_in_both_modes(
    name: str, threat: Linf | L2, mode: Any, classifier: Classifier, test_set: ImageSet
) -> None:
    data, defense = test_set[torch.arange(40)], defense_for(name, classifier)
    crafted = craft(SMALL[name], defense, mode, data, threat, 0, 25)
    assert crafted.images.dtype == torch.float32 and crafted.images.isfinite().all()
    assert crafted.images.min() >= 0 and crafted.images.max() <= 1
    assert threat.distance(crafted.images, data.pixels()).max() <= threat.eps + 1e-6
    draws = Draws(0, "attack", data.ids)
    wrong = defense(data.pixels(), draws).argmax(1) != data.labels
    assert fooled(crafted) >= wrong.sum() + 8
    if name != "rand":
        assert torch.equal(crafted.images[wrong], data.pixels()[wrong]), (
            "a misclassified image was changed"
        )
        assert not crafted.iterations[wrong].any()


@EVERY
@THREATS
@pytest.mark.usefixtures("shortened")
def test_neither_order_nor_batch_size_changes_an_image_under_both_threats(
    name: str, threat: Linf | L2, classifier: Classifier, test_set: ImageSet
) -> None:
    """In float64, where the rounding of other batch sizes does not show."""
    defense, data = defense_for(name, Precise(classifier)), test_set[torch.arange(16)]
    whole = craft(SMALL[name], defense, "full", data, threat, 0, 16)
    torch.manual_seed(99)
    order = torch.randperm(16)
    for batch in (16, 5, 1):
        shuffled = craft(SMALL[name], defense, "full", data[order], threat, 0, batch)
        assert torch.allclose(shuffled.images, whole.images[order], rtol=0, atol=1e-5)
        for field in fields(Crafted):
            if field.name != "images":
                ours, theirs = getattr(shuffled, field.name), getattr(whole, field.name)
                assert torch.equal(ours, theirs[order]), field.name
    other = craft(SMALL[name], defense, "full", data, threat, 1, 16)
    # FAB draws noise only for restarts, which no image here needs.
    assert torch.equal(other.images, whole.images) == (name == "fab_t"), (
        "another seed does not change exactly the attacks that draw noise"
    )


@EVERY
@pytest.mark.parametrize("logits", [[torch.nan] * 10, [1.0] * 10, [0.0] * 9 + [torch.nan]], ids=str)
@pytest.mark.usefixtures("shortened")
def test_tied_and_nan_logits_raise_no_error(
    name: str, logits: list[float], test_set: ImageSet
) -> None:
    data = test_set[torch.arange(30)]
    crafted = craft(SMALL[name], defense_for(name, Constant(logits)), "full", data, LINF, 0, 30)
    if logits[-1] != 1:
        assert crafted.success.all()


@EVERY
@pytest.mark.usefixtures("shortened")
def test_an_empty_batch_gives_an_empty_outcome(
    name: str, classifier: Classifier, test_set: ImageSet
) -> None:
    attack, none = SMALL[name], torch.zeros(0, 1, 8, 8)
    rows = torch.zeros(0).long()
    draws = Draws(0, "attack", rows)
    target = bind(defense_for(name, classifier), "full", draws, 2)
    outcome = attack.run(target, none, rows, LINF, draws)
    assert outcome.images.shape == none.shape and len(outcome.margin) == 0
    assert len(outcome.iterations) == 0


# Closed form


@THREATS
@pytest.mark.parametrize("classes", [2, 3, 4, 5, 10])
def test_autoattack_finds_the_exact_robust_accuracy_of_a_linear_model(
    classes: int, threat: Linf | L2, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Square is shortened: it finds nothing more where gradients are exact."""
    monkeypatch.setattr(autoattack, "QUERIES", 50)
    model, data = linear_task(classes, 1000)
    exact = distances(model, data, 1 if threat is LINF else 2)
    eps = exact.quantile(0.5).item()
    assert 0 < eps < 90 / 255, "pixels would be clipped to [0,1]"
    crafted = craft(
        STANDARD, Defense(model, None).freeze(), "full", data, resized(threat, eps), 0, 1000
    )
    assert not (crafted.success & (exact > eps + 1e-5)).any(), (
        "an image was fooled within its exact distance"
    )
    assert (~crafted.success).float().mean().item() == pytest.approx(0.5, abs=0.002)
