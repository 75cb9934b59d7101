"""MI-FGSM by torchattacks equals the library's, and the library's side effects stay outside."""

from copy import deepcopy

import pytest
import torch
import torchattacks
from torch import Tensor, nn
from toy_networks import Function, Noisy
from toys import BALL, LINF, attack_model, fooled, grey_images, head, thresholded

from components.attacks import violations
from components.attacks.library import MiFgsm, run_torchattack
from components.data.draws import Draws
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.defense import Defense, bind

MI_FGSM = MiFgsm(kind="mi_fgsm", steps=6, step=0.25, decay=1.0)


def test_mi_fgsm_equals_torchattacks_on_correctly_classified_images(
    classifier: Classifier, test_set: ImageSet
) -> None:
    data = head(test_set, 60)
    crafted = attack_model(MI_FGSM, classifier, data, LINF)
    right = classifier(data.pixels()).argmax(1) == data.labels
    attack = torchattacks.MIFGSM(classifier, LINF.eps, 0.25 * LINF.eps, 6, 1.0)
    theirs = attack.forward(data.pixels()[right], data.labels[right])
    assert torch.allclose(crafted.images[right], theirs, atol=1e-5)
    assert (crafted.iterations[right] == 6).all() and (crafted.backward[right] == 6).all()
    assert (crafted.forward[right] == 8).all() and (crafted.forward[~right] == 1).all()
    assert fooled(crafted) > 40


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_mi_fgsm_accumulates_normalised_gradients(decay: float) -> None:
    """Two steps pass the kink at 0.56, where the gradient changes sign; momentum carries on."""

    def logits(x: Tensor) -> Tensor:
        value = 6 + 10 * (x[:, 0, 0, 0] - 0.56).abs() - x[:, 0, 0, 1]
        return torch.stack([value, 0 * value], 1)

    data = ImageSet(
        torch.tensor([[[[127, 140]]]], dtype=torch.uint8), torch.zeros(1).long(), torch.arange(1),
        tuple("ab"),
    )  # fmt: skip
    attack = MiFgsm(kind="mi_fgsm", steps=3, step=0.3, decay=decay)
    moved = (
        attack_model(attack, Function(logits), data, LINF).images - data.pixels()
    ).flatten() / LINF.eps
    assert moved.tolist() == pytest.approx([0.9 if decay else 0.3, 0.9], abs=1e-5)


def test_an_image_stays_where_its_gradient_vanishes() -> None:
    """The library divides by the length of the gradient: NaN must not reach an image."""

    def logits(x: Tensor) -> Tensor:
        flat = x.flatten(1)
        value = torch.where(flat.mean(1) > 0.55, 1.0 + 0 * flat.sum(1), 40 - 60 * flat.mean(1))
        return torch.stack([value, 0 * value], 1)

    data = grey_images(20)
    crafted = attack_model(MI_FGSM, Function(logits), data, LINF)
    means = crafted.images.mean((1, 2, 3))
    assert crafted.images.isfinite().all() and (means > 0.55).all() and (means < 0.59).all()
    void = attack_model(MI_FGSM, thresholded(Function(logits)), data, LINF)
    assert torch.equal(void.images, data.pixels())


def test_side_effects_of_torchattacks_stay_outside(
    classifier: Classifier, test_set: ImageSet
) -> None:
    """The attack reseeds, sets train mode, leaves gradients behind and leaves the ball."""

    class Careless(torchattacks.attack.Attack):  # type: ignore[misc]
        def __init__(self, model: nn.Module) -> None:
            super().__init__("Careless", model)

        def forward(self, images: Tensor, labels: Tensor) -> Tensor:
            torch.manual_seed(17)
            self.model.train()
            x = images.clone().requires_grad_()
            logits = self.get_logits(x)
            nn.functional.cross_entropy(logits, labels).backward()
            assert x.grad is not None
            return images + 2 * x.grad.sign()

    data, model = head(test_set, 30), deepcopy(classifier).requires_grad_(True)
    draws = Draws(0, "attack", data.ids)
    target = bind(Defense(model, None).eval(), "full", draws, 1)
    stream = torch.get_rng_state()
    outcome = run_torchattack(Careless, 1, target, data.pixels(), data.labels, LINF)
    assert torch.equal(torch.get_rng_state(), stream)
    assert not any(module.training for module in model.modules())
    assert not any(p.grad is not None or not p.requires_grad for p in model.parameters())
    assert violations(outcome.images, data.pixels(), LINF) == []
    right = model(data.pixels()).argmax(1) == data.labels
    assert torch.equal(target.passes.backward, right.long())
    assert torch.equal(target.passes.forward, 1 + 2 * right.long())
    logits = model(outcome.images).detach()
    true = logits.gather(1, data.labels[:, None]).squeeze(1)
    rest = logits.scatter(1, data.labels[:, None], -torch.inf).amax(1)
    assert torch.allclose(outcome.margin, true - rest, atol=1e-4), (
        "the margin is not that of the returned images"
    )


def test_mi_fgsm_refuses_stochastic_defenses_and_l2(
    classifier: Classifier, test_set: ImageSet
) -> None:
    data = head(test_set, 2)
    with pytest.raises(ValueError, match=r"mi_fgsm cannot bind noise .* not for stochastic"):
        attack_model(MI_FGSM, Defense(classifier, Noisy()), data, LINF)
    with pytest.raises(ValueError, match="for linf threats only, not l2"):
        attack_model(MI_FGSM, classifier, data, BALL)
