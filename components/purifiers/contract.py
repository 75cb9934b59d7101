"""What a purifier is.

A purifier maps pixels (N,C,H,W) in [0,1] to pixels of the same shape, range and device. It sees
images only, never labels. Two facts decide how it may be attacked, and the contract test verifies
them rather than believing them: `differentiable` (its gradient is usable: it does not quantise)
and `stochastic` (it draws noise). Nothing in it depends on the composition of the batch.
"""

from typing import ClassVar

from torch import Tensor, nn

from components.draws import Draws, fresh


class Purifier(nn.Module):
    """Base of every purifier; subclasses implement `purify`."""

    differentiable: ClassVar[bool] = True
    stochastic: ClassVar[bool] = False

    def forward(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        """Return the purified images (N,C,H,W) in [0,1]; without `draws`, noise is fresh."""
        if self.stochastic and draws is None:
            draws = fresh(len(x), x.device)
        return self.purify(x, draws)

    def purify(self, x: Tensor, draws: Draws | None) -> Tensor:
        """Clean `x`; `draws` is given whenever the purifier is stochastic."""
        raise NotImplementedError
