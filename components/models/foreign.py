"""Classifiers and purifiers that were written elsewhere, made into what Limpid attacks and judges.

Any `nn.Module` will do. A frozen copy of it is taken, and tried on a few of the caller's images: a
network that cannot be judged as it is ends in one sentence (`ForeignError`). What a network is like
is found out, not believed: whether it is random, and whether a purifier has a usable gradient.

What cannot be found out is the caller's to see to: a network that expects pixels of 0 to 255, or in
[-1,1], takes pixels in [0,1] without a word, and answers badly. `preprocessed` puts what it needs
before it.

A random network draws from torch's global streams. They are forked and seeded for every call, so
that the same key gives the same answer, and the caller's streams stay as they are. One seed serves
the whole batch (`batchwise`): unlike keyed noise, this noise depends on the batch that an image is
in. The streams are those of the process, so only one thread at a time may ask.

A network that was written for keyed noise is taken as it is: a `Purifier`, and a classifier that
says that it is `stochastic` and takes `(x, stream)`.
"""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from components.data.draws import NoiseStream
from components.models.behaviour import is_differentiable, is_random, noise, seeded
from components.models.classifiers import Classifier
from components.models.defense import SeededByBatch, draws_noise
from components.models.precision import full_precision
from components.models.preprocessing import ForeignError, Preprocessed, Size, first_line
from components.models.purifiers.contract import Purifier

__all__ = ["ForeignClassifier", "ForeignError", "ForeignPurifier", "adopt_classifier",
           "adopt_purifier"]  # fmt: skip

# On so many images a network is tried.
TRIED = 8
# Purified pixels may leave [0,1] by rounding.
ROUNDING = 1e-6


class ForeignClassifier(nn.Module, SeededByBatch):
    """A frozen classifier from elsewhere: see `adopt_classifier`.

    `stochastic` says whether its logits depend on noise, `batchwise` whether the noise of an image
    depends on the batch that it is in. `resized` is None, or the size of the images and the size
    that they are brought to inside (`preprocessed`).
    """

    def __init__(
        self, network: nn.Module, stochastic: bool, resized: tuple[Size, Size] | None = None
    ) -> None:
        super().__init__()
        self.network, self.stochastic, self.resized = network, stochastic, resized
        self.batchwise = stochastic
        anchored(self, "cpu")

    def forward(self, x: Tensor, stream: NoiseStream | None = None) -> Tensor:
        """Return logits (N,K) of pixels (N,C,H,W) in [0,1].

        If the classifier is random, its noise is that of `stream`, or fresh without one.
        """
        if not self.stochastic:
            return _logits_of(self.network(x))
        with noise(stream, x):
            return _logits_of(self.network(x))


class ForeignPurifier(Purifier, SeededByBatch):
    """A frozen purifier from elsewhere: see `adopt_purifier`.

    `batchwise` says whether the noise of an image depends on the batch that it is in.
    """

    def __init__(self, network: nn.Module, stochastic: bool, differentiable: bool) -> None:
        super().__init__()
        self.network, self.stochastic, self.differentiable = network, stochastic, differentiable
        self.batchwise = stochastic

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        """Return the purified images (N,C,H,W); noise is that of `stream`, or fresh without one."""
        purified: Tensor
        if not self.stochastic:
            purified = self.network(x)
            return purified
        with noise(stream, x):
            purified = self.network(x)
            return purified

    def _or_fresh(self, stream: NoiseStream | None, x: Tensor) -> NoiseStream | None:
        """Return `stream`: fresh keys would be drawn from the global stream."""
        return stream


@full_precision()
def adopt_classifier(
    network: nn.Module, images: Tensor, classes: int, device: torch.device | str = "cpu"
) -> nn.Module:
    """Return a frozen copy of a classifier, in eval mode, on `device`; `network` stays as it is.

    It maps pixels (N,C,H,W), float32 in [0,1], to logits (N,K) with K of at least `classes`, and is
    tried on the first of `images`. Logits may be the attribute `logits` of what the network
    returns, or the one element of a tuple, list or mapping. Log-probabilities are logits: they
    differ by one number for each image, and cross-entropy, margins, log odds and the
    difference-of-logits ratio are the same without it. Probabilities are not, and are refused.

    The copy is a `ForeignClassifier`, which says whether it is `stochastic`. A deterministic
    `Classifier` of Limpid's own is returned as it is, without that attribute, so that its identity
    stays the same. So is a classifier of keyed noise; what it declares is for the checks to judge.

    Raises ForeignError where that is not possible: no `nn.Module`, no copy of it, a network that
    fails on images of this size or on a single one, other outputs, fewer columns than classes,
    logits that are not finite, probabilities; an answer that depends on the other images of the
    batch, on earlier calls, or on noise that does not come from torch's global streams.
    """
    copy, x = _frozen(network, "classifier", device), _sample(images, device)
    if draws_noise(copy):
        with torch.no_grad():
            _logits(copy, x, classes, NoiseStream(torch.arange(len(x), device=x.device)))
        return anchored(copy, x.device)
    stochastic = is_random(copy, x, "classifier", lambda part: _logits(copy, part, classes))
    if isinstance(copy, Classifier) and not stochastic:
        return copy
    given = (x.shape[2], x.shape[3])
    sizes = [part.resized(given) for part in copy.modules() if isinstance(part, Preprocessed)]
    resized = next(((given, size) for size in sizes if size), None)
    return ForeignClassifier(copy, stochastic, resized).to(device).eval()


