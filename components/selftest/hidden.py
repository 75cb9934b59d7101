"""Lies that hide where a label comes from, so that no gradient leads to another one."""

import numpy as np
import torch
from torch import Tensor, nn

from components.attacks.apgd import ApgdCe
from components.checks.scores import transfer_attack
from components.data.draws import NoiseStream
from components.models.classifiers import SmallCnn
from components.models.defense import Defense, Mode
from components.probes import Finding
from components.selftest.changing import against, scored
from components.selftest.toy import FunctionPurifier, Toy, probed, train_classifier

APGD = ApgdCe(kind="apgd_ce", steps=50, restarts=1, eot=1)


class Plateaus(nn.Module):
    """Takes the label of one network, and all of its gradient from another."""

    def __init__(self, hidden: nn.Module, shown: nn.Module, height: float = 60) -> None:
        super().__init__()
        self.hidden, self.shown, self.height = hidden, shown, height

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the shown network, with the hidden one's label `height` above."""
        label = self.hidden(x.detach()).argmax(1)
        logits: Tensor = self.shown(x)
        return logits + self.height * nn.functional.one_hot(label, logits.shape[1])


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


class RunnersUp(nn.Module):
    """Adds ninety classes that come next to the first and never win, and rise along one line."""

    way: Tensor

    def __init__(self, hidden: nn.Module) -> None:
        super().__init__()
        self.hidden = hidden
        way = torch.randn(64, 1, generator=torch.Generator().manual_seed(0)) / 8
        self.register_buffer("way", way)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the hidden network, and ninety more."""
        logits = 40 * self.hidden(x)
        below = 3 * (x.flatten(1) @ self.way).tanh() - 12
        steps = 0.1 * torch.arange(90, device=x.device)
        return torch.cat([logits, logits.max(1, keepdim=True).values + below - steps], 1)


def decoys_next_to_the_first(toy: Toy) -> list[Finding]:
    """Attack a robust network behind decoys, and try the examples of another network on it."""
    hidden = train_classifier(SmallCnn(kind="small_cnn", width=8), toy.train, robust=True)
    defense = Defense(RunnersUp(hidden), None).freeze()
    sets = {
        "clean": toy.under_attack().pixels(),
        "own": against(defense, toy, APGD).images,
        "other": toy.craft(APGD).images,
    }
    right = {name: counts / 1 for name, counts in scored(defense, toy, sets).items()}
    own = np.minimum(right["clean"], right["own"])
    return transfer_attack(own, {"none": np.minimum(own, right["other"])})
