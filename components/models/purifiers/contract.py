"""What a purifier is.

A purifier maps pixels (N,C,H,W) in [0,1] to pixels of the same shape, range and device. It sees
images only, never labels. Two facts decide how it may be attacked, and the contract test verifies
them rather than believing them: `differentiable` (its gradient is usable: it does not quantise)
and `stochastic` (it draws noise). Nothing in it depends on the composition of the batch.

A purifier that optimises at test time, or that quantises, names `stand_ins`: cheaper or smoother
purifiers whose derivative an attack may take in place of its own, which is dear, masked or nil.

`Inference` is the other half: how a trained network is put to use as a purifier. One network may
serve several defenses; what is itself a purifier needs none.
"""

from typing import ClassVar, Literal

from torch import Tensor, nn

from components.config import Config
from components.data.draws import Draws, fresh

# Stand-ins: `direct` is one pass of the network instead of the iteration (APuDAE's counter-attack
# A), `plain` descends along the bare gradient instead of Adam's, `detached` takes Adam's
# denominators for constants, `short` iterates less (Lee and Kim 2023), `soft`
# rounds softly.
StandIn = Literal["direct", "plain", "detached", "short", "soft"]


def mean_squared_change(x: Tensor, purified: Tensor) -> Tensor:
    """Return the mean squared change of the pixels of every image (N,)."""
    return (x - purified).square().flatten(1).mean(1)


class Purifier(nn.Module):
    """Base of every purifier; subclasses implement `purify`."""

    differentiable: bool = True
    stochastic: bool = False
    stand_ins: tuple[StandIn, ...] = ()

    def forward(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        """Return the purified images (N,C,H,W) in [0,1]; without `draws`, noise is fresh."""
        return self.purify(x, self._drawn(x, draws))

    def detector_score(
        self, x: Tensor, draws: Draws | None = None, purified: Tensor | None = None
    ) -> Tensor:
        """Return how odd each image looks to this purifier (N,): larger means rather attacked.

        `purified`, where the caller has it, is what it made of `x` under the same draws.
        """
        return self.compute_detector_score(x, self._drawn(x, draws), purified)

    def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
        """Clean `x`; `draws` is given whenever the purifier is stochastic."""
        raise NotImplementedError

    def stand_in(self, kind: StandIn, x: Tensor, draws: Draws | None) -> Tensor:
        """Clean `x` by the stand-in `kind`, one of `stand_ins`."""
        raise NotImplementedError(kind)

    def compute_detector_score(self, x: Tensor, draws: Draws | None, purified: Tensor | None) -> Tensor:
        """Return the detection score (N,): by default the mean squared change to the image.

        What is `purified` already need not be so again.
        """
        return mean_squared_change(x, self.purify(x, draws) if purified is None else purified)

    def calibrate(self, clean: Tensor, batch: int) -> None:
        """Learn, once trained, how clean training pixels (M,C,H,W) look; nothing by default."""

    def _drawn(self, x: Tensor, draws: Draws | None) -> Draws | None:
        if self.stochastic and draws is None:
            draws = fresh(len(x), x.device)
        return draws


class Inference(Config):
    """Base of every way to use a trained network as a purifier; `of` are the kinds of network."""

    network_kinds: ClassVar[tuple[str, ...]]

    kind: str

    def stand_ins(self) -> tuple[StandIn, ...]:
        """Return the stand-ins that the purifier will have."""
        return ()

    def require_fit(self, model: Config) -> None:
        """Raise ValueError where this does not fit the section of a network, before training it."""
        kind = str(getattr(model, "kind", "control"))
        if kind not in self.network_kinds:
            fits = " or ".join(self.network_kinds)
            raise ValueError(f"{self.kind} needs a model of kind {fits}, not {kind}")

    def wrap(self, network: nn.Module) -> Purifier:
        """Return the purifier; raise ValueError for a network it cannot be made of."""
        raise NotImplementedError
