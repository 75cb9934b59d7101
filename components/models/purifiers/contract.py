"""What a purifier is, and how a trained network becomes one.

A purifier maps pixels (N,C,H,W) in [0,1] to pixels of the same shape, range and device. It sees
pixels and an opaque stream of noise, never labels, image ids or the purpose of the call, and
purifies every image independently of the rest of the batch. Two flags decide how it can be
attacked: `differentiable` (its gradient is usable: it does not quantise) and `stochastic` (it draws
noise; a deterministic purifier gets no stream). The contract test measures both.

A purifier that optimises at test time, or that quantises, offers stand-ins: cheaper or smoother
purifiers that an attack may differentiate in its place. Its own gradient is expensive, masked or
zero.

An `Inference` is a way to use a trained network as a purifier. One network can serve several
defenses. A network that is a purifier already needs no inference.
"""

from typing import ClassVar, Literal

from torch import Tensor, nn

from components.config import Config
from components.data.draws import NoiseStream, fresh
from components.data.image_set import Shape

# `direct` is one pass of the network in place of the descent, at the image that the descent made.
# `plain` descends along the plain gradient in place of Adam's direction.
# `detached` treats Adam's denominators as constants.
# `short` takes fewer iterations (Lee and Kim 2023).
# `soft` rounds softly.
StandIn = Literal["direct", "plain", "detached", "short", "soft"]


def mean_squared_error(one: Tensor, other: Tensor) -> Tensor:
    """Return the mean squared difference of the pixels of every image (N,)."""
    return (one - other).square().flatten(1).mean(1)


class Purifier(nn.Module):
    """Base of every purifier; a subclass implements `purify`.

    Callers use the module itself and `detector_score`. Both supply the noise that a stochastic
    purifier needs, and then call the methods that a subclass implements: `purify` and
    `compute_detector_score`.
    """

    differentiable: bool = True
    stochastic: bool = False
    stand_ins: tuple[StandIn, ...] = ()

    def forward(self, x: Tensor, stream: NoiseStream | None = None) -> Tensor:
        """Return the purified images (N,C,H,W) in [0,1]; without `stream`, noise is fresh."""
        return self.purify(x, self._or_fresh(stream, x))

    def detector_score(
        self, x: Tensor, stream: NoiseStream | None = None, purified: Tensor | None = None
    ) -> Tensor:
        """Return the detector score of every image (N,): a larger score suggests an attack.

        Its unit depends on the purifier. `purified` saves a pass: it is the output of this purifier
        for `x` under the same noise.
        """
        return self.compute_detector_score(x, self._or_fresh(stream, x), purified)

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        """Return the purified images (N,C,H,W) in [0,1]; a stochastic purifier gets a `stream`."""
        raise NotImplementedError

    def stand_in(self, kind: StandIn, x: Tensor, stream: NoiseStream | None) -> Tensor:
        """Purify `x` by the stand-in `kind`, one of `stand_ins`."""
        raise NotImplementedError(kind)

    def compute_detector_score(
        self, x: Tensor, stream: NoiseStream | None, purified: Tensor | None
    ) -> Tensor:
        """Return the detector score (N,): by default the mean squared change of each image.

        A stochastic purifier gets a `stream`; `purified` is as in `detector_score`.
        """
        return mean_squared_error(x, self.purify(x, stream) if purified is None else purified)

    def calibrate(self, clean: Tensor, batch: int) -> None:
        """Store statistics of clean training pixels (M,C,H,W) after training; by default none."""

    def _or_fresh(self, stream: NoiseStream | None, x: Tensor) -> NoiseStream | None:
        """Return `stream`, or fresh noise for `x` where the purifier needs noise and has none."""
        if self.stochastic and stream is None:
            stream = fresh(len(x), x.device)
        return stream


class PurifierSection(Config):
    """Base of the section of every network that can be built and trained as a purifier, or for one.

    A subclass has `kind: Literal[...]` and implements `build`.
    """

    kind: str

    def stochastic(self) -> bool:
        """Say whether the purifier will draw noise (`Purifier.stochastic`)."""
        return False

    def build(self, shape: Shape) -> nn.Module:
        """Make the untrained network for images of `shape`; raise ValueError if it has none."""
        raise NotImplementedError


class Inference(Config):
    """Base of every way to use a trained network as a purifier.

    `network_kinds` lists the kinds of network that it can use.
    """

    network_kinds: ClassVar[tuple[str, ...]]

    kind: str

    def stand_ins(self) -> tuple[StandIn, ...]:
        """Return the stand-ins that the purifier will have."""
        return ()

    def stochastic(self) -> bool:
        """Say whether the purifier will draw noise."""
        return False

    def require_fit(self, model: Config) -> None:
        """Raise ValueError if this inference cannot use the network that `model` describes."""
        kind = str(getattr(model, "kind", "control"))
        if kind not in self.network_kinds:
            fits = " or ".join(self.network_kinds)
            raise ValueError(f"{self.kind} needs a model of kind {fits}, not {kind}")

    def wrap(self, network: nn.Module) -> Purifier:
        """Return the purifier; raise ValueError for a network that this inference cannot use."""
        raise NotImplementedError
