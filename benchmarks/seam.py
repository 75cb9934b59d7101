"""What a stage costs over calling its function bare: embedded, and as a job on a standing cluster.

`python benchmarks/seam.py [--rounds 3] [--cluster]` makes a small project, and runs a training and
a crafting stage bare (in one process, after its imports), embedded, and, as root with `--cluster`,
as jobs on two nodes of this machine. The cost of a stage is the wall time of its command less that
of the bare function. An epoch's cost is the slope between a short and a long training. Also
`dvc repro` with nothing to do, and what is uploaded for a stage whose inputs are in the store.
"""

import argparse
import contextlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import project
from cluster import stand

TRAIN = ["--name", "standard", "--train", "data/train", "--val", "data/val"]
CRAFT = ["--train", "data/train", "--classifier", "models/standard"]
BARE = """
import sys, time, importlib
from pathlib import Path
from pipelines import cluster, crafting, jobs, params, place
from pipelines.context import Context
from pipelines.relay import Emitter
module = importlib.import_module("pipelines." + sys.argv[1])
words = sys.argv[2:]
options = {k[2:].replace("-", "_"): v for k, v in zip(words[::2], words[1::2])}
name = options.get("name")
options = {k: v if k == "name" else Path(v) for k, v in options.items()}
everything = params.load()
view = module.run.__annotations__["params"].of(everything, name)

def train(setup, arguments, out, resume, share, seen):
    job = setup(**arguments, device="cpu")
    from components.training import fit
    for epoch in fit(job.model, job.objective, job.data, job.attacked, job.training, job.seed,
                     job.validate, None):
        pass
    return epoch.metrics

def map_shards(function, tasks, share, done, waiting):
    return [function(**task, device="cpu") for task in tasks]

import torch
torch.set_num_threads(1)
cluster.train, cluster.map_shards = train, map_shards
work = Path(".limpid/bare")
context = Context(Emitter(), Emitter(), everything.resources, work, lambda *_: None)
began = time.perf_counter()
module.run(view, context, **options)
print(time.perf_counter() - began)
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cluster", action="store_true")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="limpid-seam-")) / "project"
    project.copy_to(folder)
    project.write_params(folder, project.toy())
    stage(folder, "prepare_data", [f"--out-{s}=data/{s}" for s in ("train", "val", "test")], {})
    stage(folder, "train_classifier", [*TRAIN, "--out", "models/standard"], {})
    with standing(folder, given.cluster) as there:
        places = {"embedded": {}, **({"cluster": there.driver} if there else {})}
        for kind, words in (("train_classifier", TRAIN), ("craft_training_set", CRAFT)):
            measure(folder, kind, words, places, given.rounds)
        if there:
            unchanged(folder, there)
    steps(folder, given.rounds)
    repro(folder, given.rounds)


def measure(
    folder: Path, kind: str, words: list[str], places: dict[str, dict[str, str]], rounds: int
) -> None:
    """Print what a stage costs over its bare function, interleaved."""
    cost: dict[str, list[float]] = {name: [] for name in places}
    bares = []
    for number in range(rounds):
        fresh(folder, number)
        bare = alone(folder, kind, words)
        bares.append(bare)
        for name, environment in places.items():
            forget(folder)
            cost[name].append(stage(folder, kind, [*words, "--out", "out"], environment) - bare)
    print(f"{kind}: bare {statistics.median(bares):.1f} s")
    for name, values in cost.items():
        low, high = min(values), max(values)
        print(f"  {name}: {statistics.median(values):.1f} s more [{low:.1f}-{high:.1f}]")


def steps(folder: Path, rounds: int) -> None:
    """Print what an epoch costs in a worker of Ray Train, its state kept, and in the bare loop."""
    slopes: dict[str, list[float]] = {"bare": [], "worker": []}
    for number in range(rounds):
        seconds: dict[str, list[float]] = {"bare": [], "worker": []}
        for epochs in (20, 120):
            fresh(folder, 100 + number, epochs, workers=1)
            seconds["bare"].append(alone(folder, "train_classifier", TRAIN))
            forget(folder)
            seconds["worker"].append(
                stage(folder, "train_classifier", [*TRAIN, "--out", "out"], {})
            )
        for name, (short, long) in seconds.items():
            slopes[name].append((long - short) / 100)
    bare, worker = (statistics.median(slopes[name]) for name in ("bare", "worker"))
    print(f"an epoch of 8 steps: bare {1000 * bare:.0f} ms, in a worker {1000 * worker:.0f} ms")


def repro(folder: Path, rounds: int) -> None:
    """Print how long DVC takes to see that there is nothing to do."""
    fresh(folder, 0)
    code, printed = project.run(folder, "dvc", "repro")
    if code:
        raise SystemExit(printed[-2000:])
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        code, printed = project.run(folder, "dvc", "repro")
        took.append(time.perf_counter() - began)
        assert code == 0 and "up to date" in printed, printed
    print(f"dvc repro with nothing to do: {statistics.median(took):.2f} s")


def unchanged(folder: Path, there: stand.Stand) -> None:
    """Print what is uploaded for a stage whose inputs are there."""
    for number in (0, 1):
        fresh(folder, 200 + number)
        log = there.home / "s3.log"
        before = len(log.read_text().splitlines())
        stage(folder, "craft_training_set", [*CRAFT, "--out", "out"], there.driver)
        lines = log.read_text().splitlines()[before:]
        puts = [line for line in lines if '"PUT ' in line]
        sent = {name for line in puts for name in re.findall(r"/cas/../(\w{64})", line)}
        made = len(list((folder / "out").iterdir()))
        print(f"round {number}: {len(sent)} files uploaded, of which {made} are what was made")


def fresh(folder: Path, seed: int, epochs: int | None = None, workers: int = 0) -> None:
    """Change the seed, so that nothing that was done before is found."""
    params = project.toy()
    params["seed"] = seed
    params["resources"]["train"]["workers"] = workers
    if epochs:
        training = params["classifiers"]["standard"]["training"]
        params["classifiers"]["standard"]["training"] = {**training, "epochs": epochs}
    project.write_params(folder, params)
    forget(folder)


def forget(folder: Path) -> None:
    """Remove what crafting and training keep."""
    subprocess.run(["rm", "-rf", *(str(folder / name) for name in ("out", ".limpid"))], check=True)


def alone(folder: Path, kind: str, words: list[str]) -> float:
    """Return the seconds of the bare function."""
    done, printed = project.run(folder, sys.executable, "-c", BARE, kind, *words, "--out", "out")
    if done:
        raise SystemExit(printed[-2000:])
    return float(printed.splitlines()[-1])


def stage(folder: Path, kind: str, words: list[str], environment: dict[str, str]) -> float:
    """Return the wall time of a command."""
    began = time.perf_counter()
    command = [sys.executable, "-m", f"pipelines.{kind}", *words]
    code, printed = project.run(folder, *command, **environment)
    if code:
        raise SystemExit(printed[-2000:])
    return time.perf_counter() - began


@contextlib.contextmanager
def standing(folder: Path, wanted: bool) -> Iterator[stand.Stand | None]:
    """Hold a cluster, if one is wanted."""
    if not wanted:
        yield None
        return
    with stand.standing(folder) as there:
        yield there


if __name__ == "__main__":
    main()
