"""Cost of a stage over a bare call of its function: embedded, and as a job on a running cluster.

`python benchmarks/seam.py [--rounds 3] [--cluster]` makes a small project. It runs a training stage
and a crafting stage bare (in one process, after its imports), in their own process (no workers),
with workers of an embedded Ray, and, as root with `--cluster`, as jobs on two nodes started here.
The cost of a stage is the wall time of its command minus that of the bare function. The cost of an
epoch is measured with the demo's adversarial training. Also measured: `dvc repro` of the demo with
nothing to do, and the uploads of a stage whose inputs are in the store already.
"""

import argparse
import contextlib
import json
import re
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import project
from cluster import local_cluster
from cluster.local_cluster import LocalCluster

SPLITS = [f"--out-{split}=data/{split}" for split in ("train", "val", "test")]
TRAIN = ["--name", "standard", "--train", "data/train", "--val", "data/val"]
CRAFT = ["--train", "data/train", "--classifier", "models/standard"]
BARE = """
import importlib, json, sys, time
from pathlib import Path
import torch
from components.training.loop import fit
from pipelines.cluster import trainer, worker_pool
from pipelines.cluster.job_events import Emitter
from pipelines.config import schema
from pipelines.runner.context import Context
module = importlib.import_module("pipelines.stages." + sys.argv[1])
words = sys.argv[2:]
options = {k[2:].replace("-", "_"): v for k, v in zip(words[::2], words[1::2])}
name = options.get("name")
options = {k: v if k == "name" else Path(v) for k, v in options.items()}
params = schema.load()
view = module.run.__annotations__["params"].of(params, name)

def train(setup, arguments, out, resume, workers, seen, say):
    task = setup(**arguments, device="cpu")
    for epoch in fit(task.model, task.objective, task.data, task.attacked, task.training, task.seed,
                     task.validate, None):
        ended.append(time.perf_counter())
    return epoch.metrics

def map_shards(function, tasks, workers, done, say):
    return [function(**task, device="cpu") for task in tasks]

torch.set_num_threads(1)
trainer.train, worker_pool.map_shards = train, map_shards
context = Context(Emitter(), Emitter(), params.resources, Path(".limpid/bare"), lambda *_: None)
ended = []
began = time.perf_counter()
module.run(view, context, **options)
print(json.dumps([time.perf_counter() - began, ended]))
"""
EPOCHS = 40


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cluster", action="store_true")
    given = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="limpid-seam-"))
    folder = project.copy_to(home / "project")
    fresh(folder, 0)
    stage(folder, "prepare_data", SPLITS, {})
    stage(folder, "train_classifier", [*TRAIN, "--out", "models/standard"], {})
    with running(folder, given.cluster) as cluster:
        ways = {"no workers": (0, {}), "embedded": (1, {})}
        if cluster:
            ways["cluster"] = (1, cluster.driver)
        for kind, words in (("train_classifier", TRAIN), ("craft_training_set", CRAFT)):
            measure(folder, kind, words, ways, given.rounds)
        if cluster:
            unchanged(folder, cluster)
    demo = project.copy_to(home / "demo")
    project.write_params(demo, project.base())
    stage(demo, "prepare_data", SPLITS, {})
    epochs(demo, given.rounds)
    repro(demo, given.rounds)
    subprocess.run(["rm", "-rf", str(home)], check=True)


def measure(
    folder: Path,
    kind: str,
    words: list[str],
    ways: dict[str, tuple[int, dict[str, str]]],
    rounds: int,
) -> None:
    """Print the cost of a stage over its bare function; the ways take turns."""
    cost: dict[str, list[float]] = {name: [] for name in ways}
    bare_seconds = []
    for number in range(rounds):
        fresh(folder, number)
        bare, _ = alone(folder, kind, words)
        bare_seconds.append(bare)
        for name, (workers, environment) in ways.items():
            fresh(folder, number, workers)
            cost[name].append(stage(folder, kind, [*words, "--out", "out"], environment) - bare)
    print(f"{kind}: bare {statistics.median(bare_seconds):.1f} s")
    for name, values in cost.items():
        low, high = min(values), max(values)
        print(
            f"  {name}: {statistics.median(values):.1f} s more [{low:.1f}-{high:.1f}]", flush=True
        )


