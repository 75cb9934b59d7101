"""Fixtures of the tests of training."""

import pytest
from toys import LINF
from training_toys import AUTOENCODER, untrained

from components.models.classifiers import Classifier
from components.training.contract import Frozen, Teacher


@pytest.fixture
def frozen(classifier: Classifier) -> Frozen:
    """The shared classifier and two untrained teachers, an adversarial and a normal one."""
    networks = [untrained(AUTOENCODER, seed).eval().requires_grad_(False) for seed in (1, 2)]
    teachers = [Teacher(networks[0], normal=False), Teacher(networks[1], normal=True)]
    return Frozen(classifier, teachers, LINF)
