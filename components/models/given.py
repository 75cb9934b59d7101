"""Networks that a caller holds in memory: their weights can be stored, what they compute cannot.

A model folder of such a network has a card of kind `given` and its weights. Only the process that
holds the network can build it again; in any other the folder says which weights were scored.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Literal

from torch import nn

from components.config import Config
from components.models.identity import identity

# The networks that this process holds, by their identity.
_HELD: dict[str, nn.Module] = {}


class Given(Config):
    """A network that a caller holds: the name of its class, and its identity."""

    kind: Literal["given"]
    made_by: str
    identity: str

    def build(self) -> nn.Module:
        """Return a copy of the network; raise ValueError in a process that does not hold it."""
        if self.identity not in _HELD:
            raise ValueError(
                f"the {self.made_by} was given as an object, and this process does not hold it: "
                "give it again"
            )
        return deepcopy(_HELD[self.identity])


@contextmanager
def hold(network: nn.Module) -> Iterator[Given]:
    """Hold a network for as long as the context lasts; give what describes it in a card."""
    kind = type(network)
    given = Given(
        kind="given", made_by=f"{kind.__module__}.{kind.__qualname__}", identity=identity(network)
    )
    _HELD[given.identity] = network
    try:
        yield given
    finally:
        _HELD.pop(given.identity, None)
