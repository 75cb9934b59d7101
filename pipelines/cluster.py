"""What knows Ray, with `tune`: train a network, and map a function over shards.

By default a stage starts an embedded Ray of its own (`ray.init(address="local")`), which no other
Ray on the machine is part of, without dashboard. Nothing that is computed depends on the number
of workers a map uses; training is bit-equal at an equal number of workers.
"""

import json
import logging
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from components.checkpoints import ModelCard, latest_state, save, save_state
from components.data import ImageSet
from components.objectives import Objective
from components.shards import DataError, write_json
from components.training import Diverged, Training, Validate, fit
from pipelines.params import Resources

HISTORY = "history.jsonl"
FAILURE = "failure.json"
# A worker that dies is replaced this often; a mistake of the user is not tried again.
MAX_FAILURES = 3
MISTAKES: dict[str, type[Exception]] = {
    "ValueError": ValueError,
    "DataError": DataError,
    "Diverged": Diverged,
}


@dataclass(frozen=True)
class Job:
    """All that a worker needs to train one network.

    `finish` is called once with what was trained, then `card` describes it.
    """

    model: nn.Module
    objective: Objective
    data: ImageSet
    attacked: Tensor | None
    training: Training
    seed: int
    validate: Validate
    finish: Callable[[nn.Module], None]
    card: Callable[[nn.Module], ModelCard]


EpochSeen = Callable[[int, Mapping[str, float]], None]


def train(
    setup: Callable[..., Job],
    arguments: Mapping[str, Any],
    out: Path,
    resume: Path,
    resources: Resources,
    seen: EpochSeen,
) -> dict[str, float]:
    """Train what `setup(**arguments, device=...)` describes, by Ray Train, into the folder `out`.

    `setup` runs in every worker and must be importable by name. Training goes on from the newest
    whole state under `resume`, which must be named by everything the result depends on; `seen` is
    called with every epoch as it ends. Returns the metrics of the last epoch.
    """
    import ray

    resume.mkdir(parents=True, exist_ok=True)
    for name in (HISTORY, FAILURE):
        (resume / name).unlink(missing_ok=True)
    config = {
        "setup": setup,
        "arguments": dict(arguments),
        "out": str(out.absolute()),
        "resume": str(resume.absolute()),
        "threads": resources.train_threads,
        "device": _device(resources),
    }
    workers = resources.train_workers
    history = resume / HISTORY
    with session(workers, workers * resources.gpu), _tail(history, seen), quiet():
        if workers == 0 and ray.is_initialized():
            # A trial of a search: Ray Train's mode without workers is refused there.
            _loop(config, True, lambda metrics: None)
        else:
            _train(config, workers, resources.gpu)
    if (resume / FAILURE).exists():
        failure = json.loads((resume / FAILURE).read_text())
        raise MISTAKES[failure["kind"]](failure["message"])
    last: dict[str, float] = json.loads((out / "history.json").read_text())[-1]
    return last


