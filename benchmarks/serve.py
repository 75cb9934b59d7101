"""The cost of serving: loading a registered defense, and predictions against direct calls.

    python benchmarks/serve.py [--rounds 30] [--loads 5]

It registers defenses of untrained networks for 28 x 28 images, of the sizes of profile mnist, in a
store of its own; weights do not affect the time. Loading: fresh processes that have imported torch
and mlflow load a model from its folder, as a server does, or by its name in the registry.
Predictions: batches of 64 on one thread, in turns within one round: the logits by a direct call,
logits and detector score by direct calls, `predict` of the loaded model, and a request to a running
server. The table has CPU seconds (wall seconds where a server or a disk takes part), medians over
the rounds, and medians and ranges of the ratios, direct over served.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import mlflow
import torch
from pydantic import TypeAdapter

from components.models.checkpoints import ModelCard, build, save
from components.models.purifiers import InferenceConfig
from pipelines.tasks.subject import Subject
from pipelines.tracking.registry import Registration
from pipelines.tracking.tracker import Tracker

ROOT = Path(__file__).resolve().parent.parent
BATCH, SHAPE, NAME = 64, (1, 28, 28), "limpid-benchmark"
KOO = {"kind": "conv_autoencoder", "blocks": 4, "width": 24, "strided": [1, 3], "residual": "none"}
RT2 = {"kind": "rt2", "patch": 4, "missing": 0.25, "sigma": 0.1}
DENOISER = {"kind": "denoiser", "width": 64}
APUDAE = {
    "kind": "apudae", "steps": 15, "rate": 0.4, "optimiser": "sgd", "target": "minimum",
    "scaled": False, "noise_255": 0, "transform": None,
}  # fmt: skip
DEFENSES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "autoencoder": (KOO, None),
    "RT2 on it, random": ({"kind": "random_transform", "transform": RT2, "inner": KOO}, None),
    "denoiser, own detector": (DENOISER, None),
    "APuDAE on it, own detector": (DENOISER, APUDAE),
}
LOAD = """
import sys, time, torch, mlflow, mlflow.pyfunc
start = time.perf_counter(), time.process_time()
mlflow.pyfunc.load_model(sys.argv[1])
print(time.perf_counter() - start[0], time.process_time() - start[1])
"""


def make(folder: Path, family: str, model: dict[str, Any]) -> Path:
    card = ModelCard(
        format=1, family=family, model=model, shape=list(SHAPE),
        class_names=[str(label) for label in range(10)], provenance={},
    )  # fmt: skip
    torch.manual_seed(0)
    save(folder, build(card), card)
    return folder


def register(folder: Path) -> dict[str, Subject]:
    """Register every defense from `folder`, which must be the working directory."""
    classifier = make(folder / "classifier", "classifier", {"kind": "small_cnn", "width": 16})
    subjects, registrations = {}, []
    for index, (name, (network, inference)) in enumerate(DEFENSES.items()):
        purifier = make(folder / f"purifier{index}", "purifier", network)
        use = TypeAdapter(InferenceConfig).validate_python(inference) if inference else None
        subjects[name] = Subject(classifier, purifier, inference=use)
        folders = {"classifier": classifier, "purifier": purifier}
        tags = {"defense": name}
        registrations.append(
            Registration(
                name=f"defense{index}", version_of=NAME, fingerprint=name,
                digest=subjects[name].defense().digest, folders=folders,
                inference=inference, metrics={}, tags=tags, description=name,
            )
        )  # fmt: skip
    tracker = Tracker("benchmark", NAME, {}, "key")
    tracker.finish("FINISHED", registrations)
    tracker.thread.join()
    if tracker.problem:
        raise SystemExit(tracker.problem)
    return subjects


def loading_times(uri: str, times: int, folder: Path) -> str:
    """Return a description of the time that fresh processes take to load a model."""
    environment = {**os.environ, "PYTHONPATH": ""}
    command = [sys.executable, "-W", "ignore", "-c", LOAD, uri]
    printed = [
        subprocess.run(
            command, cwd=folder, env=environment, check=True, capture_output=True, text=True
        ).stdout
        for _ in range(times)
    ]
    wall, cpu = zip(*(map(float, line.split()) for line in printed), strict=True)
    return f"wall {spread(wall, ' s')}, CPU {spread(cpu, ' s')}"


def spread(values: Sequence[float], unit: str = "") -> str:
    return f"{median(values):.2f}{unit} ({min(values):.2f} to {max(values):.2f})"


def serve(uri: str) -> tuple[subprocess.Popen[bytes], str]:
    """Start a server and wait until it is up; return its process and address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    command = [
        sys.executable, "-m", "mlflow", "models", "serve", "-m", uri, "--env-manager", "local",
        "--port", address.rpartition(":")[2],
    ]  # fmt: skip
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/ping", timeout=5).close()
            break
        except OSError:
            time.sleep(0.2)
    return process, f"{address}/invocations"


def request(address: str, body: bytes) -> None:
    sent = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(sent) as response:
        json.load(response)


def timed(work: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    with torch.no_grad():
        work()
    return clock() - start


def prediction_times(uri: str, subject: Subject, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every round, by method."""
    x = torch.rand(BATCH, *SHAPE, generator=torch.Generator().manual_seed(0))
    array, body = x.numpy(), json.dumps({"inputs": x.tolist()}).encode()
    defense, served = subject.defense(), mlflow.pyfunc.load_model(uri)
    assert defense.purifier is not None
    detector_score = defense.purifier.detector_score
    process, address = serve(uri)
    methods: dict[str, Callable[[], Any]] = {
        "direct": lambda: defense(x),
        "with detector score": lambda: (defense(x), detector_score(x)),
        "served": lambda: served.predict(array),
        "http, wall": lambda: request(address, body),
    }
    times: dict[str, list[float]] = {method: [] for method in methods}
    try:
        for round_ in range(rounds + 3):
            for method, work in methods.items():
                clock = time.perf_counter if method.startswith("http") else time.process_time
                taken = timed(work, clock)
                if round_ >= 3:  # the first rounds warm up
                    times[method].append(taken)
    finally:
        process.terminate()
        process.wait()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--loads", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chdir(folder)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"
        subjects = register(folder)
        versions = mlflow.MlflowClient().search_model_versions(f"name = '{NAME}'")
        uris = {v.tags["defense"]: f"models:/{NAME}/{v.version}" for v in versions}
        first = uris[next(iter(DEFENSES))]
        local = mlflow.artifacts.download_artifacts(first)
        print(f"loading beyond torch and mlflow, n = {options.loads}, median (range):")
        for how, uri in (("from its folder", local), ("from the registry", first)):
            print(f"{how:28}{loading_times(uri, options.loads, folder)}")
        print(f"\nbatches of {BATCH} on one thread, ms, median of {options.rounds} rounds:")
        for index, (defense, subject) in enumerate(subjects.items()):
            times = prediction_times(uris[defense], subject, options.rounds)
            if not index:
                heads = "".join(f"{method:>20}" for method in times)
                print(f"{'':28}{heads}   direct/served")
            both = zip(times["direct"], times["served"], strict=True)
            ratios = [direct / served for direct, served in both]
            medians = "".join(f"{1e3 * median(each):20.1f}" for each in times.values())
            print(f"{defense:28}{medians}   {spread(ratios)}", flush=True)
        os.chdir(ROOT)


if __name__ == "__main__":
    main()
