"""What `evaluate` costs as the test set grows: CPU seconds and memory of a part and of the whole.

`python benchmarks/scale.py [--n 500 1000 2000 10000] [--shapes 1x28x28 3x32x32] [--parts K]` makes
images of noise, four sets of noise in the ball and tiny networks, and scores one defense with these
sets; a baseline with one of them is tried on it. Each n has a process of its own. All parts have
500 images. The figures of a part are about what workers do for it, in the mean over all but the
first, which also makes pictures; the peak is above the memory that imports take. The whole is all
parts, the checks of the sets, and all else that `evaluate` does before it sums up. `--parts K` runs
K parts alone, and computes the whole from them.
"""

import argparse
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import mean
from typing import Any, cast

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from components.attacks import Crafted, Linf
from components.attacks.gradient import Pgd
from components.attacks.sets import write_crafted, write_crafted_manifest
from components.config import Config
from components.data import image_set, shards
from components.data.image_set import ImageSet, Shape
from components.models.checkpoints import ModelCard, build, save
from components.models.classifiers import SmallCnn
from components.models.purifiers.autoencoder import ConvAutoencoder
from pipelines.config.sections import Checks, Scoring
from pipelines.runner.context import Context
from pipelines.stages.evaluate import count_all
from pipelines.tasks.entries import Entry, Plan
from pipelines.tasks.subject import Subject

