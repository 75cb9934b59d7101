"""What an attack on a random defense loses to luck: the lowest margin seen, or images asked again.

`python benchmarks/luck.py [--images 150] [--seeds 3]`, after `dvc repro` of the demo: attacks its
AToP through the full gradient, and scores by 64 fresh draws the image whose margin was lowest in
one look, the last one, and what the search returns, which asks several again under the same draws.
One search serves all three.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from components.attacks import Attack, Linf, contract
from components.attacks.apgd import ApgdCe
from components.attacks.gradient import Pgd
from components.data import image_set
from components.data.draws import Draws
from components.data.image_set import ImageSet
from components.evaluation.counting import count_score
from components.models.defense import Defense, bind
from pipelines.tasks.subject import Subject

THREAT = Linf(norm="linf", eps_255=51.0)
DRAWS = 64


def attacks() -> dict[str, Attack]:
    """Return what is run, by name."""
    found: dict[str, Attack] = {}
    for eot in (1, 4):
        for steps in (10, 40):
            found[f"PGD-{steps}, EOT {eot}"] = Pgd(
                kind="pgd", steps=steps, step=max(2 / steps, 0.1), restarts=1, random_start=True,
                early_stop=True, eot=eot,
            )  # fmt: skip
        found[f"APGD-CE-50, EOT {eot}"] = ApgdCe(kind="apgd_ce", steps=50, restarts=1, eot=eot)
    return found


def found_by(attack: Attack, defense: Defense, images: ImageSet, seed: int) -> dict[str, Tensor]:
    """Run one search; return its luckiest images, its last, and those it returns."""
    kept: dict[str, Tensor] = {}
    ask = contract.Search.outcome

    def listen(search: contract.Search) -> contract.Outcome:
        assert search.finalists is not None, "the defense is not random"
        kept["luckiest"] = search.best.clone()
        kept["last"] = search.finalists.last.clone()
        return ask(search)

    contract.Search.outcome = listen  # type: ignore[method-assign]
    draws = Draws(seed, "attack", images.ids)
    target = bind(defense, "full", draws, getattr(attack, "eot", 1))
    try:
        outcome = attack.run(target, images.pixels(), images.labels, THREAT, draws)
    finally:
        contract.Search.outcome = ask  # type: ignore[method-assign]
    return {**kept, "returned": outcome.images}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    images = image_set.read(Path("data/test"))[torch.arange(given.images)]
    defense = Subject(Path("models/standard"), Path("models/atop")).defense("cpu")
    for name, attack in attacks().items():
        shares: dict[str, list[float]] = {}
        for seed in range(given.seeds):
            for which, x in found_by(attack, defense, images, seed).items():
                score = count_score(
                    defense, x, images.labels, images.ids, seed, "score", DRAWS, DRAWS, len(images)
                )
                shares.setdefault(which, []).append(float(score.accuracy().mean()))
        line = "  ".join(f"{w} {100 * sum(s) / len(s):.1f}" for w, s in shares.items())
        print(f"{name}: right {line}", flush=True)


if __name__ == "__main__":
    main()
