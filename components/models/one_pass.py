"""A defense that descends, without its descent: the classifier behind one pass of the network.

APuDAE's counter-attack A attacks this function (Kalaria et al., eq. 14), as if it were the defense.
It follows margins and gradients of the pass, and never runs the descent. The stand-in `direct` does
run the descent: it takes the derivative of the pass alone, and the margin at the descended image.
"""

from torch import Tensor

from components.data.draws import NoiseStream
from components.models.defense import Defense
from components.models.purifiers.contract import Purifier


class _OnePass(Purifier):
    def __init__(self, descending: Purifier) -> None:
        super().__init__()
        self.descending, self.stochastic = descending, descending.stochastic

    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        return self.descending.stand_in("direct", x, stream)


def one_pass(defense: Defense) -> Defense:
    """Return a frozen defense of the same classifier and one pass of the purifier's network.

    Raises ValueError for a purifier without the stand-in `direct`, which is that pass.
    """
    purifier = defense.purifier
    if purifier is None or "direct" not in purifier.stand_ins:
        raise ValueError("this purifier has no stand-in direct, so no pass of a network to attack")
    return Defense(defense.classifier, _OnePass(purifier)).freeze()
