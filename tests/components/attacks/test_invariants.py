"""What holds for Square, Flip, RAND+FGSM and MI-FGSM under every threat and defense they accept."""

import math
from itertools import groupby
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from toy_networks import Function, Linear, Noisy, listening
from toys import BALL, LINF, attack_model, fooled, grey_images, head

from components.attacks import L2, Attack, Linf, craft, violations
from components.attacks.flip import Flip
from components.attacks.gradient import RFgsm
from components.attacks.library import MiFgsm
from components.attacks.square import Square
from components.data.draws import Draws, NoiseStream
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.defense import Defense, bind
from components.models.purifiers import Purifier

MODES = pytest.mark.parametrize("mode", ["full", "bpda"])
SQUARE = Square(kind="square", queries=30, eot=2)
FLIP = Flip(kind="flip", at=0.5, steps=6, candidates=4, eot=2)
R_FGSM = RFgsm(kind="r_fgsm", alpha=0.4, eot=2)
MI_FGSM = MiFgsm(kind="mi_fgsm", steps=6, step=0.25, decay=1.0)
ATTACKS: dict[str, Attack] = {a.kind: a for a in (SQUARE, FLIP, R_FGSM, MI_FGSM)}
# Every attack under every threat it accepts, against both kinds of defense if it accepts both.
CASES = [
    pytest.param(
        ATTACKS[name], threat, noisy, id=f"{name}-{threat.norm}-{noisy or 'deterministic'}"
    )
    for name in ATTACKS
    for threat in (LINF, BALL)
    for noisy in ("", "noisy")
    if not (threat is BALL and name in ("flip", "mi_fgsm")) and not (noisy and name == "mi_fgsm")
]
EVERY = pytest.mark.parametrize(("attack", "threat", "noisy"), CASES)


@EVERY
def test_every_attack_lowers_the_accuracy(
    attack: Attack, threat: Linf | L2, noisy: str, classifier: Classifier, test_set: ImageSet
) -> None:
    data, defense = head(test_set, 80), Defense(classifier, Noisy() if noisy else None).freeze()
    crafted = craft(attack, defense, "full", data, threat, 0, 50)
    draws = Draws(0, "attack", data.ids)
    clean = int((defense(data.pixels(), draws).argmax(1) != data.labels).sum())
    # Flip moves only the few pixels near 0.5, which does little if nothing thresholds the image.
    # Under noise the draw decides over a few images, and the draw depends on the weights.
    least = {"square": 3, "flip": 0}.get(attack.kind, 10)
    assert fooled(crafted) >= clean + (least // 2 if noisy else least)
    assert not torch.equal(crafted.images, data.pixels())
    assert bool(crafted.backward.any()) == (attack.kind != "square")
    if noisy and isinstance(attack, Square):
        assert (crafted.iterations == attack.queries).all(), "a search ended early under noise"


@EVERY
def test_images_with_nan_logits_are_left_alone(
    attack: Attack, threat: Linf | L2, noisy: str, test_set: ImageSet
) -> None:
    data = head(test_set, 12)
    nan = Defense(Function(lambda x: x.flatten(1)[:, :10] * torch.nan), Noisy() if noisy else None)
    crafted = attack_model(attack, nan, data, threat)
    assert crafted.success.all()
    if not noisy:
        assert torch.equal(crafted.images, data.pixels())


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("attack", [SQUARE, FLIP], ids=["square", "flip"])
def test_square_and_flip_keep_an_image_with_nan_logits(attack: Attack, noisy: bool) -> None:
    grey = torch.full((20, 1, 4, 4), 128, dtype=torch.uint8)
    data = ImageSet(grey, torch.zeros(20).long(), torch.arange(20), tuple("ab"))

    def logits(x: Tensor) -> Tensor:
        ordinary = (x.flatten(1).mean(1, keepdim=True) - 128 / 255).abs() < 0.003
        return torch.tensor([2.0, 1.0]).where(ordinary, torch.nan)

    class Still(Purifier):
        stochastic = True

        def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
            return x

    crafted = attack_model(
        attack, Defense(Function(logits), Still() if noisy else None), data, LINF
    )
    assert crafted.success.all()


@EVERY
def test_single_images_and_all_memory_layouts_are_accepted(
    attack: Attack, threat: Linf | L2, noisy: str
) -> None:
    for shape in ((3, 4, 6), (1, 2, 2), (1, 1, 3), (2, 7, 3)):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(4, math.prod(shape), generator=generator)
        data = grey_images(3, shape, 4)
        model = Function(lambda x, w=weight: x.contiguous().flatten(1) @ w.T)
        target = bind(
            Defense(model, Noisy() if noisy else None), "full", Draws(0, "attack", data.ids), 2
        )
        pixels = data.pixels().to(memory_format=torch.channels_last)
        for count in (3, 1):
            rows = torch.arange(count)
            outcome = attack.run(
                target[rows], pixels[rows], data.labels[rows], threat, target.draws[rows]
            )
            assert violations(outcome.images, pixels[rows], threat) == []


@EVERY
def test_equal_images_get_noise_by_their_ids(attack: Attack, threat: Linf | L2, noisy: str) -> None:
    """Equal ids give equal results; another id differs only if the attack draws noise."""
    weight = torch.randn(3, 36, generator=torch.Generator().manual_seed(0))
    bias = torch.tensor([30.0, 0, 0])
    images = grey_images(1).images.expand(3, -1, -1, -1)
    data = ImageSet(images, torch.zeros(3).long(), torch.tensor([7, 7, 8]), tuple("abc"))
    crafted = attack_model(
        attack, Defense(Linear(weight, bias), Noisy() if noisy else None), data, threat
    )
    assert torch.equal(crafted.images[0], crafted.images[1])
    if not noisy:
        drawn = attack.kind in ("square", "r_fgsm")
        assert torch.equal(crafted.images[0], crafted.images[2]) != drawn


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Square, {"kind": "square", "queries": 0, "eot": 1}),
        (Square, {"kind": "square", "queries": 10}),
        (Flip, {"kind": "flip", "at": 1.0, "steps": 1, "candidates": 1, "eot": 1}),
        (Flip, {"kind": "flip", "at": 0.5, "steps": 1, "candidates": 0, "eot": 1}),
        (RFgsm, {"kind": "r_fgsm", "alpha": 1.0, "eot": 1}),
        (RFgsm, {"kind": "r_fgsm", "alpha": 0.0, "eot": 1}),
        (MiFgsm, {"kind": "mi_fgsm", "steps": 5, "step": 0.0, "decay": 1.0}),
        (MiFgsm, {"kind": "mi_fgsm", "steps": 5, "step": 0.1, "decay": -1.0}),
    ],
)
def test_settings_out_of_range_are_refused(kind: type[Attack], settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        kind.model_validate(settings)


@pytest.mark.parametrize(("attack", "threat", "noisy"), [c for c in CASES if c.values[2]])
def test_every_query_has_noise_of_its_own(
    attack: Attack, threat: Linf | L2, noisy: str, classifier: Classifier, test_set: ImageSet
) -> None:
    seen: list[int] = []

    def record(draws: Draws) -> None:
        assert draws.role == "attack"
        seen.append(draws.draw)

    data = head(test_set, 6)
    target = bind(listening(classifier, record), "full", Draws(0, "attack", data.ids), 2)
    attack.run(target, data.pixels(), data.labels, threat, target.draws)
    # At the end of a search five images are compared under the same draws, one after another.
    queries = [draw for draw, _ in groupby(seen)]
    assert queries == list(range(len(queries)))
