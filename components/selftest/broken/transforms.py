"""Purifiers that transform the image at random: total variation, pixel deflection."""

import torch
from torch import Tensor
from torch.nn import functional as F

from components.data.draws import Draws, NoiseStream
from components.data.image_set import ImageSet
from components.models.purifiers import Purifier
from components.selftest.broken.parts import SMALL, Built, built
from components.selftest.toy import Toy, train_classifier

# How often every training image is transformed for the classifier behind total variation.
COPIES = 3


class _TotalVariation(Purifier):
    """Drops pixels at random and fits the rest by an image of little total variation.

    The solver is taken as a black box, without gradient.
    """

    differentiable = False
    stochastic = True

    def __init__(self, dropped: float, weight: float, steps: int) -> None:
        super().__init__()
        self.dropped, self.weight, self.steps = dropped, weight, steps

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        assert stream is not None
        kept = (stream.uniform(tuple(x.shape[1:]), "kept") >= self.dropped).to(x.dtype)
        with torch.no_grad():
            z = kept * x
            for _ in range(self.steps):
                z = z - 0.2 * (2 * kept * (z - x) + self.weight * _bending(z))
        return z.clamp(0, 1)


def _bending(z: Tensor) -> Tensor:
    """Return the gradient of the total variation of images (N,C,H,W), smoothed at zero."""
    bending = torch.zeros_like(z)
    for axis in (2, 3):
        length = z.shape[axis] - 1
        change = z.diff(dim=axis)
        pull = change / (change.square() + 1e-2).sqrt()
        bending.narrow(axis, 1, length).add_(pull)
        bending.narrow(axis, 0, length).sub_(pull)
    return bending


def total_variation(toy: Toy) -> Built:
    """Total variation minimisation (Guo, Rana, Cisse and van der Maaten 2018).

    A pixel is kept with probability 0.5, as in the paper, and the classifier is trained on images
    that went through it. The variation is smoothed and solved by 30 gradient steps.
    """
    purifier = _TotalVariation(0.5, 0.06, 30)
    clean, draws = toy.train.pixels(), Draws(0, "train", toy.train.ids)
    seen = torch.cat([purifier(clean, draws.redraw(k).stream()) for k in range(COPIES)])
    many = toy.train[torch.arange(len(clean)).repeat(COPIES)]
    levels = (255 * seen).round().to(torch.uint8)
    classifier = train_classifier(
        SMALL, ImageSet(levels, many.labels, torch.arange(len(many)), many.class_names)
    )
    return built(classifier, purifier, classifier)


class _PixelDeflection(Purifier):
    """Replaces `count` random pixels by random neighbours, and shrinks wavelet details."""

    stochastic = True

    def __init__(self, count: int, reach: int, shrink: float) -> None:
        super().__init__()
        self.count, self.reach, self.shrink = count, reach, shrink

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        assert stream is not None
        height, width = x.shape[2:]
        moved = stream.permutation(height * width, "deflected")[:, : self.count]
        span = 2 * self.reach + 1
        offsets = (span * stream.uniform((2, self.count), "offset")).long() - self.reach
        row = (moved // width + offsets[:, 0]).clamp(0, height - 1)
        column = (moved % width + offsets[:, 1]).clamp(0, width - 1)
        source = torch.arange(height * width, device=x.device).repeat(len(x), 1)
        source = source.scatter(1, moved, row * width + column)[:, None].expand(-1, x.shape[1], -1)
        return self._denoised(x.flatten(2).gather(2, source).view_as(x)).clamp(0, 1)

    def _denoised(self, x: Tensor) -> Tensor:
        """Shrink the details of one level of the Haar wavelet softly."""
        a, b, c, d = (x[:, :, i::2, j::2] for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)))
        mean = (a + b + c + d) / 2
        h, v, g = (
            F.softshrink(detail / 2, self.shrink)
            for detail in (a - b + c - d, a + b - c - d, a - b - c + d)
        )
        blocks = ((mean + h + v + g), (mean - h + v - g), (mean + h - v - g), (mean - h - v + g))
        return F.pixel_shuffle(torch.stack(blocks, 2).flatten(1, 2) / 2, 2)


def pixel_deflection(toy: Toy) -> Built:
    """Pixel deflection (Prakash, Moran, Garber, DiLillo and Storer 2018).

    Ten of 64 pixels, from up to two pixels away, without the map of important pixels. The wavelet
    is Haar, one level, with one threshold for all details.
    """
    return built(toy.classifier, _PixelDeflection(10, 2, 0.04), toy.classifier)
