"""Adversarial examples in training: the model they attack, their ball, their noise."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from toys import LINF
from training_toys import IN_LOOP, bind, first_batch

from components.attacks import L2, Linf, violations
from components.data.draws import Draws, NoiseStream
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.purifiers import Purifier
from components.training.contract import Frozen


def gradients(model: nn.Module, loss: Tensor) -> Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


class Spy(Purifier):
    """A purifier that records its inputs, and the mode it was in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        # Mean and deviation of the digits: close to the identity.
        nn.init.constant_(self.norm.weight, 0.376)
        nn.init.constant_(self.norm.bias, 0.305)
        self.seen: list[Tensor] = []
        self.modes: list[bool] = []

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        self.seen.append(x.detach().clone())
        self.modes.append(self.training)
        purified: Tensor = self.norm(x)
        return purified


def test_the_pool_is_used_unchanged(frozen: Frozen, train_set: ImageSet) -> None:
    batch, draws = first_batch(train_set)
    for name in ("adversarial_teacher", "distillation", "atop"):
        spy = Spy().train()
        bind(name, frozen)(spy, batch, 0.01, draws)
        assert batch.attacked is not None
        assert len(spy.seen) == 1 and torch.equal(spy.seen[0], batch.attacked)


@pytest.mark.parametrize("threat", [LINF, L2(norm="l2", eps_l2=1.0)], ids=["linf", "l2"])
@pytest.mark.parametrize("random_start", [True, False])
def test_an_attack_on_the_classifier_stays_in_the_ball_and_fools_it(
    threat: Linf | L2, random_start: bool, frozen: Frozen, train_set: ImageSet
) -> None:
    batch, draws = first_batch(train_set)
    classifier = frozen.classifier
    assert classifier is not None
    spy = Spy().train()
    section = {"kind": "classifier", **IN_LOOP, "random_start": random_start}
    objective = bind("atop", Frozen(classifier, (), threat), adversary=section)
    objective(spy, batch, 1.0, draws)
    assert len(spy.seen) == 1, "an attack on the classifier does not use the purifier"
    attacked = spy.seen[0]
    assert violations(attacked, batch.images, threat) == []
    clean = (classifier(batch.images).argmax(1) == batch.labels).float().mean()
    assert (classifier(attacked).argmax(1) == batch.labels).float().mean() < clean - 0.3
    assert spy.training and not classifier.training


def test_an_attack_on_the_defense_goes_through_the_purifier(
    frozen: Frozen, train_set: ImageSet
) -> None:
    batch, draws = first_batch(train_set)
    classifier = frozen.classifier
    assert classifier is not None
    spy = Spy().train()
    for _ in range(20):
        spy(batch.images)
    spy.seen.clear()
    spy.modes.clear()
    section = {"kind": "defense", **IN_LOOP}
    bind("atop", frozen, adversary=section)(spy, batch, 1.0, draws)
    assert spy.modes == [False] * 3 + [True], "three attack steps in eval mode, then the loss"
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
def test_an_attack_in_the_loop_does_not_change_batch_norm_statistics(
    kind: str, frozen: Frozen, train_set: ImageSet
) -> None:
    """BatchNorm sees x' once, whatever the number of steps of the attack."""
    batch, draws = first_batch(train_set)
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
    batch, draws = first_batch(train_set)
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


def test_the_radius_grows_over_the_ramp(frozen: Frozen, train_set: ImageSet) -> None:
    batch, draws = first_batch(train_set)
    section = {"kind": "classifier", **IN_LOOP, "ramp": 0.5}
    for progress, fraction in ((0.05, 0.1), (0.25, 0.5), (0.5, 1.0), (0.75, 1.0), (1.0, 1.0)):
        spy = Spy().train()
        bind("atop", frozen, adversary=section)(spy, batch, progress, draws)
        distances = LINF.distance(spy.seen[-1], batch.images)
        assert distances.max().item() == pytest.approx(fraction * LINF.eps, abs=1e-6)
    without = {**section, "ramp": 0.0}
    spy = Spy().train()
    bind("atop", frozen, adversary=without)(spy, batch, 0.001, draws)
    assert LINF.distance(spy.seen[-1], batch.images).max() == pytest.approx(LINF.eps, abs=1e-6)


def test_equal_draws_give_equal_examples_and_other_draws_do_not(
    frozen: Frozen, train_set: ImageSet
) -> None:
    batch, draws = first_batch(train_set)
    objective = bind("atop", frozen, adversary={"kind": "classifier", **IN_LOOP, "steps": 1})
    seen = []
    for noise in (draws, draws, Draws(1, "train", draws.ids)):
        spy = Spy().train()
        objective(spy, batch, 1.0, noise)
        seen.append(spy.seen[-1])
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
