"""The lies that each check catches, the honest defenses that it blames, and what it costs.

`python benchmarks/checks.py [--seeds 10] [--nets 100]` runs every case of the self-test and prints
one row per check: the lies that are named for it and caught, all lies that it raised, the honest
cases that it blamed, over `--seeds` draws of images and attacks, and its CPU seconds in the median
honest case. `--nets` adds random small networks at 32 x 32 RGB, trained for seconds.
"""

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from components import probes, selftest
from components.attacks import Linf
from components.data.image_set import ImageSet
from components.models.defense import Defense
from components.probes import Finding
from components.probes.bench import Bench
from components.selftest import toy as toys

SECONDS: dict[str, list[float]] = {}
TIMED = {
    probes.answers: ("check_logits", "one_answer", "looks_around"),
    probes.gradients: (
        "gradient_present",
        "loss_alive",
        "gradient_honest",
        "gradient_pays",
        "eot_agreement",
    ),
    probes.paths: ("gradient_adds_up",),
    probes.masking: ("stored_attacks", "blind_attack", "remembered"),
    # The attack whose way most probes look at.
    Bench: ("points",),
    probes.attacks: ("unbounded",),
}


@contextmanager
def timed() -> Iterator[None]:
    """Note the CPU seconds of every probe that runs inside."""
    before = []
    for module, names in TIMED.items():
        for name in names:
            function = getattr(module, name)
            before.append((module, name, function))
            setattr(module, name, _timed(name, function))
    try:
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)


def _timed(name: str, function: Any) -> Any:
    def run(*arguments: Any, **options: Any) -> Any:
        began = time.process_time()
        found = function(*arguments, **options)
        SECONDS.setdefault(name, []).append(time.process_time() - began)
        return found

    return run


def check_of(finding: Finding) -> str:
    """Return the name of a check without what it is about."""
    return finding.name.partition("/")[0]


def nets(count: int) -> Iterator[tuple[str, list[Finding]]]:
    """Train and probe random small networks on made-up classes of 32 x 32 RGB images."""
    for seed in range(count):
        torch.manual_seed(seed)
        choice = torch.Generator().manual_seed(seed)

        def pick(of: list[Any], choice: torch.Generator = choice) -> Any:
            return of[int(torch.randint(len(of), (1,), generator=choice))]

        act, width = pick([nn.ReLU, nn.SiLU, nn.Softplus, nn.LeakyReLU, nn.GELU]), pick([4, 8, 12])
        norm, pool, classes = (
            pick(["batch", "group", ""]),
            pick(["max", "avg", ""]),
            pick([2, 3, 10]),
        )
        layers: list[nn.Module] = []
        for depth in range(3):
            inputs, outputs = width * depth or 3, width * (depth + 1)
            layers.append(nn.Conv2d(inputs, outputs, 3, 1 if pool else 2, 1))
            layers += [nn.BatchNorm2d(outputs)] if norm == "batch" else []
            layers += [nn.GroupNorm(2, outputs)] if norm == "group" else []
            layers.append(act())
            layers += [nn.MaxPool2d(2)] if pool == "max" else []
            layers += [nn.AvgPool2d(2)] if pool == "avg" else []
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(48 * width, classes))
        data = _made_up(classes, choice)
        _fit(model, data)
        rows = torch.arange(len(data))
        findings = probes.probe(
            Defense(model, None).freeze(), ["full"], data[rows[300:500]],
            Linf(norm="linf", eps_255=8), seed, 64, 1, 100, None, data[rows[500:]], thorough=False,
        )  # fmt: skip
        yield f"net {seed}: {act.__name__} {norm} {pool} {classes}", findings


def _made_up(classes: int, choice: torch.Generator) -> ImageSet:
    """Return 700 smooth images around one prototype per class."""
    labels = torch.arange(700) % classes
    prototypes = torch.rand(classes, 3, 8, 8, generator=choice)
    noise = torch.rand(700, 3, 8, 8, generator=choice) - 0.5
    small = (0.25 + 0.5 * prototypes[labels] + 0.5 * noise).clamp(0, 1)
    images = nn.functional.interpolate(small, size=32, mode="bilinear")
    levels = (255 * images).round().to(torch.uint8)
    return ImageSet(levels, labels, torch.arange(700), tuple(map(str, range(classes))))


def _fit(model: nn.Module, data: ImageSet) -> None:
    pixels, optimiser = data.pixels(), torch.optim.Adam(model.parameters(), 0.003)
    for _ in range(3):
        for rows in torch.arange(300).split(50):  # type: ignore[no-untyped-call]
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(pixels[rows]), data.labels[rows]).backward()
            optimiser.step()
    model.eval()


def main() -> None:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--nets", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    toy = selftest.train_toy()
    named, raised, blamed, warned = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for name, (expected, case) in selftest.LIES.items():
        failed = {finding.name for finding in case(toy) if not finding.passed}
        if expected not in failed:
            print(f"missed: {name}, by {expected}", flush=True)
        named[expected.partition("/")[0]] += expected in failed
        raised.update({one.partition("/")[0] for one in failed})
    runs = 0
    with timed():
        for seed in range(options.seeds):
            toys.SEED = seed
            for name, case in selftest.honest_cases(True).items():
                runs += 1
                _blame(f"{name}, seed {seed}", case(toy), blamed, warned)
        for name, findings in nets(options.nets):
            runs += 1
            _blame(name, findings, blamed, warned)
    print(f"\n{runs} honest runs, {len(selftest.LIES)} lies\n")
    print("| check | lies of its own | lies raised | honest blocked | honest warned | CPU s |")
    print("|---|---|---|---|---|---|")
    for check in sorted({*named, *raised, *blamed, *warned, *SECONDS}):
        seconds = f"{statistics.median(SECONDS[check]):.2f}" if check in SECONDS else ""
        counts = " | ".join(str(some[check]) for some in (named, raised, blamed, warned))
        print(f"| `{check}` | {counts} | {seconds} |")


def _blame(name: str, findings: list[Finding], blamed: Counter[str], warned: Counter[str]) -> None:
    for finding in findings:
        if not finding.passed:
            (blamed if finding.level == "block" else warned)[check_of(finding)] += 1
            if finding.level == "block":
                print(f"blamed: {name}, by {finding.name}: {finding.detail}", flush=True)


if __name__ == "__main__":
    main()
