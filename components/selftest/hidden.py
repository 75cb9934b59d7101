"""Lies that hide where a label comes from, so that no gradient leads to another one."""

import torch
from torch import Tensor, nn

from components.data.draws import NoiseStream
from components.models.defense import Mode
from components.probes import Finding
from components.selftest.toy import FunctionPurifier, Toy, probed


class Plateaus(nn.Module):
    """Takes the label of one network, and all of its gradient from another."""

    def __init__(self, hidden: nn.Module, shown: nn.Module) -> None:
        super().__init__()
        self.hidden, self.shown = hidden, shown

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the shown network, with the hidden one's label far above them."""
        label = self.hidden(x.detach()).argmax(1)
        logits: Tensor = self.shown(x)
        return logits + 60 * nn.functional.one_hot(label, logits.shape[1])


class Votes(nn.Module):
    """Lets one network vote about noisy copies, and takes all of its gradient from another."""

    noise: Tensor

    def __init__(self, hidden: nn.Module, shown: nn.Module) -> None:
        super().__init__()
        self.hidden, self.shown = hidden, shown
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("noise", 0.1 * torch.randn(15, 1, 8, 8, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the shown network, with the votes far above them."""
        logits: Tensor = self.shown(x)
        copies = (x.detach() + self.noise[:, None].to(x.dtype)).clamp(0, 1)
        votes = self.hidden(copies.flatten(0, 1)).argmax(1).view(len(copies), len(x))
        return logits + 4 * nn.functional.one_hot(votes, logits.shape[1]).sum(0)


def votes(toy: Toy) -> list[Finding]:
    """Show the gradient of another network than the one that votes: many small jumps."""
    return probed(None, Votes(toy.classifier, toy.other))(toy)


def hidden_label(toy: Toy) -> list[Finding]:
    """Show the gradient of another network."""
    return probed(None, Plateaus(toy.classifier, toy.other))(toy)


def behind_stand_in(toy: Toy) -> list[Finding]:
    """Show the gradient of another network, behind a purifier that may jump by itself."""

    class Short(FunctionPurifier):
        stand_ins = ("short",)

        def stand_in(self, kind: str, x: Tensor, stream: NoiseStream | None) -> Tensor:
            return x

    purifier = Short(lambda x, stream: 0.9 * x, False)
    modes: tuple[Mode, ...] = ("short",)
    return probed(purifier, Plateaus(toy.classifier, toy.other), modes)(toy)


def of_codebook(toy: Toy) -> list[Finding]:
    """Put the nearest training image in the place of each image, and declare no gradient."""
    known = toy.train.pixels()

    def purify(x: Tensor, stream: NoiseStream | None) -> Tensor:
        images = known.to(x.dtype)
        return images[torch.cdist(x.detach().flatten(1), images.flatten(1)).argmin(1)]

    purifier = FunctionPurifier(purify, False)
    purifier.differentiable = False
    return probed(purifier, modes=("bpda",))(toy)