def epochs(folder: Path, rounds: int) -> None:
    """Print the cost of an epoch of the demo's adversarial training, with its states kept.

    The first epoch warms up.
    """
    robust = ["--name", "robust", *TRAIN[2:]]
    ratios: dict[str, list[float]] = {"no workers": [], "embedded": []}
    bare_spacings = []
    for number in range(rounds):
        params = project.base()
        params["seed"] = number
        params["classifiers"]["robust"]["training"]["epochs"] = EPOCHS
        project.write_params(folder, params)
        forget(folder)
        bare_spacings.append(spacing(alone(folder, "train_classifier", robust)[1]))
        for workers, name in enumerate(ratios):
            params["resources"]["train"]["workers"] = workers
            project.write_params(folder, params)
            forget(folder)
            stage(folder, "train_classifier", [*robust, "--out", "out"], {})
            ratios[name].append(spacing(logged(folder)) / bare_spacings[-1])
    bare = 1000 * statistics.median(bare_spacings)
    print(f"an epoch of the demo's adversarial training: bare {bare:.0f} ms")
    for name, found in ratios.items():
        low, high = min(found), max(found)
        print(f"  {name}: x {statistics.median(found):.3f} [{low:.3f}-{high:.3f}]", flush=True)


def logged(folder: Path) -> list[float]:
    """Return the times in seconds at which the epochs of the last training were logged."""
    with sqlite3.connect(folder / "mlflow.db") as database:
        found = database.execute(
            "select timestamp from metrics where key = 'loss' and run_uuid = "
            "(select run_uuid from runs order by start_time desc limit 1) order by step"
        ).fetchall()
    assert len(found) == EPOCHS, found
    return [milliseconds / 1000 for (milliseconds,) in found]


def spacing(times: list[float]) -> float:
    """Return the mean of the seconds between two times."""
    return (times[-1] - times[0]) / (len(times) - 1)


def repro(folder: Path, rounds: int) -> None:
    """Print how long DVC takes to find that there is nothing to do."""
    forget(folder)
    project.write_params(folder, project.base())
    code, printed = project.run(folder, "dvc", "repro")
    if code:
        raise SystemExit(printed[-2000:])
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        code, printed = project.run(folder, "dvc", "repro")
        seconds.append(time.perf_counter() - began)
        assert code == 0 and "up to date" in printed, printed
    print(f"dvc repro with nothing to do: {statistics.median(seconds):.2f} s")


def unchanged(folder: Path, cluster: LocalCluster) -> None:
    """Print what is uploaded for a stage whose inputs are in the store."""
    for number in (0, 1):
        fresh(folder, 200 + number)
        log = cluster.home / "s3.log"
        before = len(log.read_text().splitlines())
        stage(folder, "craft_training_set", [*CRAFT, "--out", "out"], cluster.driver)
        lines = log.read_text().splitlines()[before:]
        puts = [line for line in lines if '"PUT ' in line]
        sent = {name for line in puts for name in re.findall(r"/cas/../(\w{64})", line)}
        made = len(list((folder / "out").iterdir()))
        print(f"round {number}: {len(sent)} files uploaded, {made} of them outputs")


def fresh(folder: Path, seed: int, workers: int = 0) -> None:
    """Change the seed, so that no earlier result is found, and the number of workers."""
    params = project.toy()
    params["seed"] = seed
    params["resources"]["train"]["workers"] = workers
    params["resources"]["shards"]["workers"] = 2 * workers
    params["resources"]["stages"] = {}
    project.write_params(folder, params)
    forget(folder)


def forget(folder: Path) -> None:
    """Remove the outputs, and the work in progress of crafting and training."""
    subprocess.run(["rm", "-rf", *(str(folder / name) for name in ("out", ".limpid"))], check=True)


def alone(folder: Path, kind: str, words: list[str]) -> tuple[float, list[float]]:
    """Return the seconds of the bare function, and the times at which its epochs ended."""
    done, printed = project.run(folder, sys.executable, "-c", BARE, kind, *words, "--out", "out")
    if done:
        raise SystemExit(printed[-2000:])
    seconds, ended = json.loads(printed.splitlines()[-1])
    return seconds, ended


def stage(folder: Path, kind: str, words: list[str], environment: dict[str, str]) -> float:
    """Return the wall time of a command."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "pipelines", kind, *words]
    code, printed = project.run(folder, *command, **environment)
    if code:
        raise SystemExit(printed[-2000:])
    return time.perf_counter() - began


@contextlib.contextmanager
def running(folder: Path, wanted: bool) -> Iterator[LocalCluster | None]:
    """Run a cluster, if one is wanted."""
    if not wanted:
        yield None
        return
    with local_cluster.running(folder) as cluster:
        yield cluster


if __name__ == "__main__":
    main()
