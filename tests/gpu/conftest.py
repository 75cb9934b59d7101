"""A small trained network, and how many images a test takes."""

import pytest
import torch
from synthetic import SHAPE, images, trained
from torch import nn

from components.data.image_set import ImageSet
from components.models.classifiers import SmallCnn


@pytest.fixture(scope="session")
def count() -> int:
    """Images that an attack takes; a rehearsal is to be cheap."""
    return 24 if torch.cuda.is_available() else 4


@pytest.fixture(scope="session")
def train_images() -> ImageSet:
    return images(400, SHAPE, seed=1)


@pytest.fixture(scope="session")
def network(train_images: ImageSet) -> nn.Module:
    """A network trained on the CPU, of which 8/255 leaves about half of the images."""
    return trained(SmallCnn(kind="small_cnn", width=8), train_images, torch.device("cpu"), 6)
