"""Keyed noise beside torch's own: CPU time of an element, and the ratio of both in one run.

`python benchmarks/draws.py`; a minute, one thread. Each row: 11 interleaved rounds, the median and
the range of their ratios.
"""

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from components.data.draws import Draws

SHAPES = ((250, 1, 28, 28), (250, 3, 32, 32), (8, 3, 224, 224))
ROUNDS, ELEMENTS = 11, 4_000_000


def main() -> None:
    """Print a table in Markdown."""
    torch.set_num_threads(1)
    print("| noise | images | keyed, ns | torch, ns | times torch |\n|---|---|---|---|---|")
    for name, peer in (("uniform", torch.rand), ("normal", torch.randn)):
        for shape in SHAPES:
            draws = Draws(0, "attack", torch.arange(shape[0]))
            keyed = getattr(draws, name)
            rounds = [
                (
                    seconds(lambda keyed=keyed, shape=shape: keyed(shape[1:], "any")),
                    seconds(lambda peer=peer, shape=shape: peer(shape)),
                )
                for _ in range(ROUNDS)
            ]
            ours, theirs = (median(each) for each in zip(*rounds, strict=True))
            ratios = sorted(one / other for one, other in rounds)
            print(
                f"| {name} | {' x '.join(map(str, shape))} | {1e9 * ours:.1f} | {1e9 * theirs:.1f} "
                f"| {median(ratios):.2f} [{ratios[0]:.2f}-{ratios[-1]:.2f}] |"
            )


def seconds(draw: Callable[[], Tensor]) -> float:
    """Return the CPU seconds of an element."""
    elements = draw().numel()
    count = max(1, ELEMENTS // elements)
    start = time.process_time()
    for _ in range(count):
        draw()
    return (time.process_time() - start) / count / elements


if __name__ == "__main__":
    main()
