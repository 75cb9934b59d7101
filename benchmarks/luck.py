"""How much an attack on a random defense loses if it keeps the image of lowest observed margin.

    python benchmarks/luck.py [--images 150] [--seeds 3]

Run it after `dvc repro` of the demo. It attacks the demo's AToP through the full gradient and
scores three images of each search under 64 fresh draws: the one whose margin was lowest in a single
query (luckiest), the last one, and the one that the search returns after evaluating several again
under the same draws.
"""

import argparse
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from components.attacks import Attack, Linf
from components.attacks.apgd import ApgdCe
from components.attacks.contract import Outcome
from components.attacks.gradient import Pgd
from components.attacks.search import Search
from components.data import image_set
from components.data.draws import Draws
from components.data.image_set import ImageSet
from components.evaluation.counting import count_score
from components.models.defense import Defense, bind
from pipelines import layout
from pipelines.tasks.subject import Subject

THREAT = Linf(norm="linf", eps_255=51.0)
DRAWS = 64


def attacks() -> dict[str, Attack]:
    """Return the attacks by name: PGD and APGD, with 1 and 4 draws per gradient."""
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
    """Run one search; return its luckiest images, its last ones, and those it returns."""
    kept: dict[str, Tensor] = {}
    outcome_of = Search.outcome

    def recorded(search: Search) -> Outcome:
        assert search.finalists is not None, "the defense is not random"
        kept["luckiest"] = search.best.clone()
        kept["last"] = search.finalists.last.clone()
        return outcome_of(search)

    draws = Draws(seed, "attack", images.ids)
    target = bind(defense, "full", draws, getattr(attack, "eot", 1))
    with patch.object(Search, "outcome", recorded):
        outcome = attack.run(target, images.pixels(), images.labels, THREAT, draws)
    return {**kept, "returned": outcome.images}


def main() -> None:
    """Run all attacks; print the accuracy under each kind of image."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--images", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    images = image_set.read(Path(layout.TEST))[torch.arange(given.images)]
    defense = Subject(Path(layout.STANDARD), layout.MODELS / "atop").defense("cpu")
    for name, attack in attacks().items():
        accuracies: dict[str, list[float]] = {}
        for seed in range(given.seeds):
            for kind, x in found_by(attack, defense, images, seed).items():
                score = count_score(
                    defense, x, images.labels, images.ids, seed, "score", DRAWS, DRAWS, len(images)
                )
                accuracies.setdefault(kind, []).append(float(score.accuracy().mean()))
        line = "  ".join(f"{kind} {100 * sum(a) / len(a):.1f}" for kind, a in accuracies.items())
        print(f"{name}: accuracy in % {line}", flush=True)


if __name__ == "__main__":
    main()
