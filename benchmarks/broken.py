"""Eight defenses that the field broke: what was claimed, what was left, and what the harness says.

    python benchmarks/broken.py [--images 96] [--steps 100] [--queries 1000]

The defenses are built at toy scale (`components/selftest/broken`), on digits of 8 x 8 pixels within
51/255. "As published" is a textbook PGD-20 on the cross-entropy, from a random start, its last
iterate: against the bare net (grey), or through the defense itself (white), as the authors did.
The harness then attacks and probes all in the same way. Its number is the worst of all attacks, and
the checks named are those that block. Published figures are percentages; docs/broken.md has their
sources.

The second table leaves the anti-adversary layer to its white-box rung, without the sets that are
replayed from the bare net: it shows what such a ladder would claim.
"""

import argparse
import sys
import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from components.data.draws import Draws
from components.data.image_set import ImageSet
from components.evaluation.counting import count_score
from components.models.defense import Defense
from components.selftest.broken import BROKEN, Ladder, Verdict, judge
from components.selftest.broken.descents import anti_adversary
from components.selftest.toy import THREAT, Toy, train_toy

HEAD = (
    "| defense | claimed | left by the break | as published, here | bare net, here "
    "| white-box rung | harness | checks that block |\n|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Published:
    """What papers say: the claim, what the break left of it, and how the authors attacked."""

    claim: str
    left: str
    style: Literal["grey", "white"]


PUBLISHED = {
    "k-WTA": Published("50 (CIFAR-10, 8/255)", "0.16", "white"),
    "thermometer encoding": Published(
        "79.16 (CIFAR-10)", "0 (0.031), adversarially trained 30", "white"
    ),
    "total variation": Published("not stated", "0 (ImageNet, L2 0.005)", "grey"),
    "pixel deflection": Published("not stated", "0 (ImageNet, 4/255)", "grey"),
    "anti-adversary": Published("79.2 (CIFAR-10, 8/255)", "66.6, its static net 66.6", "white"),
    "SOAP-like": Published("51 (CIFAR-10, 8/255)", "3.7, its static net 0", "grey"),
    "SODEF-like": Published("57.76 (CIFAR-10, 8/255)", "52.2, its static net 53.9", "white"),
    "mixup inference": Published("not stated", "not stated", "grey"),
}


def textbook(defense: Defense, data: ImageSet) -> Tensor:
    """Return the last iterates of PGD-20 on the cross-entropy, one draw of noise a step."""
    origin, draws = data.pixels(), Draws(0, "attack", data.ids)
    x = THREAT.start(origin, draws, "textbook")
    for step in range(20):
        point = x.clone().requires_grad_()
        loss = F.cross_entropy(defense(point, draws.redraw(step)), data.labels, reduction="sum")
        gradient = torch.zeros_like(x)
        if loss.requires_grad:
            (gradient,) = torch.autograd.grad(loss, point)
        x = THREAT.project(THREAT.ascend(x, gradient, THREAT.eps / 8), origin)
    return x


def as_published(defense: Defense, base: Defense, data: ImageSet, style: str) -> float:
    """Return the accuracy that the authors' kind of evaluation shows."""
    images = textbook(base if style == "grey" else defense, data)
    score = count_score(defense, images, data.labels, data.ids, 0, "score", 32, 32, len(data))
    return float(score.accuracy().mean())


def row(name: str, verdict: Verdict, shown: float) -> str:
    """Return the line of one defense."""
    said, attacked = PUBLISHED[name], verdict.attacked
    checks = ", ".join(verdict.blocking) or ("none: FOOLED" if verdict.fooled() else "none")
    white, robust, bare = (
        f"{100 * part:.1f}"
        for part in (attacked.white_box(), attacked.robust(), attacked.base_robust())
    )
    return (
        f"| {name} | {said.claim} | {said.left} | {100 * shown:.1f} ({said.style}) | {bare} "
        f"| {white} | {robust} | {checks} |"
    )


def published_table(toy: Toy, ladder: Ladder) -> None:
    """Build, attack and probe the eight defenses."""
    print(HEAD)
    for name, build in BROKEN.items():
        started = time.process_time()
        defense, base = build(toy)
        shown = as_published(defense, base, toy.test, PUBLISHED[name].style)
        verdict = judge(defense, base, toy, ladder)
        print(row(name, verdict, shown), flush=True)
        log(name, verdict, started)


def white_table(toy: Toy, ladder: Ladder) -> None:
    """Judge anti-adversary layers by their white-box rung alone."""
    print("\n| steps of 0.15 | bare net, here | white-box rung | checks that block |")
    print("|---|---|---|---|")
    for steps in (1, 2, 4):
        started = time.process_time()
        defense, base = anti_adversary(toy, steps)
        verdict = judge(defense, base, toy, ladder.model_copy(update={"others": False}))
        found = verdict.attacked
        checks = ", ".join(verdict.blocking) or "none"
        bare, robust = (f"{100 * part:.1f}" for part in (found.base_robust(), found.robust()))
        print(f"| {steps} | {bare} | {robust} | {checks} |", flush=True)
        log(f"{steps} steps", verdict, started)


def log(name: str, verdict: Verdict, started: float) -> None:
    """Say on stderr what a defense cost, its clean accuracy, and what warned."""
    clean, seconds = 100 * verdict.attacked.accuracy("clean"), time.process_time() - started
    warned = ", ".join(verdict.warnings) or "nothing"
    print(f"{name}: {seconds:.0f} s CPU, clean {clean:.1f}, warned: {warned}", file=sys.stderr)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--queries", type=int, default=1000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    toy = train_toy()
    toy = replace(toy, test=toy.test[torch.arange(given.images)])
    ladder = Ladder(steps=given.steps, queries=given.queries)
    published_table(toy, ladder)
    white_table(toy, ladder)


if __name__ == "__main__":
    main()
