"""What holds for the attacks that return the nearest fooling image: DeepFool and elastic net."""

from itertools import groupby
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from toy_networks import Detached, Linear, Noisy, Precise, Rounded, listening
from toys import BALL, LINF, head, linear_task, parse_attack, run_on_target

from components.attacks import L2, Attack, Linf, craft
from components.data.draws import Draws, NoiseStream
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.defense import Defense

BOTH = pytest.mark.parametrize("name", ["deepfool", "elastic_net"])
STOCHASTIC = pytest.mark.parametrize("stochastic", [False, True], ids=["deterministic", "random"])
SETTINGS: dict[str, dict[str, Any]] = {
    "deepfool": {"steps": 20},
    "elastic_net": {"rule": "l1", "steps": 15, "learning_rate": 0.02},
}


def nearest_attack(name: str, **changes: Any) -> Attack:
    return parse_attack(name, **{**SETTINGS[name], **changes})


@BOTH
@STOCHASTIC
def test_neither_order_nor_small_batches_change_an_image(
    name: str, stochastic: bool, classifier: Classifier, test_set: ImageSet
) -> None:
    defense = Defense(Precise(classifier), Noisy() if stochastic else None).freeze()
    data, attack = head(test_set, 8), nearest_attack(name, steps=8)
    whole = craft(attack, defense, "full", data, LINF, 0, 8)
    assert not torch.equal(whole.images, data.pixels())
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    for batch in (8, 3, 1):
        shuffled = craft(attack, defense, "full", data[order], LINF, 0, batch)
        assert torch.allclose(shuffled.images, whole.images[order], rtol=0, atol=1e-5)
        for column in ("success", "iterations", "forward", "backward"):
            assert torch.equal(getattr(shuffled, column), getattr(whole, column)[order]), column


@BOTH
def test_an_empty_batch_costs_nothing(name: str) -> None:
    model, data = linear_task(10, 5)
    target, outcome = run_on_target(
        nearest_attack(name), Defense(model, None), data[torch.arange(0)]
    )
    assert outcome.images.shape == (0, 1, 6, 6)
    assert len(outcome.margin) == len(outcome.iterations) == len(target.passes.forward) == 0


@BOTH
def test_misclassified_images_are_left_alone_and_cost_no_backward_pass(
    name: str, classifier: Classifier, test_set: ImageSet
) -> None:
    data = head(test_set, 12)
    right = classifier(data.pixels()).argmax(1)
    labels = torch.where(torch.arange(12) % 2 == 0, right, (right + 1) % 10)
    mixed = ImageSet(data.images, labels, data.ids, data.class_names)
    crafted = craft(
        nearest_attack(name), Defense(classifier, None).freeze(), "full", mixed, LINF, 0, 12
    )
    wrong = right != labels
    assert crafted.success[wrong].all()
    assert torch.equal(crafted.images[wrong], data.pixels()[wrong])
    assert not crafted.backward[wrong].any() and not crafted.iterations[wrong].any()
    assert crafted.backward[~wrong].all() and crafted.iterations[~wrong].all()


@BOTH
def test_under_noise_every_image_gets_the_full_effort(
    name: str, classifier: Classifier, test_set: ImageSet
) -> None:
    """Even images that the first query misclassifies."""
    data, defense = head(test_set, 20), Defense(classifier, Noisy()).freeze()
    labels = torch.where(torch.arange(20) < 10, data.labels, (data.labels + 1) % 10)
    data = ImageSet(data.images, labels, data.ids, data.class_names)
    crafted = craft(nearest_attack(name, eot=3), defense, "full", data, LINF, 0, 20)
    assert crafted.success.sum() >= 10
    if name == "deepfool":
        # In the end five images are evaluated again, under 16 draws.
        steps, forward, backward = 20, 3 * (1 + 2 * 20) + 1 + 5 * 16, 3 * 9 * 20
    else:
        steps, forward, backward = 30, 3 * (1 + 2 * 30), 3 * 30
    assert crafted.iterations.tolist() == [steps] * 20
    assert (crafted.backward == backward).all()
    assert (crafted.forward == forward).all()


@BOTH
@pytest.mark.parametrize("where", ["everywhere", "off the image", "gradient"])
def test_nan_logits_fool_and_nan_gradients_change_no_image(name: str, where: str) -> None:
    """NaN logits count as fooled, at the image or at the first step off it. A NaN gradient moves
    nothing; above all, no NaN reaches the returned image.
    """
    model, data = linear_task(10, 12)
    right = ImageSet(data.images, model(data.pixels()).argmax(1), data.ids, data.class_names)
    clean = right.pixels()

    class Broken(Linear):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            if where == "gradient":
                return logits + 0 * (x - x.detach()).flatten(1).abs().sum(1, keepdim=True).sqrt()
            at_home = (x == clean[: len(x)]).flatten(1).all(1, keepdim=True)
            return logits.where(at_home & (where != "everywhere"), torch.nan)

    defense = Defense(Broken(model.weight, model.bias), None)
    for stochastic in (False, True):
        defense.purifier = Noisy() if stochastic and where != "off the image" else None
        _, outcome = run_on_target(nearest_attack(name, steps=4), defense, right)
        assert outcome.images.isfinite().all()
        if where == "gradient":
            assert torch.equal(outcome.images, clean)
        else:
            assert (outcome.margin == -torch.inf).all()
        if where == "off the image":
            assert (outcome.images != clean).flatten(1).any(1).all()


