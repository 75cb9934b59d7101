"""Every loss has the value and the sign of its formula, and its gradient goes where it should."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F
from toys import LINF

from components.attacks import L2, Linf, violations
from components.data.draws import Draws
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.purifiers import Purifier, PurifierConfig
from components.models.purifiers.diffusion.ddpm import Diffusion
from components.training.atop import Atop
from components.training.contract import (
    LOSS_ATTACKED,
    LOSS_CLEAN,
    Adversary,
    Batch,
    Frozen,
    Objective,
)
from components.training.koo import Distillation, distance, relativistic
from components.training.objectives import ClassifierObjective, PurifierObjective

INNER = {
    "kind": "conv_autoencoder", "blocks": 3, "width": 6, "strided": [], "residual": "global",
}  # fmt: skip
NOISY = {
    "kind": "random_transform", "inner": INNER,
    "transform": {"kind": "rt2", "patch": 2, "missing": 0.25, "sigma": 0.1},
}  # fmt: skip
MAGNET = {"kind": "magnet", "width": 3}
GAN = {"kind": "gan", "latent": 16, "width": 4}
DDPM = {
    "kind": "ddpm", "width": 4, "steps": 10, "beta_start": 0.0001, "beta_end": 0.2,
    "centred": False, "norm_input": True,
}  # fmt: skip
POOL = {"kind": "pool"}
IN_LOOP = {"steps": 3, "step": 0.5, "random_start": True, "ramp": 0.0}
TEACHER = {"kind": "adversarial_teacher", "adversary": POOL, "w_adv": 1.0, "w_classification": 0.0}
DISTILLATION = {
    "kind": "distillation", "adversary": POOL, "beta": 0.5, "gamma": 0.5, "nt_input": "clean",
    "w_classification": 0.0,
}  # fmt: skip
ATOP = {"kind": "atop", "adversary": POOL, "lambda": 0.1, "target": "clean", "w_clean": 0.0}
ROBUST = {"kind": "adversarial_classification", "attack": IN_LOOP, "w_clean": 0.5}
SECTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "classification": (ClassifierObjective, {"kind": "classification"}),
    "adversarial_classification": (ClassifierObjective, ROBUST),
    "normal_teacher": (PurifierObjective, {"kind": "normal_teacher"}),
    "adversarial_teacher": (PurifierObjective, TEACHER),
    "reconstruction": (PurifierObjective, {"kind": "reconstruction"}),
    "distillation": (Distillation, DISTILLATION),
    "atop": (Atop, ATOP),
    "denoising": (PurifierObjective, {"kind": "denoising", "sigma_max": 0.3}),
    "reformer_detectors": (PurifierObjective, {"kind": "reformer_detectors", "volume": 0.1}),
    "noise_prediction": (PurifierObjective, {"kind": "noise_prediction"}),
    "wgan_gp": (PurifierObjective, {"kind": "wgan_gp", "critic_steps": 2}),
}


def parse(name: str, **changes: Any) -> Any:
    union, section = SECTIONS[name]
    return TypeAdapter(union).validate_python({**section, **changes})


def bind(name: str, frozen: Frozen, **changes: Any) -> Objective:
    objective: Objective = parse(name, **changes).bind(frozen)
    return objective


def purifier(config: dict[str, Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    built = TypeAdapter(PurifierConfig).validate_python(config).build((1, 8, 8))
    return built.train()


def batch_of(data: ImageSet, count: int = 64) -> tuple[Batch, Draws]:
    some = data[torch.arange(count)]
    draws = Draws(0, "train", some.ids)
    moved = LINF.start(some.pixels(), draws, "pool")
    return Batch(some.pixels(), some.labels, moved), draws


@pytest.fixture
def frozen(classifier: Classifier) -> Frozen:
    teachers = [purifier(INNER, seed).eval().requires_grad_(False) for seed in (1, 2)]
    return Frozen(classifier, teachers, LINF)


def gradients(model: nn.Module, loss: Tensor) -> Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def test_the_table_has_every_kind() -> None:
    kinds = set()
    for union in (ClassifierObjective, PurifierObjective):
        for member in get_args(get_args(union)[0]):
            kinds |= set(get_args(member.model_fields["kind"].annotation))
    assert kinds | {"distillation", "atop"} == set(SECTIONS)
    adversaries = get_args(get_args(Adversary)[0])
    assert {k for m in adversaries for k in get_args(m.model_fields["kind"].annotation)} == {
        "pool", "classifier", "defense",
    }  # fmt: skip


# The parts


def test_the_relativistic_loss_is_a_softplus_of_log_probabilities() -> None:
    """-log sigmoid(log p_out - log adv_out), by hand for p_out = 0.8, adv_out = 0.2: ratio 4."""
    purified, attacked = torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.2, 0.8]]).log()
    found = relativistic(purified, attacked, torch.tensor([0]))
    assert found.item() == pytest.approx(-math.log(4 / 5), abs=1e-6)
    assert relativistic(attacked, purified, torch.tensor([0])).item() == pytest.approx(math.log(5))
    same = relativistic(attacked + 3, attacked, torch.tensor([1]))
    assert same.item() == pytest.approx(math.log(2)), "a shift of all logits is of no account"


def test_the_relativistic_loss_falls_as_the_true_class_gets_likelier() -> None:
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


def test_the_distance_by_hand() -> None:
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


def test_the_distance_teaches_the_student_only() -> None:
    teacher = torch.rand(2, 1, 4, 4, requires_grad=True)
    student = torch.rand(2, 1, 4, 4, requires_grad=True)
    value = distance(teacher, student)
    to_teacher, to_student = torch.autograd.grad(value, (teacher, student), allow_unused=True)
    assert to_teacher is None and to_student.abs().max() > 0
    closer = distance(teacher, student - 0.5 * to_student)
    assert closer < value


# Objectives against formulas written out


def expected_teacher(section: dict[str, Any], parts: dict[str, Tensor]) -> Tensor:
    score = parts["true_purified"] - parts["true_attacked"]
    adv = -torch.sigmoid(score).log().mean()
    loss = parts["mse"] + section["w_adv"] * adv
    return loss + section["w_classification"] * (parts["ce"] + parts["ce_clean"])


def expected_distillation(section: dict[str, Any], parts: dict[str, Tensor]) -> Tensor:
    shown = "clean" if section["nt_input"] == "clean" else "attacked"
    kd = (parts["to_adversarial"] + parts[f"to_normal_{shown}"]) / 2
    loss = section["beta"] * parts["mse"] + section["gamma"] * kd
    return loss + section["w_classification"] * (parts["ce"] + parts["ce_clean"])


def expected_atop(section: dict[str, Any], parts: dict[str, Tensor]) -> Tensor:
    original = parts["mse"] if section["target"] == "clean" else parts["mse_attacked"]
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
]


@pytest.mark.parametrize(("name", "expected", "changes"), FORMULAS)
@pytest.mark.parametrize("config", [INNER, NOISY], ids=["deterministic", "stochastic"])
def test_the_loss_is_its_formula(
    name: str,
    expected: Callable[[dict[str, Any], dict[str, Tensor]], Tensor],
    changes: dict[str, Any],
    config: dict[str, Any],
    frozen: Frozen,
    train_set: ImageSet,
) -> None:
    batch, draws = batch_of(train_set)
    model = purifier(config)
    twin = deepcopy(model)
    loss, metrics = bind(name, frozen, **changes)(model, batch, 0.5, draws)
    assert batch.attacked is not None and frozen.classifier is not None
    purified = twin(batch.attacked, draws.redraw(LOSS_ATTACKED))
    logits, behind = frozen.classifier(purified), frozen.classifier(batch.attacked)
    rows = torch.arange(len(batch.labels))
    adversarial, normal = frozen.teachers
    parts = {
        "mse": (purified - batch.images).square().mean(),
        "mse_attacked": (purified - batch.attacked).square().mean(),
        "true_purified": logits.softmax(1)[rows, batch.labels].log(),
        "true_attacked": behind.softmax(1)[rows, batch.labels].log(),
        "ce": -logits.softmax(1)[rows, batch.labels].log().mean(),
        "to_adversarial": distance(adversarial(batch.attacked), purified),
        "to_normal_clean": distance(normal(batch.images), purified),
        "to_normal_attacked": distance(normal(batch.attacked), purified),
    }
    clean = frozen.classifier(twin(batch.images, draws.redraw(LOSS_CLEAN)))
    parts["ce_clean"] = -clean.softmax(1)[rows, batch.labels].log().mean()
    by_hand = expected({**SECTIONS[name][1], **changes}, parts)
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-4)
    assert metrics["loss"].item() == loss.item()
    right = (logits.argmax(1) == batch.labels).float().mean()
    assert metrics["accuracy_attacked"].item() == pytest.approx(right.item())


def test_plain_losses_are_their_formulas(frozen: Frozen, train_set: ImageSet) -> None:
    batch, draws = batch_of(train_set)
    for name in ("normal_teacher", "reconstruction"):
        model = purifier(NOISY)
        loss, _ = bind(name, frozen)(model, batch, 0.5, draws)
        repeated = F.mse_loss(purifier(NOISY)(batch.images, draws), batch.images)
        assert loss.item() == pytest.approx(repeated.item())
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
    batch, draws = batch_of(train_set)
    own = {"reformer_detectors": MAGNET, "noise_prediction": DDPM, "wgan_gp": GAN}
    model: nn.Module = purifier(own.get(name, INNER))
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
        # Always the critic's turn, where turns are taken.
        loss, _ = objective(model, batch, 1.0, draws)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert losses[-1] < losses[0]
    assert sum(later < sooner for sooner, later in pairwise(losses)) >= 6


@pytest.mark.parametrize("name", ["adversarial_teacher", "distillation", "atop"])
@pytest.mark.parametrize("adversary", ["pool", "classifier", "defense"])
def test_frozen_networks_stay_as_they_are(
    name: str, adversary: str, frozen: Frozen, train_set: ImageSet
) -> None:
    batch, draws = batch_of(train_set, 32)
    model = purifier(INNER)
    section = POOL if adversary == "pool" else {"kind": adversary, **IN_LOOP}
    assert frozen.classifier is not None
    networks = [frozen.classifier, *frozen.teachers]
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
    assert torch.equal(torch.get_rng_state(), stream), "noise that is not keyed"


def test_the_classification_term_pulls_where_the_formula_says(
    frozen: Frozen, train_set: ImageSet
) -> None:
    """With lambda the cross-entropy of the purified x' falls faster than without: it is minimised
    over the purifier, never maximised (the `max` of AToP's equation 9 is the attacker's).
    """
    batch, draws = batch_of(train_set)
    ends = []
    for weight in (0.0, 2.0):
        model = purifier(INNER)
        optimiser = torch.optim.SGD(model.parameters(), 0.05)
        objective = bind("atop", frozen, **{"lambda": weight})
        for _ in range(15):
            loss, metrics = objective(model, batch, 1.0, draws)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        ends.append(metrics["ce"].item())
    assert ends[1] < ends[0] - 0.02


# Whom x' attacks


class Spy(Purifier):
    """A purifier that remembers what it was shown, and in which mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        # The mean and the deviation of digits: as good as the identity.
        nn.init.constant_(self.norm.weight, 0.376)
        nn.init.constant_(self.norm.bias, 0.305)
        self.seen: list[Tensor] = []
        self.modes: list[bool] = []

    def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
        self.seen.append(x.detach().clone())
        self.modes.append(self.training)
        purified: Tensor = self.norm(x)
        return purified


