"""The effort that an attack promises, in passes of both kinds, against what sets really cost."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_networks import Noisy
from toys import ATTACK_VARIANTS, ATTACKS, LINF, head, parse_attack

from components.attacks import Attack, Crafted, Linf, a3, autoattack, craft
from components.attacks.autoattack import AutoAttack
from components.attacks.contract import Cost
from components.checks.sets import effort
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.defense import Defense, Mode

# So wide that most attacks fool most images.
WIDE = Linf(norm="linf", eps_255=64.0)
STANDARD = AutoAttack(kind="autoattack", version="standard")
RAND = AutoAttack(kind="autoattack", version="rand")
# They are not for random defenses.
FIXED = ("a3", "fab_t", "autoattack", "mi_fgsm")


class Stubborn(nn.Module):
    """A classifier with the gradients of another, whose answer is class 0 whatever it sees."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(x) / 1000
        return logits + torch.eye(logits.shape[1])[0]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten AutoAttack, and A3 after its opening."""
    monkeypatch.setattr(a3, "BY_MARGIN", (a3.Round(0.5, 3, 8), a3.Round(0.2, 3, 8, 4)))
    monkeypatch.setattr(autoattack, "STEPS", 10)
    monkeypatch.setattr(autoattack, "QUERIES", 60)


def crafted_by(
    attack: Attack, classifier: Classifier, data: ImageSet, noisy: bool = False,
    mode: Mode = "full",
) -> Crafted:  # fmt: skip
    """Attack a defense that nothing fools."""
    defense = Defense(Stubborn(classifier), Noisy() if noisy else None).freeze()
    zeros = torch.zeros_like(data.labels)
    zero = ImageSet(data.images, zeros, data.ids, data.class_names)
    crafted = craft(attack, defense, mode, zero, LINF, 0, 5)
    assert not (crafted.success | crafted.fooled).any()
    return crafted


@pytest.mark.parametrize("noisy", [False, True], ids=["deterministic", "stochastic"])
@pytest.mark.parametrize("name", [*ATTACKS, *ATTACK_VARIANTS])
@pytest.mark.usefixtures("short")
def test_images_that_withstand_cost_what_the_attack_promises(
    name: str, noisy: bool, classifier: Classifier, test_set: ImageSet
) -> None:
    attack = RAND if noisy and name == "autoattack" else parse_attack(name)
    if noisy and name in FIXED and attack is not RAND:
        return
    crafted = crafted_by(attack, classifier, head(test_set, 8), noisy)
    assert effort("full/x", attack, crafted, 10, noisy).passed
    assert name in ("square", "autoattack") or not crafted.spared.any()
    asked = crafted.forward + crafted.spared
    spent = set(zip(asked.tolist(), crafted.backward.tolist(), strict=True))
    promised = attack.effort(10, noisy)
    if name == "flip":
        # An image may have no pixel that a flip could take to the other side.
        assert promised == Cost(attack.draws(noisy), 0)
    elif name == "a3":
        # The hardest image of a part is given up after the opening; the others cost more.
        assert len(spent) > 1 and min(spent) == (promised.forward, promised.backward)
    elif attack.kind == "detector_aware" and noisy:
        # The passes of the detector come on top.
        assert spent == {(2 * promised.forward, promised.backward)}
    else:
        assert spent == {(promised.forward, promised.backward)}


@pytest.mark.parametrize("noisy", [False, True], ids=["deterministic", "stochastic"])
@pytest.mark.parametrize("name", [*ATTACKS, *ATTACK_VARIANTS])
@pytest.mark.usefixtures("short")
def test_honest_sets_pass_where_some_images_fall(
    name: str, noisy: bool, classifier: Classifier, test_set: ImageSet
) -> None:
    attack = RAND if noisy and name == "autoattack" else parse_attack(name)
    if noisy and name in FIXED and attack is not RAND:
        return
    defense = Defense(classifier, Noisy() if noisy else None).freeze()
    crafted = craft(attack, defense, "full", head(test_set, 24), WIDE, 0, 10)
    if name not in ("noise", "flip"):
        assert crafted.success.any(), "nothing fell"
    found = effort("full/x", attack, crafted, 10, noisy)
    assert found.passed, found.detail


def test_a_set_does_not_excuse_itself(classifier: Classifier, test_set: ImageSet) -> None:
    """Success is measured by the set and by nobody else; under noise so is `fooled`."""
    attack, data = parse_attack("pgd"), head(test_set, 12)
    for noisy in (False, True):
        crafted = crafted_by(attack, classifier, data, noisy)
        crafted.success[:], crafted.forward[:] = True, 0
        assert not effort("x", attack, crafted, 10, noisy).passed
        crafted.fooled[:] = True
        assert effort("x", attack, crafted, 10, noisy).passed != noisy


def test_known_noise_is_not_averaged_over(classifier: Classifier, test_set: ImageSet) -> None:
    attack = parse_attack("pgd")
    crafted = crafted_by(attack, classifier, head(test_set, 8), True, "fixed_noise")
    assert effort("fixed_noise/pgd", attack, crafted, 10, False).passed
    assert not effort("fixed_noise/pgd", attack, crafted, 10, True).passed


@pytest.mark.parametrize(
    ("name", "whole", "less", "noisy"),
    [
        ("apgd_ce", {"steps": 100}, {"steps": 10}, False),
        ("apgd_t", {"targets": 9}, {"targets": 3}, False),
        ("fab_t", {"targets": 9}, {"targets": 3}, False),
        ("apgd_dlr", {"eot": 4}, {"eot": 1}, True),
        ("square", {"queries": 60}, {"queries": 10}, False),
        ("square", {"eot": 4}, {"eot": 1}, True),
        ("noise", {"tries": 20}, {"tries": 19}, False),
    ],
)
def test_a_set_of_less_effort_is_reported(
    name: str, whole: dict[str, Any], less: dict[str, Any], noisy: bool, classifier: Classifier,
    test_set: ImageSet,
) -> None:  # fmt: skip
    promised, done = parse_attack(name, **whole), parse_attack(name, **less)
    data = head(test_set, 12)
    crafted = [crafted_by(one, classifier, data, noisy) for one in (promised, done)]
    assert effort("x", promised, crafted[0], 10, noisy).passed
    found = effort("x", promised, crafted[1], 10, noisy)
    assert not found.passed and found.level == "block" and found.name == "effort/x"


@pytest.mark.parametrize(("part", "less"), [("TARGETS", 3), ("QUERIES", 10), ("STEPS", 9)])
@pytest.mark.usefixtures("short")
def test_every_part_of_autoattack_is_counted(
    part: str, less: int, classifier: Classifier, test_set: ImageSet
) -> None:
    data = head(test_set, 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoattack, part, less)
        crafted = crafted_by(STANDARD, classifier, data)
        assert effort("x", STANDARD, crafted, 10, False).passed
    assert not effort("x", STANDARD, crafted, 10, False).passed


def test_one_short_image_is_enough(classifier: Classifier, test_set: ImageSet) -> None:
    attack = parse_attack("pgd")
    crafted = crafted_by(attack, classifier, head(test_set, 12))
    for passes in (crafted.forward, crafted.backward):
        passes[3] -= 1
        assert not effort("x", attack, crafted, 10, False).passed
        passes[3] += 1
    assert effort("x", attack, crafted, 10, False).passed


def test_spared_passes_count_but_hardly_more_than_half(
    classifier: Classifier, test_set: ImageSet
) -> None:
    """Square leaves out what it knows, on grey images nearly half of late changes."""
    attack = parse_attack("square", queries=400)
    crafted = crafted_by(attack, classifier, head(test_set, 12))
    assert (crafted.spared > 50).all() and (crafted.forward + crafted.spared == 402).all()
    assert effort("x", attack, crafted, 10, False).passed
    crafted.spared[3] -= 1
    assert not effort("x", attack, crafted, 10, False).passed, "a change was never tried"
    # 402 / 2 + 4 sqrt(402) is 281.2.
    for spared in (281, 282):
        crafted.forward[3], crafted.spared[3] = 402 - spared, spared
        assert effort("x", attack, crafted, 10, False).passed == (spared == 281)


def test_an_image_that_fooled_the_attack_alone_may_have_cost_less(
    classifier: Classifier, test_set: ImageSet
) -> None:
    """Where only the folded copy was fooled, the attack stopped; `same_answer` judges that."""
    attack = parse_attack("pgd")
    crafted = crafted_by(attack, classifier, head(test_set, 12))
    crafted.backward[3], crafted.fooled[3] = 1, True
    assert effort("x", attack, crafted, 10, False).passed
    assert effort("x", attack, crafted.pick(torch.arange(0)), 10, False).passed


def test_the_published_ensemble_promises_its_published_lengths() -> None:
    """By hand: the parts are APGD-CE, APGD-T, FAB-T and Square; with `rand` APGD-CE and -DLR."""
    forward = (1 + 101) + (1 + 1 + 9 * 101) + (1 + 1 + 2 * 900) + (1 + 1 + 5000)
    assert STANDARD.effort(10, False) == Cost(forward, 101 + 9 * 101 + 900)
    assert STANDARD.effort(100, False) == STANDARD.effort(10, False), "nine targets at most"
    assert STANDARD.effort(4, False).backward == 101 + 3 * 101 + 300, "three other classes"
    one = 20 * (1 + 101) + 5 * 20
    assert RAND.effort(10, True) == Cost(2 * one + 2 * 20, 2 * 101 * 20)
