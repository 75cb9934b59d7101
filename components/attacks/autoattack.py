"""AutoAttack (Croce and Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble
of diverse parameter-free attacks"): four attacks, each on the images the former ones left right.

The name means the published ensemble and nothing less, so there are no settings but its version:
`standard` for deterministic defenses, `rand` for random ones, as the authors' code has them.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from components.attacks.apgd import ApgdCe, ApgdDlr, ApgdT
from components.attacks.contract import L2, Attack, Linf, Outcome, strongest
from components.attacks.distance.fab import FabT
from components.attacks.square import Square
from components.data.draws import Draws
from components.models.defense import Target

STEPS = 100
TARGETS = 9
QUERIES = 5000
EOT = 20
# The first draw that no part has used.
UNSEEN = 10 * STEPS * EOT


class AutoAttack(Attack):
    """`standard`: APGD-CE, APGD-T, FAB-T, Square. `rand`: APGD-CE and APGD-DLR with EOT.

    `standard` needs four classes and a deterministic defense, `rand` three and a random one, else
    ValueError. With `rand` both attacks run on every image: one draw is no success.
    """

    stopping: ClassVar[bool] = True

    kind: Literal["autoattack"]
    version: Literal["standard", "rand"]

    @property
    def eot(self) -> int:
        """How many draws of the noise of the defense a gradient is averaged over."""
        return EOT if self.version == "rand" else 1

    def effort(self) -> int:
        """What its parts take, with the fewest classes there may be."""
        return self.eot * sum(part.effort() for part in self.parts(4))

    def strong(self) -> bool:
        """By its name."""
        return True

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return the image of lowest margin; the iterations of all parts are added up.

        Against a random defense, the stronger of the two that its parts found (`strongest`).
        """
        if target.stochastic != (self.version == "rand"):
            kind, other = ("random", "rand") if target.stochastic else ("deterministic", "standard")
            raise ValueError(
                f"autoattack {self.version} is not for {kind} defenses: use version: {other}"
            )
        with torch.no_grad():
            classes = target(images, 0).shape[1]
        if target.stochastic:
            return self._rand(target, images, labels, threat, draws, classes)
        best, iterations = images.clone(), torch.zeros_like(labels)
        margins = torch.full((len(images),), torch.inf, device=images.device)
        for part in self.parts(classes):
            rows = (margins > 0).nonzero().squeeze(1)
            if not len(rows):
                break
            found = part.run(target[rows], images[rows], labels[rows], threat, draws[rows])
            iterations[rows] += found.iterations
            lower = found.margin < margins[rows]
            best[rows[lower]], margins[rows[lower]] = found.images[lower], found.margin[lower]
        return Outcome(best, margins, iterations)

    def _rand(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws,
        classes: int,
    ) -> Outcome:  # fmt: skip
        found = [p.run(target, images, labels, threat, draws) for p in self.parts(classes)]
        best, margins = strongest(
            target,
            torch.stack([each.images for each in found]),
            labels,
            range(UNSEEN, UNSEEN + EOT),
        )
        return Outcome(best, margins, torch.stack([each.iterations for each in found]).sum(0))

    def parts(self, classes: int) -> Sequence[Attack]:
        """Return the attacks in their order, against a classifier of so many classes."""
        ce = ApgdCe(kind="apgd_ce", steps=STEPS, restarts=1, eot=self.eot)
        if self.version == "rand":
            return ce, ApgdDlr(kind="apgd_dlr", steps=STEPS, restarts=1, eot=self.eot)
        if classes < 4:
            raise ValueError(f"autoattack needs 4 classes, but the classifier has {classes}")
        targets = min(TARGETS, classes - 1)
        return (
            ce,
            ApgdT(kind="apgd_t", steps=STEPS, targets=targets, eot=self.eot),
            FabT(kind="fab_t", steps=STEPS, targets=targets, restarts=1),
            Square(kind="square", queries=QUERIES, eot=self.eot),
        )