def test_the_pool_is_used_as_it_is(frozen: Frozen, train_set: ImageSet) -> None:
    batch, draws = batch_of(train_set)
    for name in ("adversarial_teacher", "distillation", "atop"):
        spy = Spy().train()
        bind(name, frozen)(spy, batch, 0.01, draws)
        assert batch.attacked is not None
        assert len(spy.seen) == 1 and torch.equal(spy.seen[0], batch.attacked)


@pytest.mark.parametrize("threat", [LINF, L2(norm="l2", eps_l2=1.0)], ids=["linf", "l2"])
@pytest.mark.parametrize("random_start", [True, False])
def test_an_attack_on_the_classifier_keeps_the_ball_and_fools_it(
    threat: Linf | L2, random_start: bool, frozen: Frozen, train_set: ImageSet
) -> None:
    batch, draws = batch_of(train_set)
    classifier = frozen.classifier
    assert classifier is not None
    spy = Spy().train()
    section = {"kind": "classifier", **IN_LOOP, "random_start": random_start}
    objective = bind("atop", Frozen(classifier, (), threat), adversary=section)
    objective(spy, batch, 1.0, draws)
    assert len(spy.seen) == 1, "an attack on the classifier does not know the purifier"
    attacked = spy.seen[0]
    assert violations(attacked, batch.images, threat) == []
    clean = (classifier(batch.images).argmax(1) == batch.labels).float().mean()
    assert (classifier(attacked).argmax(1) == batch.labels).float().mean() < clean - 0.3
    assert spy.training and not classifier.training


