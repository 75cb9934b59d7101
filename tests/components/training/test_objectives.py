"""Losses have the value and sign of their formulas, and gradients reach the right networks."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F
from toys import LINF
from training_toys import (
    AUTOENCODER,
    DDPM,
    GAN,
    IN_LOOP,
    MAGNET,
    NOISY,
    SECTIONS,
    bind,
    first_batch,
    parse,
    untrained,
)

from components.data.draws import Draws, NoiseStream
from components.data.image_set import ImageSet
from components.models.purifiers import Purifier
from components.models.purifiers.diffusion.ddpm import Diffusion
from components.training.contract import (
    LOSS_ATTACKED,
    LOSS_CLEAN,
    Adversary,
    Batch,
    Frozen,
    Teacher,
)
from components.training.koo import distance, relativistic
from components.training.objectives import ClassifierObjective, PurifierObjective


def test_every_kind_of_objective_and_adversary_has_a_sample() -> None:
    kinds = set()
    for union in (ClassifierObjective, PurifierObjective):
        for member in get_args(get_args(union)[0]):
            kinds |= set(get_args(member.model_fields["kind"].annotation))
    assert kinds | {"distillation", "atop"} == set(SECTIONS)
    adversaries = get_args(get_args(Adversary)[0])
    assert {k for m in adversaries for k in get_args(m.model_fields["kind"].annotation)} == {
        "pool", "none", "classifier", "defense",
    }  # fmt: skip


# Parts of the losses


def test_the_relativistic_loss_is_a_softplus_of_log_probabilities() -> None:
    """-log sigmoid(log p_out - log adv_out), by hand for p_out = 0.8, adv_out = 0.2: ratio 4."""
    purified, attacked = torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.2, 0.8]]).log()
    found = relativistic(purified, attacked, torch.tensor([0]))
    assert found.item() == pytest.approx(-math.log(4 / 5), abs=1e-6)
    assert relativistic(attacked, purified, torch.tensor([0])).item() == pytest.approx(math.log(5))
    same = relativistic(attacked + 3, attacked, torch.tensor([1]))
    assert same.item() == pytest.approx(math.log(2)), "a shift of all logits changes nothing"


def test_the_relativistic_loss_falls_as_the_true_class_becomes_likelier() -> None:
    labels = torch.tensor([2, 0])
    purified = torch.randn(2, 4, requires_grad=True)
    attacked = torch.randn(2, 4, requires_grad=True)
    loss = relativistic(purified, attacked, labels)
    towards, away = torch.autograd.grad(loss, (purified, attacked), allow_unused=True)
    assert away is None, "a gradient reached the score of x'"
    true = F.one_hot(labels, 4).bool()
    assert (towards[true] < 0).all() and (towards[~true] > 0).all()
    values = [
        relativistic(purified + up * true, attacked, labels).item() for up in (-2.0, 0.0, 1.0, 5.0)
    ]
    assert values == sorted(values, reverse=True) and values[-1] < values[0] / 4


def test_equal_images_have_distance_zero() -> None:
    x = torch.rand(3, 2, 4, 4)
    assert distance(x, x).item() == pytest.approx(0, abs=1e-6)
    for other in (x + 0.1 * torch.randn_like(x), x.flip(0), x.flip(3)):
        assert distance(x, other) > 1e-3


def test_the_distance_equals_a_calculation_by_hand() -> None:
    """Two images of two pixels. Softmax over pixels: (1/4, 3/4) against (1/2, 1/2), teacher first;
    the second image agrees. KL is summed over pixels and averaged over images.
    """
    teacher = torch.tensor([[0.0, math.log(3)], [0.3, 0.7]]).view(2, 1, 1, 2)
    student = torch.tensor([[0.2, 0.2], [0.3, 0.7]]).view(2, 1, 1, 2)
    kl = (0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)) / 2
    mse = (0.2**2 + (math.log(3) - 0.2) ** 2) / 4
    assert distance(teacher, student).item() == pytest.approx(kl + mse, abs=1e-6)
    other = (0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)) / 2
    assert distance(student, teacher).item() == pytest.approx(other + mse, abs=1e-6)


def test_only_the_student_gets_a_gradient_of_the_distance() -> None:
    teacher = torch.rand(2, 1, 4, 4, requires_grad=True)
    student = torch.rand(2, 1, 4, 4, requires_grad=True)
    value = distance(teacher, student)
    to_teacher, to_student = torch.autograd.grad(value, (teacher, student), allow_unused=True)
    assert to_teacher is None and to_student.abs().max() > 0
    closer = distance(teacher, student - 0.5 * to_student)
    assert closer < value


# Losses against their formulas written out


def expected_teacher(section: dict[str, Any], parts: dict[str, Tensor]) -> Tensor:
    score = parts["true_purified"] - parts["true_attacked"]
    adv = -torch.sigmoid(score).log().mean()
    loss = parts["mse"] + section["w_adv"] * adv
    return loss + section["w_classification"] * (parts["ce"] + parts["ce_clean"])


def expected_distillation(section: dict[str, Any], parts: dict[str, Tensor]) -> Tensor:
    given = "clean" if section["nt_input"] == "clean" else "attacked"
    kd = (parts["to_adversarial"] + parts[f"to_normal_{given}"]) / 2
    loss = section["beta"] * parts["mse"] + section["gamma"] * kd
    return loss + section["w_classification"] * (parts["ce"] + parts["ce_clean"])


def expected_atop(section: dict[str, Any], parts: dict[str, Tensor]) -> Tensor:
    to = "" if section["target"] == "clean" else "_attacked"
    original = parts[f"{section['loss']}{to}"]
    return original + section["lambda"] * parts["ce"] + section["w_clean"] * parts["ce_clean"]


FORMULAS: list[tuple[str, Callable[[dict[str, Any], dict[str, Tensor]], Tensor], dict[str, Any]]]
FORMULAS = [
    ("adversarial_teacher", expected_teacher, {}),
    ("adversarial_teacher", expected_teacher, {"w_adv": 0.3, "w_classification": 0.7}),
    ("distillation", expected_distillation, {}),
    ("distillation", expected_distillation, {"beta": 0.2, "gamma": 2.0, "nt_input": "attacked"}),
    ("distillation", expected_distillation, {"w_classification": 1.5}),
    ("atop", expected_atop, {}),
    ("atop", expected_atop, {"lambda": 0.4, "target": "attacked", "w_clean": 0.6}),
    ("atop", expected_atop, {"loss": "l1"}),
    ("atop", expected_atop, {"loss": "l1", "target": "attacked"}),
]


@pytest.mark.parametrize(("name", "expected", "changes"), FORMULAS)
@pytest.mark.parametrize("config", [AUTOENCODER, NOISY], ids=["deterministic", "stochastic"])
def test_the_loss_equals_its_formula(
    name: str,
    expected: Callable[[dict[str, Any], dict[str, Tensor]], Tensor],
    changes: dict[str, Any],
    config: dict[str, Any],
    frozen: Frozen,
    train_set: ImageSet,
) -> None:
    batch, draws = first_batch(train_set)
    model = untrained(config)
    twin = deepcopy(model)
    loss, metrics = bind(name, frozen, **changes)(model, batch, 0.5, draws)
    assert batch.attacked is not None and frozen.classifier is not None
    purified = twin(batch.attacked, draws.redraw(LOSS_ATTACKED).stream())
    logits, behind = frozen.classifier(purified), frozen.classifier(batch.attacked)
    rows = torch.arange(len(batch.labels))
    adversarial, normal = (teacher.purifier for teacher in frozen.teachers)
    parts = {
        "mse": (purified - batch.images).square().mean(),
        "mse_attacked": (purified - batch.attacked).square().mean(),
        "l1": (purified - batch.images).abs().mean(),
        "l1_attacked": (purified - batch.attacked).abs().mean(),
        "true_purified": logits.softmax(1)[rows, batch.labels].log(),
        "true_attacked": behind.softmax(1)[rows, batch.labels].log(),
        "ce": -logits.softmax(1)[rows, batch.labels].log().mean(),
        "to_adversarial": distance(adversarial(batch.attacked), purified),
        "to_normal_clean": distance(normal(batch.images), purified),
        "to_normal_attacked": distance(normal(batch.attacked), purified),
    }
    clean = frozen.classifier(twin(batch.images, draws.redraw(LOSS_CLEAN).stream()))
    parts["ce_clean"] = -clean.softmax(1)[rows, batch.labels].log().mean()
    by_hand = expected({**SECTIONS[name][1], **changes}, parts)
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-4)
    assert metrics["loss"].item() == loss.item()
    right = (logits.argmax(1) == batch.labels).float().mean()
    assert metrics["accuracy_attacked"].item() == pytest.approx(right.item())


class Paint(Purifier):
    """A purifier that paints every image alike, two grey levels, and records what it was given."""

    def __init__(self, *levels: float) -> None:
        super().__init__()
        self.levels = nn.Parameter(torch.tensor(levels).view(1, 1, 1, 2))

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        self.seen = x.detach()
        return self.levels.expand_as(x)


# Two images of two pixels, and a classifier that gives all of 10 classes the same probability.
CLEAN = torch.tensor([[0.2, 0.6], [0.2, 0.6]]).view(2, 1, 1, 2)
PAINTED = Batch(CLEAN, torch.tensor([3, 0]), CLEAN + 0.1)
UNSURE = nn.Sequential(nn.Flatten(), nn.Linear(2, 10))
for weights in UNSURE.parameters():
    nn.init.zeros_(weights)


@pytest.mark.parametrize("adversary", ["pool", "none"])
@pytest.mark.parametrize("names", [("adversarial",), ("normal",), ("adversarial", "normal")])
def test_a_student_of_one_teacher_has_only_the_term_of_that_teacher(
    names: tuple[str, ...], adversary: str
) -> None:
    """By hand: the student paints (.2, .2), softmax (1/2, 1/2). MSE to the image: .4^2 / 2 = .08.
    Adversarial teacher (0, log 3), softmax (1/4, 3/4). Normal teacher (.5, .5): KL 0, MSE .09.
    """
    student = Paint(0.2, 0.2)
    networks = {"adversarial": Paint(0.0, math.log(3)), "normal": Paint(0.5, 0.5)}
    kl = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    terms = {
        "adversarial": kl + (0.2**2 + (math.log(3) - 0.2) ** 2) / 2,
        "normal": 0.09,
    }
    teachers = [Teacher(networks[name], normal=name == "normal") for name in names]
    objective = bind("distillation", Frozen(UNSURE, teachers, LINF), adversary={"kind": adversary})
    loss, metrics = objective(student, PAINTED, 0.5, Draws(0, "train", torch.arange(2)))
    kd = sum(terms[name] for name in names) / len(names)
    assert metrics["kd"].item() == pytest.approx(kd, abs=1e-6)
    assert loss.item() == pytest.approx(0.5 * 0.08 + 0.5 * kd, abs=1e-6)
    attacked = CLEAN if adversary == "none" else CLEAN + 0.1
    assert torch.equal(student.seen, attacked)
    for name in names:
        assert torch.equal(networks[name].seen, CLEAN if name == "normal" else attacked)


def test_without_an_adversary_atop_fine_tunes_on_clean_images() -> None:
    """By hand: MSE .08 as above, cross-entropy log 10. No accuracy is logged as an attacked one."""
    purifier = Paint(0.2, 0.2)
    objective = bind("atop", Frozen(UNSURE, (), LINF), adversary={"kind": "none"})
    loss, metrics = objective(purifier, PAINTED, 0.5, Draws(0, "train", torch.arange(2)))
    assert loss.item() == pytest.approx(0.08 + 0.1 * math.log(10), abs=1e-6)
    assert torch.equal(purifier.seen, CLEAN)
    # Of ten equal logits the first is taken for the largest: class 0, right for one image of two.
    assert metrics["accuracy_clean"].item() == 0.5 and "accuracy_attacked" not in metrics


def test_plain_losses_equal_their_formulas(frozen: Frozen, train_set: ImageSet) -> None:
    batch, draws = first_batch(train_set)
    for name in ("normal_teacher", "reconstruction"):
        model = untrained(NOISY)
        loss, _ = bind(name, frozen)(model, batch, 0.5, draws)
        repeated = F.mse_loss(untrained(NOISY)(batch.images, draws.stream()), batch.images)
        assert loss.item() == pytest.approx(repeated.item())
    loss, _ = bind("reconstruction", frozen, loss="l1")(untrained(NOISY), batch, 0.5, draws)
    restored = untrained(NOISY)(batch.images, draws.stream())
    assert loss.item() == pytest.approx((restored - batch.images).abs().mean().item())
    model = deepcopy(frozen.classifier)
    assert model is not None
    loss, metrics = bind("classification", Frozen(None, (), LINF))(model, batch, 0.5, draws)
    logits = model(batch.images)
    assert loss.item() == pytest.approx(F.cross_entropy(logits, batch.labels).item())
    right = (logits.argmax(1) == batch.labels).float().mean()
    assert metrics["accuracy"].item() == pytest.approx(right.item())


@pytest.mark.parametrize("name", SECTIONS)
def test_following_the_gradient_lowers_the_loss(
    name: str, frozen: Frozen, train_set: ImageSet
) -> None:
    batch, draws = first_batch(train_set)
    own = {"reformer_detectors": MAGNET, "noise_prediction": DDPM, "wgan_gp": GAN}
    model: nn.Module = untrained(own.get(name, AUTOENCODER))
    if "classification" in name:
        torch.manual_seed(1)
        model = deepcopy(frozen.classifier).requires_grad_(True).train()  # type: ignore[union-attr]
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.weight)
    objective = bind(name, frozen)
    losses = []
    optimiser = torch.optim.SGD(model.parameters(), 0.02)
    for _ in range(8):
        # Of a GAN this is always the turn of the critic.
        loss, _ = objective(model, batch, 1.0, draws)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert losses[-1] < losses[0]
    assert sum(later < sooner for sooner, later in pairwise(losses)) >= 6


@pytest.mark.parametrize("name", ["adversarial_teacher", "distillation", "atop"])
@pytest.mark.parametrize("adversary", ["pool", "none", "classifier", "defense"])
def test_training_does_not_change_frozen_networks(
    name: str, adversary: str, frozen: Frozen, train_set: ImageSet
) -> None:
    batch, draws = first_batch(train_set, 32)
    model = untrained(AUTOENCODER)
    section = {"kind": adversary, **(IN_LOOP if adversary in ("classifier", "defense") else {})}
    assert frozen.classifier is not None
    networks = [frozen.classifier, *(teacher.purifier for teacher in frozen.teachers)]
    before = [deepcopy(network.state_dict()) for network in networks]
    stream = torch.get_rng_state()
    loss, _ = bind(name, frozen, adversary=section)(model, batch, 1.0, draws)
    loss.backward()  # type: ignore[no-untyped-call]
    for network, state in zip(networks, before, strict=True):
        assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())
        assert not any(module.training for module in network.modules())
        assert not any(p.grad is not None for p in network.parameters())
    assert all(module.training for module in model.modules())
    assert all(p.grad is not None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), stream), "noise came from the global stream"


def test_the_classification_term_is_minimised(frozen: Frozen, train_set: ImageSet) -> None:
    """The cross-entropy of the purified x' falls faster with lambda than without: the purifier
    minimises it (the `max` of AToP's equation 9 is the attacker's).
    """
    batch, draws = first_batch(train_set)
    ends = []
    for weight in (0.0, 2.0):
        model = untrained(AUTOENCODER)
        optimiser = torch.optim.SGD(model.parameters(), 0.05)
        objective = bind("atop", frozen, **{"lambda": weight})
        for _ in range(15):
            loss, metrics = objective(model, batch, 1.0, draws)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        ends.append(metrics["ce"].item())
    assert ends[1] < ends[0] - 0.02


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("atop", {"lambda": -0.1}),
        ("atop", {"loss": "l2"}),
        ("atop", {"weight": 0.1}),
        ("atop", {"adversary": {"kind": "pool", "steps": 3}}),
        ("atop", {"adversary": {"kind": "classifier", **IN_LOOP, "ramp": 1.5}}),
        ("atop", {"target": "other"}),
        ("distillation", {"nt_input": "both"}),
        ("adversarial_teacher", {"w_adv": float("nan")}),
    ],
)
def test_invalid_settings_are_refused(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        parse(name, **changes)


# MagNet, diffusion networks and GANs


def test_the_target_of_noise_prediction_is_the_noise_that_was_added(train_set: ImageSet) -> None:
    """The loss is zero for a network that knows the image, and so the noise."""
    batch, draws = first_batch(train_set)

    class Oracle(Diffusion):
        def forward(self, z: Tensor, t: Tensor) -> Tensor:
            kept = self.alpha_bar[t].to(z.dtype)[:, None, None, None]
            return (z - kept.sqrt() * self.encode(batch.images)) / (1 - kept).sqrt()

    model = untrained(DDPM)
    model.__class__ = Oracle
    loss, _ = bind("noise_prediction", Frozen(None, (), LINF))(model, batch, 0.5, draws)
    assert loss.item() < 1e-6


def test_drawn_times_cover_the_whole_schedule(train_set: ImageSet) -> None:
    batch, draws = first_batch(train_set, 640)
    seen: list[Tensor] = []
    model = untrained(DDPM)
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    bind("noise_prediction", Frozen(None, (), LINF))(model, batch, 0.5, draws)
    counts = torch.bincount(seen[0], minlength=10)
    assert len(counts) == 10 and counts.min() > 30


@pytest.mark.parametrize("step", range(6))
def test_critic_and_generator_take_turns(step: int, train_set: ImageSet) -> None:
    batch, draws = first_batch(train_set, 16)
    model = untrained(GAN)
    objective = bind("wgan_gp", Frozen(None, (), LINF))
    loss, metrics = objective(model, replace(batch, step=step), 0.5, draws)
    loss.backward()  # type: ignore[no-untyped-call]
    learns = {
        half: any(p.grad is not None for p in getattr(model, half).parameters())
        for half in ("generator", "critic")
    }
    turn = "generator" if step % 3 == 2 else "critic"
    assert learns == {half: half == turn for half in learns}
    assert loss.item() == metrics[turn].item() and set(metrics) == {"loss", "critic", "generator"}


def test_both_networks_of_magnet_are_trained_at_once(train_set: ImageSet) -> None:
    batch, draws = first_batch(train_set)
    loss, metrics = bind("reformer_detectors", Frozen(None, (), LINF), volume=0.0)(
        untrained(MAGNET), batch, 0.5, draws
    )
    model = untrained(MAGNET)
    expected = [F.mse_loss(made, batch.images) for made in model.autoencode(batch.images)]
    assert loss.item() == pytest.approx(sum(expected).item(), rel=1e-5)  # type: ignore[union-attr]
    assert metrics["detector"].item() == pytest.approx(expected[1].item(), rel=1e-5)