@full_precision()
def adopt_purifier(
    network: nn.Module, images: Tensor, device: torch.device | str = "cpu"
) -> Purifier:
    """Return a frozen copy of a purifier, in eval mode, on `device`; `network` stays as it is.

    It maps pixels (N,C,H,W), float32 in [0,1], to pixels of the same kind, and is tried on the
    first of `images`. A `Purifier` is copied as it is; what it declares is for the checks to judge.
    Of any other module two things are found out:

    `stochastic`: whether answers differ under five seeds of torch's global stream. Its noise then
    depends on the batch that an image is in.

    `differentiable`: whether its gradient is right. Single pixels of every image are moved, in
    float64 if the network runs in it, and what comes out must change as the gradient says. A
    network that rounds or detaches is not differentiable, nor is one that rounds and passes the
    gradient straight through, or that casts to half precision.

    Raises ForeignError as `adopt_classifier` does, and for images of another shape or type, outside
    of [0,1], or with values that are not finite. Nothing is clipped silently: that would be another
    purifier.
    """
    copy, x = _frozen(network, "purifier", device), _sample(images, device)
    if isinstance(copy, Purifier):
        # Without a stream it draws fresh keys from the global one.
        with torch.no_grad(), seeded(0, x.device):
            _pixels(copy, x)
        return copy
    stochastic = is_random(copy, x, "purifier", lambda part: _pixels(copy, part))
    return ForeignPurifier(copy, stochastic, is_differentiable(copy, x)).eval()


def resizing(network: nn.Module) -> str:
    """Say that a network resizes images, which makes the radius another threat, or return ""."""
    found = getattr(network, "resized", None)
    if not found:
        return ""
    given, wanted = (f"{height} x {width}" for height, width in found)
    return (
        f"resizes images of {given} to {wanted}: the radius is one on pixels of {given}, another "
        f"threat than the same radius on {wanted}"
    )


def anchored(network: nn.Module, device: torch.device | str) -> nn.Module:
    """Return the network; one without weights gets an empty one, for its device and its type."""
    if next(network.parameters(), None) is None:
        empty = nn.Parameter(torch.zeros(0, device=device), requires_grad=False)
        network.register_parameter("anchor", empty)
    return network


# What is given, what comes out, and the sentence that says what to change


def unwrapped(network: nn.Module) -> nn.Module:
    """Return the network inside of wrappers for several GPUs, and of torch.compile."""
    while isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
        network = network.module
    inner: nn.Module = getattr(network, "_orig_mod", network)
    return inner