def test_an_attack_on_the_defense_goes_through_the_purifier(
    frozen: Frozen, train_set: ImageSet
) -> None:
    batch, draws = batch_of(train_set)
    classifier = frozen.classifier
    assert classifier is not None
    spy = Spy().train()
    for _ in range(20):
        spy(batch.images)
    spy.seen.clear()
    spy.modes.clear()
    section = {"kind": "defense", **IN_LOOP}
    bind("atop", frozen, adversary=section)(spy, batch, 1.0, draws)
    assert spy.modes == [False] * 3 + [True], "three looks in eval mode, then one to learn from"
    attacked = spy.seen[-1]
    assert violations(attacked, batch.images, LINF) == []
    spy.eval()
    clean, broken = (
        (classifier(spy(x)).argmax(1) == batch.labels).float().mean()
        for x in (batch.images, attacked)
    )
    assert broken < clean - 0.3
    noise = LINF.start(batch.images, draws, "other")
    assert broken < (classifier(spy(noise)).argmax(1) == batch.labels).float().mean() - 0.2


@pytest.mark.parametrize("kind", ["classifier", "defense"])
def test_an_attack_in_the_loop_leaves_batch_statistics_alone(
    kind: str, frozen: Frozen, train_set: ImageSet
) -> None:
    """What BatchNorm learns from is x', once, whatever number of steps the attack took."""
    batch, draws = batch_of(train_set)
    for steps in (1, 4):
        spy = Spy().train()
        section = {**IN_LOOP, "kind": kind, "steps": steps}
        bind("atop", frozen, adversary=section)(spy, batch, 1.0, draws)
        assert spy.norm.num_batches_tracked is not None and spy.norm.running_mean is not None
        assert spy.norm.num_batches_tracked.item() == 1
        assert spy.norm.running_mean.item() == pytest.approx(0.1 * spy.seen[-1].mean().item())


