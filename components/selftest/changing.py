"""Lies that stored sets show: defenses that answer the scoring otherwise than the attack.

Each function attacks a defense, scores the examples, and returns the finding of its check.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from components.attacks import Attack, Crafted, Linf, craft
from components.attacks.gradient import Noise, Pgd
from components.checks.sets import Answers, in_levels, rounding, same_answer
from components.data.draws import NoiseStream
from components.evaluation.counting import count_sets
from components.models.accuracy import Counts
from components.models.defense import Defense
from components.probes import Finding
from components.probes.bench import Bench
from components.probes.masking import stored_attacks
from components.selftest.toy import (
    BATCH,
    PROBED,
    THREAT,
    FunctionPurifier,
    Toy,
)

PGD = Pgd(kind="pgd", steps=10, step=0.25, restarts=1, random_start=True, early_stop=True, eot=1)


def against(defense: Defense, toy: Toy, attack: Attack = PGD, threat: Linf = THREAT) -> Crafted:
    """Attack a defense on the images to attack."""
    return craft(attack, defense, "full", toy.under_attack(), threat, 0, BATCH)


def scored(defense: Defense, toy: Toy, sets: Mapping[str, Tensor]) -> dict[str, Counts]:
    """Return how often a defense is right (N,) on each of some sets (N,C,H,W)."""
    data, rows = toy.under_attack(), torch.arange(PROBED)
    counted = count_sets(defense, sets, rows, data.labels, data.ids, 0, 1, 1, BATCH)
    return {name: one.score.score for name, one in counted.items()}


def _remembering(toy: Toy) -> Defense:
    """Return a defense that takes an image for the first near one that it was asked about."""
    met: list[Tensor] = []

    def purify(x: Tensor, stream: NoiseStream | None) -> Tensor:
        asked = x.detach()
        known = torch.cat([*met, asked])
        far = torch.cdist(asked.flatten(1), known.flatten(1), p=torch.inf)
        place = torch.arange(len(known)).expand_as(far)
        first = place.where(far <= 2.01 * THREAT.eps, len(known)).amin(1)
        met.append(asked[first >= len(known) - len(asked)])
        return 0.02 * x + 0.98 * known[first]

    return Defense(toy.classifier, FunctionPurifier(purify, False)).freeze()


def first_questions(toy: Toy) -> list[Finding]:
    """Attack one defense that remembers, from the clean images on, and score another.

    Random images that fool nothing are scored beside the examples: their place must not help.
    """
    from_clean = PGD.model_copy(update={"random_start": False})
    crafted = against(_remembering(toy), toy, from_clean)
    random = toy.craft(Noise(kind="noise", tries=1), Linf(norm="linf", eps_255=0.5))
    sets = {"full/noise": random.images, "full/pgd": crafted.images}
    right = scored(_remembering(toy), toy, sets)["full/pgd"]
    return [same_answer("full/pgd", Answers.of(crafted, False), right, 1, rough=False)]


class _Changing(nn.Module):
    """Answers for one network until it is asked for a gradient; all logits get a large constant."""

    def __init__(self, before: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.before, self.after, self.attacked = before, after, False

    def forward(self, x: Tensor) -> Tensor:
        self.attacked |= x.requires_grad
        logits: Tensor = (self.after if self.attacked else self.before)(x)
        return logits + 1e5


def long_logits(toy: Toy) -> list[Finding]:
    """Attack one network and score another, with every margin within rounding."""
    crafted, again = (
        Defense(_Changing(toy.other, toy.classifier), None).freeze() for _ in range(2)
    )
    found = against(crafted, toy)
    right = scored(again, toy, {"full/pgd": found.images})["full/pgd"]
    return [same_answer("full/pgd", Answers.of(found, False), right, 1, rough=False)]


def wrong_while_crafted(toy: Toy) -> list[Finding]:
    """Craft against a gradient that is reversed, and probe when it is right again."""
    crafting = [True]

    def purify(x: Tensor, stream: NoiseStream | None) -> Tensor:
        # The value of x in both cases, with the derivative -1 in the first.
        return 2 * x.detach() - x if crafting[0] else x

    defense = Defense(toy.classifier, FunctionPurifier(purify, False)).freeze()
    crafted, data = against(defense, toy), toy.under_attack()
    crafting[0] = False
    bench = Bench(defense, data.pixels(), data.labels, data.ids, THREAT, 0, crafted.images, BATCH)
    return [stored_attacks(bench)]


def safe_between_levels(toy: Toy) -> list[Finding]:
    """Make images black and white except at levels k/255, between which attacks stay.

    Returns only a finding that blocks.
    """

    def purify(x: Tensor, stream: NoiseStream | None) -> Tensor:
        levels = 255 * x.detach()
        there = ((levels - levels.round()).abs() < 1e-3).flatten(1).all(1)
        pure = x + ((x > 0.5).to(x.dtype) - x).detach()
        return torch.where(there[:, None, None, None], x, pure)

    threat = Linf(norm="linf", eps_255=50.5)
    defense = Defense(toy.classifier, FunctionPurifier(purify, False)).freeze()
    images = against(defense, toy, threat=threat).images
    levels = in_levels(images, toy.under_attack().pixels(), threat)
    right = scored(defense, toy, {"stored": images, "rounded": levels})
    found = rounding(right["stored"].astype(float), right["rounded"].astype(float))
    return [found] if found.level == "block" else []