@BOTH
def test_a_nan_gradient_in_one_pixel_does_not_stop_the_others(name: str) -> None:
    class Cracked(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0 * (x - x.detach()).flatten(1)[:, :1].abs().sqrt()

    model, data = linear_task(10, 12)
    right = ImageSet(data.images, model(data.pixels()).argmax(1), data.ids, data.class_names)
    _, outcome = run_on_target(
        nearest_attack(name), Defense(Cracked(model.weight, model.bias), None), right
    )
    assert (outcome.margin <= 0).all() and outcome.images.isfinite().all()
    assert torch.equal(outcome.images[:, :, 0, 0], right.pixels()[:, :, 0, 0])


@BOTH
@STOCHASTIC
def test_a_defense_without_gradient_gives_the_clean_images(name: str, stochastic: bool) -> None:
    class NoGradient(Noisy):
        def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
            return super().purify(x, stream).detach()

    model, data = linear_task(10, 12)
    right = ImageSet(data.images, model(data.pixels()).argmax(1), data.ids, data.class_names)
    sure = Linear(model.weight, model.bias + 0)
    sure.weight.data /= 100
    sure.bias.data = 9 * torch.eye(10)[0]
    home = ImageSet(right.images, torch.zeros(12).long(), right.ids, right.class_names)
    defense = Defense(sure, NoGradient() if stochastic else Detached(1.0))
    _, outcome = run_on_target(nearest_attack(name), defense, home)
    assert torch.equal(outcome.images, home.pixels())
    assert (outcome.margin > 0).all()


@BOTH
@pytest.mark.parametrize("threat", [LINF, BALL], ids=["linf", "l2"])
def test_bpda_breaks_rounding_under_both_threats(
    name: str, threat: Linf | L2, classifier: Classifier, test_set: ImageSet
) -> None:
    data, defense = head(test_set, 40), Defense(classifier, Rounded()).freeze()
    full, bpda = (
        int(craft(nearest_attack(name), defense, mode, data, threat, 0, 40).success.sum())
        for mode in ("full", "bpda")
    )
    assert bpda > full + 20


@BOTH
def test_the_memory_layout_of_images_changes_no_result(name: str) -> None:
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 16, 10),
    )  # fmt: skip
    images = torch.randint(256, (10, 3, 8, 8), dtype=torch.uint8)
    labels = net(images / 255).argmax(1)
    data = ImageSet(images, labels, torch.arange(10), tuple("0123456789"))
    defense = Defense(net, None)
    attack = nearest_attack(name, **({} if name == "deepfool" else {"c": 30.0}))
    _, plain = run_on_target(attack, defense, data)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for strange in (
        data.pixels().to(memory_format=torch.channels_last),
        data.pixels().transpose(2, 3).contiguous().transpose(2, 3),
    ):
        _, outcome = run_on_target(attack, defense, data, strange)
        assert torch.allclose(outcome.images, plain.images, atol=1e-5)
    assert (plain.margin <= 0).all()
    crafted = craft(attack, defense, "full", data, LINF, 0, 10)
    assert torch.allclose(crafted.images, plain.images, atol=1e-5)
    assert crafted.images.min() >= 0 and crafted.images.max() <= 1


@BOTH
def test_no_two_queries_share_noise_and_the_global_stream_is_untouched(
    name: str, classifier: Classifier, test_set: ImageSet
) -> None:
    seen: list[int] = []

    def record(draws: Draws) -> None:
        assert draws.role == "attack"
        seen.append(draws.draw)

    data, state = head(test_set, 6), torch.get_rng_state()
    pixels = data.images.clone()
    run_on_target(nearest_attack(name), listening(classifier, record), data)
    # At the end of a search five images are compared under the same draws, one after another.
    later = [draw for draw, _ in groupby(seen) if draw]
    assert len(later) == len(set(later)) == max(seen)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(data.images, pixels)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("deepfool", {"steps": 0}),
        ("deepfool", {"overshoot": -0.1}),
        ("deepfool", {"classes": 1}),
        ("deepfool", {"alpha": 1.0}),
        ("elastic_net", {"rule": "l2"}),
        ("elastic_net", {"beta": -0.1}),
        ("elastic_net", {"c": 0.0}),
        ("elastic_net", {"searches": 0}),
        ("elastic_net", {"learning_rate": 0.0}),
        ("elastic_net", {"confidence": -1.0}),
    ],
)
def test_settings_of_nearest_image_attacks_are_checked(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        nearest_attack(name, **changes)


def test_both_attacks_are_unbounded() -> None:
    assert not nearest_attack("deepfool").bounded and not nearest_attack("elastic_net").bounded