def test_adversarial_training_attacks_the_model_in_eval_mode(
    classifier: Classifier, train_set: ImageSet
) -> None:
    batch, draws = batch_of(train_set)
    model = deepcopy(classifier).requires_grad_(True).train()
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    before = norm.num_batches_tracked
    assert before is not None
    count = before.item()
    seen: list[tuple[bool, Tensor]] = []
    model.register_forward_pre_hook(lambda m, args: seen.append((m.training, args[0].detach())))
    loss, metrics = bind("adversarial_classification", Frozen(None, (), LINF))(
        model, batch, 1.0, draws
    )
    assert [training for training, _ in seen] == [False] * 3 + [True] * 2
    assert norm.num_batches_tracked is not None
    assert norm.num_batches_tracked.item() == count + 2
    assert violations(seen[3][1], batch.images, LINF) == []
    assert torch.equal(seen[4][1], batch.images)
    assert metrics["accuracy_attacked"] < 0.7 and model.training
    assert not any(p.grad is not None for p in model.parameters()), "the attack left gradients"
    assert gradients(model, loss).abs().max() > 0


def test_a_ramp_lets_the_radius_grow(frozen: Frozen, train_set: ImageSet) -> None:
    batch, draws = batch_of(train_set)
    section = {"kind": "classifier", **IN_LOOP, "ramp": 0.5}
    for progress, share in ((0.05, 0.1), (0.25, 0.5), (0.5, 1.0), (0.75, 1.0), (1.0, 1.0)):
        spy = Spy().train()
        bind("atop", frozen, adversary=section)(spy, batch, progress, draws)
        reach = LINF.distance(spy.seen[-1], batch.images)
        assert reach.max().item() == pytest.approx(share * LINF.eps, abs=1e-6)
    without = {**section, "ramp": 0.0}
    spy = Spy().train()
    bind("atop", frozen, adversary=without)(spy, batch, 0.001, draws)
    assert LINF.distance(spy.seen[-1], batch.images).max() == pytest.approx(LINF.eps, abs=1e-6)