PART, VALIDATION, SETS, CLASSES = 500, 500, 4, tuple("0123456789")
THREAT = Linf(norm="linf", eps_255=8)
PGD = Pgd(kind="pgd", steps=4, step=0.4, restarts=1, random_start=True, early_stop=True, eot=1)
NAMES = [f"a{number}" for number in range(SETS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n", type=int, nargs="+", default=[500, 1000, 2000, 10000])
    parser.add_argument("--shapes", nargs="+", default=["1x28x28", "3x32x32"])
    parser.add_argument("--parts", type=int, help="how many parts to run; by default all")
    parser.add_argument("--measure", type=Path, help="a folder of `made`, in this process")
    given = parser.parse_args()
    if given.measure:
        print(measure(given.measure, given.parts))
        return
    print("| shape, n (parts) | CPU s of a part | peak MiB of a part | CPU s in all |")
    print("|---|---|---|---|")
    for shape in given.shapes:
        for n in given.n:
            with tempfile.TemporaryDirectory() as folder:
                channels, height, width = (int(side) for side in shape.split("x"))
                make(Path(folder), (channels, height, width), n)
                words = ["--measure", folder]
                words += ["--parts", str(given.parts)] if given.parts else []
                command = [sys.executable, __file__, *words]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            print(f"| {shape}, {n:,} ({-(-n // PART)}) | {done.stdout.strip()} |", flush=True)


class Measured:
    """A context that runs all tasks in this process, one by one, and measures each."""

    session = nullcontext

    def __init__(self, parts: int | None) -> None:
        self.parts = parts
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.peak: dict[str, float] = defaultdict(float)
        self.start = memory("VmRSS")
        self.spent = 0.0

    def map(self, function: Callable[..., Any], tasks: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Run the tasks; of their results, only the bytes that a worker would send are kept."""
        results: list[bytes] = []
        name = function.__name__
        for task in tasks:
            part = task.get("shard")
            if part is not None and self.parts is not None and part >= self.parts:
                self.seconds[name].append(mean(self.seconds[name][1:]))
                results.append(results[-1])
                continue
            Path("/proc/self/clear_refs").write_text("5")
            began = time.process_time()
            results.append(pickle.dumps(function(**task, device="cpu")))
            self.seconds[name].append(time.process_time() - began)
            self.spent += self.seconds[name][-1]
            self.peak[name] = max(self.peak[name], memory("VmHWM") - self.start)
        return [pickle.loads(result) for result in results]


def memory(field: str) -> float:
    """Return a figure of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def measure(folder: Path, parts: int | None) -> str:
    """Return CPU s of a part, its peak, and CPU s of the whole, as cells of a table."""
    torch.set_num_threads(1)
    defense, plan = pickle.loads((folder / "made").read_bytes())
    context = Measured(parts)
    began = time.process_time()
    (result,), _ = count_all([defense], plan, cast(Context, context))
    rest = time.process_time() - began - context.spent
    assert len(result.scores) == SETS + 1 and len(result.transferred) == 1, "not all are counted"
    for name, found in context.seconds.items():
        line = f"{name}: {len(found)} x {mean(found):.2f} s, {context.peak[name]:.0f} MiB"
        print(line, file=sys.stderr)
    scored = [name for name in context.seconds if name.startswith("score_")]
    part = sum(mean(context.seconds[name][1:] or context.seconds[name]) for name in scored)
    whole = sum(map(sum, context.seconds.values())) + rest
    return f"{part:.2f} | {max(context.peak[name] for name in scored):.0f} | {whole:.1f}"


def make(root: Path, shape: Shape, n: int) -> None:
    """Write images, networks and sets, the defense to be scored, and a plan with the baseline."""
    generator = torch.Generator().manual_seed(0)

    def images(count: int, first: int) -> ImageSet:
        levels = torch.randint(256, (count, *shape), dtype=torch.uint8, generator=generator)
        return ImageSet(
            levels, torch.arange(count) % 10, torch.arange(first, first + count), CLASSES
        )

    test = images(n, VALIDATION)
    image_set.write(root / "test", test, PART)
    image_set.write(root / "val", images(VALIDATION, 0), PART)
    torch.manual_seed(0)
    standard, other, unseen = (
        network(root / name, "classifier", SmallCnn(kind="small_cnn", width=4), shape)
        for name in ("standard", "robust", "unseen")
    )
    purifier = ConvAutoencoder(
        kind="conv_autoencoder", blocks=2, width=4, strided=[1], residual="none"
    )
    defended = Subject(standard, network(root / "purifier", "purifier", purifier, shape))
    write_set(root / "noise", test, generator)
    (root / "checks.json").write_text("[]")
    baseline, defense = (
        Entry(name, role, subject, root / "checks.json", {
            f"full/{attack}": linked(root / "noise", root / name / attack, subject, root / "test")
            for attack in names
        }, {f"full/{attack}": PGD for attack in names})
        for name, role, subject, names in (
            ("robust", "baseline", Subject(other), NAMES[:1]),
            ("defense", "defense", defended, NAMES),
        )
    )  # fmt: skip
    plan = Plan(
        threat=THREAT, seed=0, batch=250,
        scoring=Scoring(select_draws=2, score_draws=2, shown=2),
        checks=Checks(images=32, thorough=False), val=root / "val", test=root / "test",
        unseen=unseen, surrogate=None, baselines=[baseline],
    )  # fmt: skip
    (root / "made").write_bytes(pickle.dumps((defense, plan)))


def network(folder: Path, family: Any, config: Config, shape: Shape) -> Path:
    """Save an untrained network."""
    card = ModelCard(
        format=1, family=family, model=config.model_dump(mode="json"), shape=list(shape),
        class_names=list(CLASSES), provenance={"validation": {"correct": 50, "n": VALIDATION}},
    )  # fmt: skip
    save(folder, build(card).eval(), card)
    return folder


def write_set(folder: Path, test: ImageSet, generator: torch.Generator) -> None:
    """Write noise in the ball around the images, in parts like theirs."""
    for number, start in enumerate(range(0, len(test), PART)):
        part = test[torch.arange(start, min(start + PART, len(test)))]
        noise = 2 * torch.rand(part.images.shape, generator=generator) - 1
        zero = torch.zeros(len(part), dtype=torch.int64)
        write_crafted(
            folder / shards.shard_name(number),
            Crafted(
                part.ids, part.labels, (part.pixels() + THREAT.eps * noise).clamp(0, 1),
                zero.bool(), zero, zero + 9, zero + 9, zero.bool(), zero + 1, zero + 0.5,
            ),
        )  # fmt: skip


def linked(source: Path, folder: Path, subject: Subject, test: Path) -> Path:
    """Make a set of the same files, as if it had been crafted against the subject."""
    folder.mkdir(parents=True)
    for file in source.iterdir():
        os.link(file, folder / file.name)
    facts = {
        **subject.facts(), "data": shards.fingerprint(test), "seed": 0, "mode": "full",
        "attack": PGD.model_dump(mode="json"), "threat": THREAT.model_dump(mode="json"),
    }  # fmt: skip
    write_crafted_manifest(folder, shards.read_manifest(test)["shape"], facts)
    return folder


if __name__ == "__main__":
    main()
