"""AutoAttack (Croce and Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble
of diverse parameter-free attacks"): several attacks, each on the images that none before it fooled.

The name stands for the published ensemble and nothing less, so its only setting is the version:
`standard` for deterministic defenses, `rand` for stochastic ones, as in the authors' code. Where
their code does less than the papers of its parts (`AuthorsFabT`, `AuthorsSquare`), so does this,
so that its numbers stand beside published ones. Alone, these attacks follow their papers.
"""

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from components.attacks.apgd import ApgdCe, ApgdDlr, ApgdMargin, ApgdT
from components.attacks.contract import L2, Attack, Cost, Linf, LossFamily, Outcome
from components.attacks.distance.fab import FabT
from components.attacks.search import strongest
from components.attacks.square import Square
from components.data.draws import Draws
from components.models.defense import Target

STEPS = 100
TARGETS = 9
QUERIES = 5000
EOT = 20
# The DLR loss compares three logits, and its targeted form four.
LEAST_DLR, LEAST_TARGETED = 3, 4
# The number of the first draw that no attack of the ensemble has used.
UNUSED_DRAW = 10 * STEPS * EOT


class AuthorsFabT(FabT):
    """FAB-T as in the authors' AutoAttack, whose code leaves out the final search of the paper."""

    final_search: ClassVar[bool] = False


class AuthorsSquare(Square):
    """Square as in the authors' AutoAttack.

    Patches shrink by the number of the query alone, and never reach the last row or column.
    """

    rescaled: ClassVar[bool] = False
    to_the_edge: ClassVar[bool] = False


class AutoAttack(Attack):
    """`standard`: APGD-CE, APGD-T, FAB-T, Square. `rand`: APGD-CE and APGD-DLR with EOT.

    With `rand` both attacks run on every image, since fooling under one draw is no success. The DLR
    loss needs three classes and its targeted form four; with fewer, where the authors' code stops,
    APGD climbs the margin instead (`apgd_margin`), and reports call the attack `autoattack (K<4)`.
    Raises ValueError unless `standard` meets a deterministic defense, and `rand` a stochastic one.
    """

    early_stopping: ClassVar[bool] = True
    losses: ClassVar[tuple[LossFamily, ...]] = ("cross-entropy", "margin")

    kind: Literal["autoattack"]
    version: Literal["standard", "rand"]

    @property
    def eot(self) -> int:
        """The number of draws of the defense's noise that are averaged per gradient."""
        return EOT if self.version == "rand" else 1

    def effort(self, classes: int, stochastic: bool) -> Cost:
        """The sum over the ensemble, and with `rand` the choice."""
        choice = len(self.ensemble(classes)) * EOT if stochastic else 0
        parts = [attack.effort(classes, stochastic) for attack in self.ensemble(classes)]
        return sum(parts, Cost(choice, 0))

    def require_fit(self, stochastic: bool) -> None:
        """Raise ValueError unless the version is the one for such a target."""
        if stochastic != (self.version == "rand"):
            kind, other = ("stochastic", "rand") if stochastic else ("deterministic", "standard")
            raise ValueError(
                f"autoattack {self.version} is not for {kind} defenses: use version: {other}"
            )

    def label(self, name: str, classes: int) -> str:
        """Say where the ensemble is not the published one: too few classes for a DLR loss."""
        few = any(isinstance(attack, ApgdMargin) for attack in self.ensemble(classes))
        return f"{name} (K<{LEAST_TARGETED})" if few else name

    def strong(self) -> bool:
        """Always."""
        return True

    def run(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws
    ) -> Outcome:
        """Return the image of lowest margin; iterations are summed over the ensemble.

        Against a stochastic defense, return the stronger of the two images found (`strongest`).
        """
        return self.run_in_batches(target, images, labels, threat, draws, max(len(images), 1))

    def run_in_batches(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws,
        batch: int,
    ) -> Outcome:  # fmt: skip
        """Attack any number of images, `batch` at a time; see `parts`."""
        ends = list(self.parts(target, images, labels, threat, draws, batch))
        if not ends:
            return Outcome(images, images.new_zeros(0), torch.zeros_like(labels))
        return ends[-1][1]

    def parts(
        self, target: Target, images: Tensor, labels: Tensor, threat: Linf | L2, draws: Draws,
        batch: int,
    ) -> Iterator[tuple[str, Outcome]]:  # fmt: skip
        """Yield the name of each attack as it ends, and the outcome of all so far.

        The images that are left after an attack fill new batches for the next one. With `rand`
        every attack runs on every image, and there is one outcome.
        """
        self.require_fit(target.stochastic)
        if not len(images):
            return
        ensemble = self.ensemble(target.classes(images))
        if target.stochastic:
            yield "autoattack", self._rand(ensemble, target, images, labels, threat, draws, batch)
            return
        best, iterations = images.clone(), torch.zeros_like(labels)
        margins = torch.full((len(images),), torch.inf, device=images.device)
        for attack in ensemble:
            rows = (margins > 0).nonzero().squeeze(1)
            if len(rows):
                found = attack.run_in_batches(
                    target[rows], images[rows], labels[rows], threat, draws[rows], batch
                )
                iterations[rows] += found.iterations
                lower = found.margin < margins[rows]
                best[rows[lower]], margins[rows[lower]] = found.images[lower], found.margin[lower]
            yield attack.kind, Outcome(best, margins, iterations)

    def _rand(
        self, ensemble: Sequence[Attack], target: Target, images: Tensor, labels: Tensor,
        threat: Linf | L2, draws: Draws, batch: int,
    ) -> Outcome:  # fmt: skip
        """Run every attack on every image; return the strongest images under unused draws."""
        found = [
            attack.run_in_batches(target, images, labels, threat, draws, batch)
            for attack in ensemble
        ]
        unused, parts = range(UNUSED_DRAW, UNUSED_DRAW + EOT), []
        for rows in torch.arange(len(images), device=images.device).split(batch):  # type: ignore[no-untyped-call]
            candidates = torch.stack([outcome.images[rows] for outcome in found])
            best, margins = strongest(target[rows], candidates, labels[rows], unused)
            iterations = torch.stack([outcome.iterations[rows] for outcome in found]).sum(0)
            parts.append(Outcome(best, margins, iterations))
        return Outcome.joined(parts)

    def ensemble(self, classes: int) -> Sequence[Attack]:
        """Return the attacks in the order they run, against a classifier of so many `classes`."""

        def apgd(kind: type[ApgdCe | ApgdDlr | ApgdMargin], name: str) -> Attack:
            return kind.model_validate(
                {"kind": name, "steps": STEPS, "restarts": 1, "eot": self.eot}
            )

        ce, on_margin = apgd(ApgdCe, "apgd_ce"), apgd(ApgdMargin, "apgd_margin")
        if self.version == "rand":
            return ce, apgd(ApgdDlr, "apgd_dlr") if classes >= LEAST_DLR else on_margin
        targets = min(TARGETS, classes - 1)
        targeted = ApgdT(kind="apgd_t", steps=STEPS, targets=targets, eot=self.eot)
        return (
            ce,
            targeted if classes >= LEAST_TARGETED else on_margin,
            AuthorsFabT(kind="fab_t", steps=STEPS, targets=targets, restarts=1),
            AuthorsSquare(kind="square", queries=QUERIES, eot=self.eot),
        )