def _frozen(network: Any, what: str, device: torch.device | str) -> nn.Module:
    """Return a frozen copy on `device`, in eval mode, out of its wrappers for several GPUs."""
    if not isinstance(network, nn.Module):
        raise ForeignError(
            f"the {what} is {_kind(network)}; it must be a torch.nn.Module: {_cure(network)}"
        )
    network = unwrapped(network)
    if isinstance(network, torch.jit.ScriptModule):
        raise ForeignError(
            f"the {what} is TorchScript, whose code cannot be read for its identity; give the "
            "torch.nn.Module that it was made of"
        )
    try:
        copy: nn.Module = deepcopy(network)
    except Exception as error:
        raise ForeignError(
            f"the {what} cannot be copied ({first_line(error)}); build it anew, or remove what "
            "copy.deepcopy fails on (such as the older form of weight_norm)"
        ) from error
    try:
        return copy.eval().requires_grad_(False).to(device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ForeignError(
            f"the {what} cannot be frozen on {device} ({first_line(error)}); name another device, "
            "or mend the network so that eval mode, freezing and moving work"
        ) from error


def _kind(given: Any) -> str:
    return f"the class {given.__name__}" if isinstance(given, type) else f"a {type(given).__name__}"


def _cure(given: Any) -> str:
    if isinstance(given, type):
        return "call the class to build one"
    if isinstance(given, str | Path | Mapping):
        return "build the network and call its load_state_dict, with read_weights for a file"
    return "write one whose forward calls it"


def _sample(images: Tensor, device: torch.device | str) -> Tensor:
    """Return the first images on `device`, two at least; raise if they are no pixels in [0,1]."""
    if not isinstance(images, Tensor) or images.dtype != torch.float32 or images.ndim != 4:
        kind = (
            f"{images.dtype} of shape {tuple(images.shape)}"
            if isinstance(images, Tensor)
            else (_kind(images))
        )
        raise ForeignError(f"images are {kind}; they must be a float32 tensor (N,C,H,W) in [0,1]")
    x = images[:TRIED].detach()
    if not len(x) or not bool((x >= 0).all() & (x <= 1).all()):
        found = f"lie in [{x.min():.3g}, {x.max():.3g}]" if len(x) else "are not there"
        raise ForeignError(f"pixels {found}; give at least one image, with pixels in [0,1]")
    return (torch.cat([x, 1 - x]) if len(x) == 1 else x).to(device)


def _answer(network: nn.Module, x: Tensor, what: str, *noise: NoiseStream) -> Any:
    try:
        return network(x, *noise)
    except ForeignError:
        raise
    except Exception as error:
        raise ForeignError(
            f"the {what} fails on pixels of shape {tuple(x.shape)} ({first_line(error)}); it must "
            "take any number of images of this size, under torch.no_grad() too: resize or "
            "normalise inside of it (preprocessed), or give it other images"
        ) from error


def _logits_of(answer: Any) -> Tensor:
    """Return the logits in what a classifier returned; without any, what it returned."""
    found = getattr(answer, "logits", answer)
    if isinstance(found, Mapping | tuple | list) and len(found) == 1:
        (found,) = found.values() if isinstance(found, Mapping) else found
    logits: Tensor = found
    return logits


def _require_tensor(found: Any, what: str, wanted: str) -> None:
    if not isinstance(found, Tensor):
        number = f" of {len(found)}" if isinstance(found, Mapping | tuple | list) else ""
        raise ForeignError(
            f"the {what} returns a {type(found).__name__}{number}; it must return {wanted} as one "
            "tensor, so write a module whose forward picks it"
        )


def _logits(network: nn.Module, x: Tensor, classes: int, *noise: NoiseStream) -> Tensor:
    """Return the logits of pixels (N,C,H,W); raise ForeignError if they are none."""
    what = "classifier, called with a stream since it says that it is stochastic," if noise else ""
    logits = _logits_of(_answer(network, x, what or "classifier", *noise))
    _require_tensor(logits, "classifier", "logits (N,K)")
    given = f"the classifier returns {logits.dtype} of shape {tuple(logits.shape)} for {len(x)}"
    if logits.ndim != 2 or len(logits) != len(x):
        raise ForeignError(f"{given} images; it must return logits (N,K), one row for each image")
    if logits.dtype not in (torch.float32, torch.float64):
        raise ForeignError(f"{given} images; logits must be float32, so let it compute in that")
    if logits.shape[1] < classes:
        raise ForeignError(
            f"{given} images; the labels need {classes} classes, so at least as many columns"
        )
    wrong = int((~logits.isfinite().all(1)).sum())
    if wrong:
        raise ForeignError(
            f"the classifier returns inf or nan for {wrong} of {len(x)} images; logits must be "
            "finite: return those before any softmax, and look for overflow"
        )
    if bool(((logits >= 0) & (logits <= 1)).all() and (logits.sum(1) - 1).abs().max() < 1e-3):
        raise ForeignError(
            "the classifier returns probabilities: rows in [0,1] that sum to 1; return the logits, "
            "before the softmax, since attacks stall on saturated probabilities"
        )
    return logits


def _pixels(network: nn.Module, x: Tensor) -> Tensor:
    """Return the purified images of pixels (N,C,H,W); raise ForeignError if they are none."""
    purified: Tensor = _answer(network, x, "purifier")
    _require_tensor(purified, "purifier", "images (N,C,H,W)")
    if purified.shape != x.shape or purified.dtype != torch.float32:
        raise ForeignError(
            f"the purifier returns {purified.dtype} of shape {tuple(purified.shape)} for float32 "
            f"of shape {tuple(x.shape)}; it must return float32 images of the same shape"
        )
    if not bool(purified.isfinite().all()):
        raise ForeignError("the purifier returns inf or nan; pixels must be finite, in [0,1]")
    low, high = float(purified.min()), float(purified.max())
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise ForeignError(
            f"the purifier leaves [0,1] by {max(-low, high - 1):.3g}: its pixels lie in "
            f"[{low:.3g}, {high:.3g}]; scale them, or clip them inside of it if that is meant"
        )
    return purified