def test_equal_draws_give_equal_examples_and_others_do_not(
    frozen: Frozen, train_set: ImageSet
) -> None:
    batch, draws = batch_of(train_set)
    objective = bind("atop", frozen, adversary={"kind": "classifier", **IN_LOOP, "steps": 1})
    seen = []
    for noise in (draws, draws, Draws(1, "train", draws.ids)):
        spy = Spy().train()
        objective(spy, batch, 1.0, noise)
        seen.append(spy.seen[-1])
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("atop", {"lambda": -0.1}),
        ("atop", {"weight": 0.1}),
        ("atop", {"adversary": {"kind": "pool", "steps": 3}}),
        ("atop", {"adversary": {"kind": "classifier", **IN_LOOP, "ramp": 1.5}}),
        ("atop", {"target": "other"}),
        ("distillation", {"nt_input": "both"}),
        ("adversarial_teacher", {"w_adv": float("nan")}),
    ],
)
def test_settings_that_make_no_loss_are_refused(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        parse(name, **changes)


# Networks with a training of their own


def test_the_noise_to_predict_is_what_was_mixed_in(train_set: ImageSet) -> None:
    """A network that is told the image finds the noise, and its loss is zero."""
    batch, draws = batch_of(train_set)

    class Oracle(Diffusion):
        def forward(self, z: Tensor, t: Tensor) -> Tensor:
            kept = self.alpha_bar[t].to(z.dtype)[:, None, None, None]
            return (z - kept.sqrt() * self.encode(batch.images)) / (1 - kept).sqrt()

    model = purifier(DDPM)
    model.__class__ = Oracle
    loss, _ = bind("noise_prediction", Frozen(None, (), LINF))(model, batch, 0.5, draws)
    assert loss.item() < 1e-6


def test_times_cover_the_whole_schedule(train_set: ImageSet) -> None:
    batch, draws = batch_of(train_set, 640)
    seen: list[Tensor] = []
    model = purifier(DDPM)
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    bind("noise_prediction", Frozen(None, (), LINF))(model, batch, 0.5, draws)
    counts = torch.bincount(seen[0], minlength=10)
    assert len(counts) == 10 and counts.min() > 30


@pytest.mark.parametrize("step", range(6))
def test_critic_and_generator_take_turns(step: int, train_set: ImageSet) -> None:
    batch, draws = batch_of(train_set, 16)
    model = purifier(GAN)
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


def test_magnets_two_networks_learn_at_once(train_set: ImageSet) -> None:
    batch, draws = batch_of(train_set)
    loss, metrics = bind("reformer_detectors", Frozen(None, (), LINF), volume=0.0)(
        purifier(MAGNET), batch, 0.5, draws
    )
    model = purifier(MAGNET)
    expected = [F.mse_loss(made, batch.images) for made in model.autoencode(batch.images)]
    assert loss.item() == pytest.approx(sum(expected).item(), rel=1e-5)  # type: ignore[union-attr]
    assert metrics["detector"].item() == pytest.approx(expected[1].item(), rel=1e-5)
