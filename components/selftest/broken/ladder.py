"""What the harness says of a defense that it knows nothing of: the same attacks and checks for all.

Attacks run through the gradient that the defense declares, through the identity in place of the
purifier, and, replayed, as they were made against the bare net. The number is the worst of all; the
checks are the probes and those of the scores.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from components.attacks import Attack, Crafted, craft
from components.attacks.apgd import ApgdCe, ApgdDlr, ApgdT
from components.attacks.gradient import Pgd
from components.attacks.square import Square
from components.checks.scores import (
    draws_enough,
    full_is_strongest,
    order_of_strength,
    selection,
    stand_ins_tried,
    strong_enough,
    void_rungs,
    white_is_strongest,
)
from components.checks.sets import Answers, effort, same_answer, stored_set
from components.config import Config
from components.data.image_set import ImageSet
from components.evaluation.counting import CLEAN, Score, count_score, worst
from components.models.defense import Defense, Mode
from components.probes import Finding, Stored, probe
from components.probes.bench import rough
from components.probes.contract import Accuracies
from components.selftest.toy import BATCH, EOT, THREAT, Toy

# The rung of attacks that were made against the bare net.
GREY = "classifier"


class Ladder(Config):
    """How long the attacks are: steps of APGD, queries of Square, draws of noise that score.

    Without `others` only the white-box rung is run: no replay and no identity.
    """

    steps: int = 100
    queries: int = 1000
    draws: int = 32
    others: bool = True

    def attacks(self, stochastic: bool) -> dict[str, Attack]:
        """Return the attacks by name; a random defense gets EOT, half the steps, none targeted."""
        half = self.steps // 2
        eot, steps = (EOT, half) if stochastic else (1, self.steps)
        found: dict[str, Attack] = {
            "pgd": Pgd(
                kind="pgd", steps=half, step=2.5 / half, restarts=1, random_start=True,
                early_stop=True, eot=eot,
            ),
            "apgd_ce": ApgdCe(kind="apgd_ce", steps=steps, restarts=1, eot=eot),
            "apgd_dlr": ApgdDlr(kind="apgd_dlr", steps=steps, restarts=1, eot=eot),
        }  # fmt: skip
        if not stochastic:
            found["apgd_t"] = ApgdT(kind="apgd_t", steps=half, targets=3, eot=1)
        return found

    def square(self, stochastic: bool) -> Square:
        """Return the attack without gradients; under noise a query asks four times."""
        queries, eot = (self.queries // 4, 2) if stochastic else (self.queries, 1)
        return Square(kind="square", queries=queries, eot=eot)


@dataclass(frozen=True)
class Attacked:
    """A defense and its base net under attack: sets by rung/attack, and how they score.

    `own` were made against the defense itself, `plans` names their attacks by rung. `scores` and
    `bare`, which is about the base net, hold the clean images, too.
    """

    defense: Defense
    data: ImageSet
    plans: Mapping[str, Mapping[str, Attack]]
    own: Mapping[str, Crafted]
    scores: Mapping[str, Score]
    bare: Mapping[str, Score]

    @property
    def white(self) -> Mode:
        """The rung that sees through the purifier: the identity where there is no gradient."""
        return "full" if self.defense.differentiable else "bpda"

    def robust(self) -> float:
        """Return the worst of all attacks on the defense."""
        return _worst(self.scores)

    def white_box(self) -> float:
        """Return the worst of the attacks on the white-box rung alone."""
        return _worst(self.rung(self.white))

    def base_robust(self) -> float:
        """Return the worst of all attacks on the base net."""
        return _worst(self.bare)

    def accuracy(self, name: str) -> float:
        """Return the accuracy on one set."""
        return _mean(self.scores[name])

    def rung(self, mode: str) -> dict[str, Score]:
        """Return the scores of one rung and of the clean images."""
        return {n: s for n, s in self.scores.items() if n == CLEAN or n.startswith(f"{mode}/")}


@dataclass(frozen=True)
class Verdict:
    """What the harness says of a defense: the names of failed checks, and all findings."""

    attacked: Attacked
    blocking: Sequence[str]
    warnings: Sequence[str]
    findings: Sequence[Finding]

    def fooled(self) -> bool:
        """Whether a number over five points above that of the base net stands unblocked."""
        return not self.blocking and not close(self.attacked)


def close(attacked: Attacked) -> bool:
    """Say whether the number of a defense is at most five points above that of its base net."""
    return attacked.robust() <= attacked.base_robust() + 0.05


def attack(defense: Defense, base: Defense, data: ImageSet, ladder: Ladder) -> Attacked:
    """Attack a defense as one knows nothing of it, and score it on what was found."""
    attacks = ladder.attacks(defense.stochastic)
    first = "full" if defense.differentiable else "bpda"
    plans = {first: {**attacks, "square": ladder.square(defense.stochastic)}}
    if ladder.others and defense.differentiable and defense.purifier is not None:
        plans["bpda"] = {"pgd": attacks["pgd"]}
    grey = {
        f"{GREY}/{name}": craft(one, base, "full", data, THREAT, 0, BATCH).images
        for name, one in ladder.attacks(False).items()
    }
    own = {
        f"{mode}/{name}": craft(one, defense, cast(Mode, mode), data, THREAT, 0, BATCH)
        for mode, plan in plans.items()
        for name, one in plan.items()
    }
    clean = {CLEAN: data.pixels()}
    sets = {**clean, **(grey if ladder.others else {}), **{n: one.images for n, one in own.items()}}

    def score(subject: Defense, images: Tensor) -> Score:
        labels, ids, draws = data.labels, data.ids, ladder.draws
        return count_score(subject, images, labels, ids, 0, "score", draws, draws, BATCH)

    return Attacked(
        defense, data, plans, own,
        {name: score(defense, images) for name, images in sets.items()},
        {name: score(base, images) for name, images in {**clean, **grey}.items()},
    )  # fmt: skip


def judge(defense: Defense, base: Defense, toy: Toy, ladder: Ladder) -> Verdict:
    """Attack, score and probe a defense on the test images of `toy`."""
    attacked = attack(defense, base, toy.test, ladder)
    stored = Stored(list(attacked.own.values()), defense.digest, 0)
    modes = [cast(Mode, mode) for mode in attacked.plans]
    findings = [
        *probe(
            defense,
            modes,
            toy.test,
            THREAT,
            0,
            len(toy.test),
            EOT,
            BATCH,
            stored,
            toy.val,
            thorough=False,
        ),
        *_of_sets(attacked),
    ]
    findings += _of_scores(attacked, findings)
    failed = [finding for finding in findings if not finding.passed]
    blocking, warnings = (
        [finding.name for finding in failed if finding.level == level]
        for level in ("block", "warn")
    )
    return Verdict(attacked, blocking, warnings, findings)


def _mean(score: Score) -> float:
    return float(score.accuracy().mean())


def _worst(scores: Mapping[str, Score]) -> float:
    """Return the smaller of the accuracy under the worst set of each image and under any one."""
    return min(_mean(worst(scores, list(scores))[1]), *(_mean(one) for one in scores.values()))


def _of_sets(attacked: Attacked) -> Iterator[Finding]:
    defense, data = attacked.defense, attacked.data
    for name, crafted in attacked.own.items():
        mode, _, kind = name.partition("/")
        score = attacked.scores[name]
        part = (crafted.images, data.ids, data.labels, data)
        yield from stored_set(name, [part], len(data), THREAT)
        yield effort(
            name, attacked.plans[mode][kind], crafted, len(data.class_names), defense.stochastic
        )
        answers = Answers.of(crafted, defense.stochastic)
        yield same_answer(name, answers, score.score, score.draws, rough(defense))


def _of_scores(attacked: Attacked, probed: Sequence[Finding]) -> list[Finding]:
    defense, plans = attacked.defense, attacked.plans
    full = {
        f"full/{name}": (one.kind, attacked.scores[f"full/{name}"].accuracy())
        for name, one in plans.get("full", {}).items()
    }
    rungs: dict[str, Accuracies] = {}
    for mode in (GREY, *plans):
        sets = attacked.rung(mode)
        if len(sets) > 1:
            rungs[mode] = worst(sets, list(sets))[1].accuracy()
    white = rungs.pop(attacked.white)
    known = () if defense.purifier is None else defense.purifier.stand_ins
    singles = {name: score.accuracy() for name, score in attacked.scores.items()}
    headline = worst(attacked.scores, list(singles))[1]
    attacks = {mode: list(plan.values()) for mode, plan in plans.items()}
    return [
        *order_of_strength(full, defense.stochastic),
        *white_is_strongest(full),
        selection(headline.accuracy(), singles),
        draws_enough(defense.stochastic, headline.draws, headline.draws),
        *stand_ins_tried(known, {}, white),
        *full_is_strongest(white, rungs),
        strong_enough(
            attacks,
            known,
            defense.differentiable,
            len(attacked.data.class_names),
            void_rungs(probed, attacks),
        ),
    ]
