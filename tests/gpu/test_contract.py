"""The checks of `limpid.testing` pass on a GPU for honest objects."""

import pytest
import torch
from synthetic import pgd

from components.models.classifiers import SmallCnn
from limpid.testing import check_attack, check_classifier, check_purifier
from limpid.testing.toys import NoisyBlur

pytestmark = pytest.mark.gpu
SHAPE = (3, 16, 16)


def test_a_purifier_keeps_its_contract(gpu: torch.device) -> None:
    check_purifier(NoisyBlur, shape=SHAPE, device=gpu)


def test_a_classifier_keeps_its_contract(gpu: torch.device) -> None:
    check_classifier(SmallCnn(kind="small_cnn", width=4).build, shape=SHAPE, device=gpu)


def test_an_attack_keeps_its_contract(gpu: torch.device) -> None:
    check_attack(pgd, shape=SHAPE, device=gpu)
