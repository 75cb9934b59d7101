"""The rung `network`: the literal counter-attack A of APuDAE, beside the stand-in `direct`."""

from typing import Any

import pytest
import torch
from toys import LINF, head, keyed, parse_attack, uniform_pixels

from components.attacks import craft
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.defense import Defense, bind, margin
from components.models.one_pass import one_pass
from components.models.purifiers.apudae import Apudae
from components.models.purifiers.contract import Purifier
from components.models.purifiers.denoiser import Denoiser, DenoisingAutoencoder

SHAPE = (1, 8, 8)
APUDAE: dict[str, Any] = {
    "kind": "apudae", "steps": 4, "rate": 0.02, "optimiser": "adam", "target": "minimum",
    "scaled": False, "noise_255": 0.0, "transform": None,
}  # fmt: skip


def denoiser() -> DenoisingAutoencoder:
    torch.manual_seed(0)
    network = Denoiser(kind="denoiser", width=4).build(SHAPE)
    with torch.no_grad():
        network.train()(uniform_pixels(32, SHAPE))
    return network.eval().requires_grad_(False)


def apudae(**changes: Any) -> Purifier:
    return Apudae.model_validate({**APUDAE, **changes}).wrap(denoiser()).eval()


def test_its_gradient_is_that_of_the_classifier_behind_the_network(classifier: Classifier) -> None:
    network, defense = denoiser(), Defense(classifier, apudae()).freeze()
    x, draws, labels = uniform_pixels(6, SHAPE), keyed(6), torch.arange(6)
    point = x.clone().requires_grad_()
    expected = margin(classifier(network(point)), labels)
    (gradient,) = torch.autograd.grad(expected.sum(), point)
    found = bind(one_pass(defense), "full", draws, 1).evaluate(x, labels, margin, 0)
    assert torch.allclose(found.margin, expected.detach(), rtol=0, atol=1e-5)
    assert torch.allclose(found.gradient, gradient, rtol=1e-4, atol=1e-5)
    direct = bind(defense, "direct", draws, 1).evaluate(x, labels, margin, 0)
    assert not torch.allclose(direct.margin, found.margin, rtol=0.01)
    cosine = torch.cosine_similarity(direct.gradient.flatten(1), gradient.flatten(1))
    assert cosine.max() < 0.99, "`direct` takes the classifier's gradient at the descended image"


def test_it_never_runs_the_descent(classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    purifier = apudae()
    attacked = one_pass(Defense(classifier, purifier).freeze())
    monkeypatch.setattr(type(purifier), "purify", None)
    x, labels = uniform_pixels(3, SHAPE), torch.zeros(3, dtype=torch.int64)
    assert bind(attacked, "full", keyed(3), 1).evaluate(x, labels, margin, 0).gradient.any()


def test_images_crafted_on_it_are_judged_by_the_defense(
    classifier: Classifier, test_set: ImageSet
) -> None:
    """One step by hand at f(x); what the attack saw is its own, and success is the defense's."""
    network, defense = denoiser(), Defense(classifier, apudae()).freeze()
    data = head(test_set, 40)
    attack = parse_attack("pgd, last iterate", steps=1, step=1.0, random_start=False, eot=1)
    crafted = craft(attack, defense, "network", data, LINF, 0, 40)
    x, labels = data.pixels(), data.labels
    point = x.clone().requires_grad_()
    logits = classifier(network(point))
    others = logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    odds = others - logits.gather(1, labels[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(odds.sum(), point)
    by_hand = (x + LINF.eps * gradient.sign()).clamp(0, 1)
    assert (crafted.images - by_hand).abs().gt(1e-6).double().mean() < 1e-3
    wrong = defense(crafted.images).argmax(1) != labels
    assert torch.equal(crafted.success, wrong) and torch.equal(crafted.answers == 0, wrong)
    seen = classifier(network(crafted.images)).argmax(1) != labels
    assert torch.equal(crafted.fooled, seen) and not torch.equal(seen, wrong)


def test_a_random_defense_keeps_its_transform_in_the_pass(classifier: Classifier) -> None:
    turned = apudae(transform={"degrees": 5.0, "stretch": 0.1})
    attacked, x = one_pass(Defense(classifier, turned).freeze()), uniform_pixels(3, SHAPE)
    once = attacked(x, keyed(3))
    assert attacked.stochastic and torch.equal(attacked(x, keyed(3)), once)
    assert not torch.equal(attacked(x, keyed(3).redraw(1)), once)


def test_purifiers_without_a_pass_are_refused(classifier: Classifier) -> None:
    for purifier in (None, denoiser()):
        with pytest.raises(ValueError, match="no stand-in direct, so no pass of a network"):
            one_pass(Defense(classifier, purifier).freeze())
