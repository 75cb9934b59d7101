"""What the broken defenses share: a small classifier, its training, and what a build returns."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from components.data.draws import Draws
from components.data.image_set import Shape
from components.models.classifiers import Classifier, SmallCnn
from components.models.defense import Defense
from components.models.purifiers import Purifier
from components.training.contract import Batch, Metrics

SMALL = SmallCnn(kind="small_cnn", width=8)
EPOCHS = 5
CLASSES = 10

# A defense, and the bare net that it protects.
Built = tuple[Defense, Defense]


def built(classifier: nn.Module, purifier: Purifier | None, base: nn.Module) -> Built:
    """Return the frozen defense, and its base net as a defense without purifier."""
    return Defense(classifier, purifier).freeze(), Defense(base, None).freeze()


def untrained(shape: Shape) -> Classifier:
    """Return the small classifier with its initial weights, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SMALL.build(shape, CLASSES)


def plain(model: nn.Module, batch: Batch, progress: float, draws: Draws) -> tuple[Tensor, Metrics]:
    """Return the cross-entropy: an objective of training."""
    loss = F.cross_entropy(model(batch.images), batch.labels)
    return loss, {"loss": loss}
