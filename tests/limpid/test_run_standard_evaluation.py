"""`limpid.AutoAttack` is the pipeline's attack under the signature of its authors' class."""

import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from toys import LINF, distances, head, linear_task

import limpid
from components.attacks import autoattack, craft
from components.attacks.autoattack import AutoAttack
from components.data.image_set import ImageSet
from components.models.classifiers import Classifier
from components.models.defense import Defense


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STEPS": 10, "TARGETS": 3, "QUERIES": 40, "EOT": 2}.items():
        monkeypatch.setattr(autoattack, name, value)


def test_it_fools_the_images_that_the_pipeline_fools(
    classifier: Classifier, test_set: ImageSet
) -> None:
    data = head(test_set, 30)
    ours = craft(
        AutoAttack(kind="autoattack", version="standard"), Defense(classifier, None).freeze(),
        "full", ImageSet(data.images, data.labels, torch.arange(30), data.class_names), LINF, 0, 30,
    )  # fmt: skip
    attack = limpid.AutoAttack(classifier, norm="Linf", eps=LINF.eps, verbose=False)
    found = attack.run_standard_evaluation(data.pixels(), data.labels, bs=30)
    right = classifier(found).argmax(1) == data.labels
    assert torch.equal(right, ~ours.success) and 0 < right.sum() < 30
    assert torch.equal(found[right], data.pixels()[right]), "what withstood comes back unchanged"
    assert LINF.distance(found, data.pixels()).max() <= LINF.eps + 1e-6


def test_it_reports_the_exact_accuracy_of_a_linear_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, data = linear_task(5)
    far = distances(model, data, 2)
    eps = float(far.quantile(0.4))
    attack = limpid.AutoAttack(model, norm="L2", eps=eps)
    attack.run_standard_evaluation(data.pixels(), data.labels)
    *parts, last = capsys.readouterr().out.splitlines()
    assert [line.split("after ")[1].split()[0] for line in parts] == [
        "apgd_ce", "apgd_t", "fab_t", "square",
    ]  # fmt: skip
    assert last == "robust accuracy (worst of all attacks): 60.00% of 200 images"


def test_the_model_stays_as_it_is(classifier: Classifier, test_set: ImageSet) -> None:
    model = deepcopy(classifier).train().requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attack = limpid.AutoAttack(model, eps=0.1, verbose=False)
    attack.run_standard_evaluation(head(test_set, 4).pixels(), head(test_set, 4).labels)
    assert model.training and all(one.requires_grad for one in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_random_model_takes_the_version_rand(classifier: Classifier, test_set: ImageSet) -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = classifier(x + 0.05 * torch.randn_like(x))
            return logits

    data, state = head(test_set, 20), torch.get_rng_state()
    attack = limpid.AutoAttack(Noisy(), eps=0.2, version="rand", verbose=False)
    found = attack.run_standard_evaluation(data.pixels(), data.labels)
    assert torch.equal(torch.get_rng_state(), state)
    again = limpid.AutoAttack(Noisy(), eps=0.2, version="rand", verbose=False)
    assert torch.equal(again.run_standard_evaluation(data.pixels(), data.labels), found)
    right = classifier(found).argmax(1) == data.labels
    assert (
        right.float().mean() < (classifier(data.pixels()).argmax(1) == data.labels).float().mean()
    )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"norm": "L1"}, "norm is 'L1'; it may be Linf or L2"),
        ({"version": "plus"}, "version is 'plus'; it may be standard or rand"),
        ({"eps": 0.0}, "eps is 0.0; a radius is above 0"),
    ],
)
def test_what_it_has_not_is_named(
    settings: dict[str, object], sentence: str, classifier: Classifier
) -> None:
    with pytest.raises(ValueError, match=sentence):
        limpid.AutoAttack(classifier, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        (torch.full((2, 1, 8, 8), 255.0), r"pixels lie in \[255, 255\]; they must lie in \[0,1\]"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "images are torch.uint8"),
        (torch.full((2, 1, 8, 8), torch.nan), "must lie in"),
        (torch.zeros(3, 1, 8, 8), r"there are 3 images and labels of shape \(2,\)"),
    ],
)
def test_images_that_cannot_be_attacked_are_refused(
    x: Tensor, sentence: str, classifier: Classifier
) -> None:
    attack = limpid.AutoAttack(classifier, verbose=False)
    with pytest.raises(ValueError, match=sentence):
        attack.run_standard_evaluation(x, torch.zeros(2, dtype=torch.int64))


def test_importing_limpid_does_not_import_torch() -> None:
    code = "import sys, limpid; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="limpid has no Attack; it has AutoAttack"):
        _ = limpid.Attack
