"""What a caller gives `limpid.evaluate`: images, labels and a threat, checked and converted."""

from fractions import Fraction

import torch
from torch import Tensor

from components.attacks import L2, Linf
from components.data.image_set import ImageSet
from pipelines.errors import ConfigError

# Fewer images say nothing, and no probe works on them.
LEAST = 32


def as_threat(threat: str | Linf | L2) -> Linf | L2:
    """Return a threat; text is `linf:RADIUS` or `l2:RADIUS`, a fraction or a number, in [0,1].

    Raises ConfigError for another norm, and for a radius that is none.
    """
    if not isinstance(threat, str):
        return threat
    norm, _, radius = threat.partition(":")
    try:
        eps = float(Fraction(radius))
    except (ValueError, ZeroDivisionError):
        eps = 0.0
    if norm not in ("linf", "l2") or eps <= 0 or (norm == "linf" and eps > 1):
        raise ConfigError(
            f"threat is {threat!r}; write linf:8/255 or l2:0.5, with the radius in pixels of [0,1]"
        )
    if norm == "linf":
        return Linf(norm="linf", eps_255=float(255 * Fraction(radius)))
    return L2(norm="l2", eps_l2=eps)


def as_images(images: Tensor, labels: Tensor, first_id: int = 0) -> ImageSet:
    """Return labelled images, rounded to 8 bits a pixel, with ids from `first_id` on.

    `images` are float32 (N,C,H,W) in [0,1] or uint8, `labels` (N,) integers from 0 on. Raises
    ConfigError for anything else, and for too few images.
    """
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        raise ConfigError(
            f"images and labels are {_kind(images)} and {_kind(labels)}; give tensors, for example "
            "by torch.from_numpy"
        )
    images, labels = images.detach().cpu(), labels.detach().cpu()
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ConfigError(
            f"images have shape {tuple(images.shape)}; they must be (N,C,H,W) with 1 or 3 channels"
        )
    if labels.shape != images.shape[:1] or labels.is_floating_point():
        raise ConfigError(
            f"there are {len(images)} images, and labels are {labels.dtype} of shape "
            f"{tuple(labels.shape)}; give one class number an image"
        )
    if len(images) < LEAST:
        raise ConfigError(f"there are {len(images)} images; it takes {LEAST} or more")
    if int(labels.min()) < 0:
        raise ConfigError(f"a label is {int(labels.min())}; classes are numbered from 0")
    names = tuple(str(k) for k in range(int(labels.max()) + 1))
    ids = torch.arange(first_id, first_id + len(images))
    return ImageSet(_levels(images), labels.long(), ids, names)


def _levels(images: Tensor) -> Tensor:
    if images.dtype == torch.uint8:
        return images.contiguous()
    if not images.is_floating_point():
        raise ConfigError(f"images are {images.dtype}; give float32 in [0,1] or uint8")
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise ConfigError(
            f"pixels lie in [{low:.3g}, {high:.3g}]; give them in [0,1], and put the normalisation "
            "into the classifier"
        )
    return (255 * images).round().byte().contiguous()


def _kind(value: object) -> str:
    return type(value).__name__