def _train(config: dict[str, Any], workers: int, gpu: bool) -> None:
    """Let Ray Train call `_worker` in as many processes, or in this one for none."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resume = Path(config["resume"])
    trainer = TorchTrainer(
        _worker,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu),
        run_config=RunConfig(
            name=resume.name,
            storage_path=str(resume / "ray"),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
        ),
    )
    if workers:
        apart(trainer.fit)
    else:
        trainer.fit()


def apart(function: Callable[[], Any], meanwhile: Callable[[], None] = lambda: None) -> Any:
    """Call in a thread: in the main one Ray Train and Tune would take over Ctrl-C, and exit with 0.

    `meanwhile` is called again and again in this one.
    """
    results: list[Any] = []
    failures: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
        meanwhile()
    if failures:
        raise failures[0]
    return results[0]


def map_shards(
    function: Callable[..., Any],
    tasks: Sequence[Mapping[str, Any]],
    resources: Resources,
    done: Callable[[int, int], None],
) -> list[Any]:
    """Call `function(**task, device=...)` for every task on Ray; return the results in order.

    `function` must be importable by name; a task is retried when its worker dies.
    """
    if not tasks:
        return []
    with session(resources.shards, resources.shards * resources.gpu):
        # Waiting for Ray in the main thread would swallow an interruption.
        results: list[Any] = apart(lambda: _map(function, tasks, resources, done))
    return results


def _map(
    function: Callable[..., Any],
    tasks: Sequence[Mapping[str, Any]],
    resources: Resources,
    done: Callable[[int, int], None],
) -> list[Any]:
    import ray

    remote = ray.remote(num_cpus=1, num_gpus=int(resources.gpu), max_retries=MAX_FAILURES)(function)
    pending = {
        remote.remote(**task, device=_device(resources)): index for index, task in enumerate(tasks)
    }
    results: list[Any] = [None] * len(tasks)
    while pending:
        (ready,), _ = ray.wait(list(pending), num_returns=1)
        try:
            results[pending.pop(ready)] = ray.get(ready)
        except ray.exceptions.RayTaskError as error:
            # What the function raised, not how Ray brought it here.
            raise error.cause from None
        done(len(tasks) - len(pending), len(tasks))
    return results


def _device(resources: Resources) -> str:
    """Return where tensors live; Ray shows each worker the one GPU that is its own."""
    return "cuda" if resources.gpu else "cpu"


@contextmanager
def session(cpus: int, gpus: float) -> Iterator[None]:
    """Hold an embedded Ray with `cpus` for work beside its own; none is started for no CPU.

    Inside a Ray worker, as in a trial of a search, the Ray that is there serves.
    """
    import ray

    if cpus == 0 or ray.is_initialized():
        yield
        return
    # Ray puts a handler of its own on SIGTERM, which would end the stage without a word.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with quiet():
        ray.init(
            address="local",
            num_cpus=cpus + 1,
            num_gpus=math.ceil(gpus),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    for number, handler in handlers.items():
        signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what Ray logs of itself; what goes wrong still reaches the caller as an exception."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def _tail(path: Path, seen: EpochSeen) -> Iterator[None]:
    """Follow the file in which the first worker notes every epoch, and pass each on."""
    stop = threading.Event()

    def follow() -> None:
        read = 0
        while True:
            ending = stop.is_set()
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            for line in lines[read:]:
                if line.endswith("\n"):
                    read += 1
                    entry = json.loads(line)
                    seen(entry.pop("epoch"), entry)
            if ending:
                return
            stop.wait(0.2)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _worker(config: dict[str, Any]) -> None:
    """Train in one worker of Ray Train."""
    import ray.train

    _loop(config, ray.train.get_context().get_world_rank() == 0, ray.train.report)


def _loop(config: dict[str, Any], first: bool, report: Callable[[dict[str, float]], None]) -> None:
    """Train in one process; the first one keeps the state, the history and the result."""
    resume, out = Path(config["resume"]), Path(config["out"])
    torch.set_num_threads(config["threads"])
    try:
        job: Job = config["setup"](**config["arguments"], device=config["device"])
        state = latest_state(resume)
        history: list[dict[str, float]] = list(state["history"]) if state else []
        epochs = fit(
            job.model, job.objective, job.data, job.attacked, job.training, job.seed,
            job.validate, state,
        )  # fmt: skip
        if first:
            _note(resume, history, 0)
        for epoch in epochs:
            history.append(epoch.metrics)
            if first:
                save_state(resume, epoch.index, {**epoch.state, "history": history})
                _note(resume, history[-1:], epoch.index)
            report(epoch.metrics)
        if first:
            job.model.eval()
            job.finish(job.model)
            save(out, job.model, job.card(job.model))
            write_json(out / "history.json", history)
    except tuple(MISTAKES.values()) as error:
        kind = next((n for n, m in MISTAKES.items() if type(error) is m), "ValueError")
        write_json(resume / FAILURE, {"kind": kind, "message": str(error)})


def _note(resume: Path, entries: Sequence[Mapping[str, float]], start: int) -> None:
    with (resume / HISTORY).open("a") as file:
        for index, metrics in enumerate(entries, start):
            file.write(json.dumps({"epoch": index, **metrics}) + "\n")
