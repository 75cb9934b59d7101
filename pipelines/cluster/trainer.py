"""Trains a network with Ray Train, on this machine or on the nodes of a cluster, or without Ray.

Results are bit-equal for an equal number of workers. The nodes of a job share no disk: states and
the result travel through the store (`job_files`), events through a queue of Ray.
"""

import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from components.data.image_set import ImageSet
from components.data.shards import DataError, write_json
from components.models.checkpoints import ModelCard, latest_state, pack_state, save, save_state
from components.training import Diverged
from components.training.contract import Objective
from components.training.loop import Training, Validate, fit
from pipelines.cluster import capacity, session, worker_pool
from pipelines.cluster.worker_pool import MAX_FAILURES, WorkerPool, given_up
from pipelines.config.resources import TrainingWorkers
from pipelines.storage import job_files, jobs

STATES = "states"
HISTORY = "history.json"
# Errors that another try would raise again. A subclass comes before its base class.
USER_ERRORS = (DataError, ValueError, Diverged, MemoryError)
# What a training sends while it runs: ("say", line), ("epochs", first index, their metrics) or
# ("failed", error).
Event = tuple[Any, ...]


@dataclass(frozen=True)
class TrainingTask:
    """All that a worker needs to train one network.

    `finish` is called once with the trained network, then `card` describes it.
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


@dataclass(frozen=True)
class _Run:
    """One training, as each of its workers receives it; the folders are absolute."""

    setup: Callable[..., TrainingTask]
    arguments: Mapping[str, Any]
    out: Path
    resume: Path
    workers: TrainingWorkers


def train(
    setup: Callable[..., TrainingTask],
    arguments: Mapping[str, Any],
    out: Path,
    resume: Path,
    workers: TrainingWorkers,
    seen: Callable[[int, Mapping[str, float]], None],
    say: Callable[[str], None],
) -> dict[str, float]:
    """Train the task that `setup(**arguments, device=...)` returns; write the model to `out`.

    The workers are those of Ray Train; without workers this process trains, or in a job one worker
    on a node of the cluster. Each worker calls `setup`, which must be importable by name. Training
    resumes from the newest undamaged state below `resume`, a folder named by everything that the
    result depends on. `seen` receives every epoch once, in order, as it ends; `say` receives lines
    for a person. Returns the metrics of the last epoch. Raises ConnectionError where a cluster has
    had too few nodes for too long.
    """
    run = _Run(setup, dict(arguments), out.absolute(), resume.absolute(), workers)
    finished, failures = 0, []

    def receive(event: Event) -> None:
        nonlocal finished
        match event:
            case "say", line:
                say(line)
            case "epochs", start, history:
                for index, metrics in enumerate(history, start):
                    # A worker that resumes sends the epochs before its state again.
                    if index == finished:
                        finished += 1
                        seen(index, metrics)
            case "failed", error:
                failures.append(error)

    inside = session.held()
    with (
        session.hold(workers), session.quiet(),
        capacity.watch_capacity(workers, workers.least, say) as watch,
    ):  # fmt: skip
        if workers.most == 0 and (inside or not jobs.job()):
            worker_pool.call(_train_here, {"run": run, "first": True, "send": receive})
        else:
            # In a job never in this process: it runs on the head, which only coordinates.
            with _event_queue(receive) as send:
                trains = _train_with_ray if workers.most else _train_with_one_worker
                session.run_in_thread(lambda: trains(run, send), watch.raise_if_given_up)
    if failures:
        raise failures[0]
    job_files.download_folder(out)
    last: dict[str, float] = json.loads((out / HISTORY).read_text())[-1]
    return last


@contextmanager
def _event_queue(receive: Callable[[Event], None]) -> Iterator[Callable[[Event], None]]:
    """Yield a function that sends an event from any node to `receive`, which a thread calls.

    At the end of the context, all events that were sent have been received.
    """
    import ray
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # On this node, so that it is lost only together with this process.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})

    def follow() -> None:
        # Where Ray itself is lost, the training fails by it.
        with suppress(ray.exceptions.RayError):
            while (event := queue.get()) is not None:
                receive(event)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield queue.put
    finally:
        with suppress(ray.exceptions.RayError):
            queue.put(None)
        thread.join()


def _train_with_one_worker(run: _Run, send: Callable[[Event], None]) -> None:
    call = {"run": run, "first": True, "send": send}
    WorkerPool(run.workers).map(_train_here, [call], lambda *_: None)


def _train_with_ray(run: _Run, send: Callable[[Event], None]) -> None:
    """Let Ray Train call `_worker` in its workers."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    workers = run.workers
    storage = f"{os.environ[jobs.STORAGE]}/ray" if jobs.job() else str(run.resume / "ray")
    resources = {"CPU": workers.cpus, **({"GPU": workers.gpus_each} if workers.gpus_each else {})}
    fixed = workers.least == workers.most
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"run": run, "send": send},
        scaling_config=ScalingConfig(
            num_workers=workers.most if fixed else (workers.least, workers.most),
            use_gpu=workers.gpus_each > 0,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=run.resume.name,
            storage_path=storage,
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        raise given_up(error) from None


def _worker(config: dict[str, Any]) -> None:
    """Train in one worker of Ray Train.

    Nothing is reported to Ray Train, since a report waits until it is read. A user's error is sent,
    since Ray Train would retry it. An error of memory is raised: the other workers wait for this
    one, and Ray Train ends them.
    """
    import ray.train

    job_files.download_inputs()
    send = config["send"]
    try:
        _train_here(config["run"], ray.train.get_context().get_world_rank() == 0, send)
    except USER_ERRORS as error:
        kind = next(kind for kind in USER_ERRORS if isinstance(error, kind))
        send(("failed", kind(str(error))))


def _train_here(run: _Run, first: bool, send: Callable[[Event], None]) -> None:
    """Train in this process; the first worker keeps the states, sends events and writes `out`."""
    torch.set_num_threads(run.workers.cpus)
    task = run.setup(**run.arguments, device=run.workers.device)
    damaged: list[Path] = []
    state = _resume_state(run.resume / STATES, first, damaged.append)
    history: list[dict[str, float]] = list(state["history"]) if state else []
    epochs = fit(
        task.model, task.objective, task.data, task.attacked, task.training, task.seed,
        task.validate, state,
    )  # fmt: skip
    if not first:
        for _ in epochs:
            pass
        return
    for path in damaged:
        send(("say", f"{path} is damaged and was passed over"))
    if history:
        send(("say", f"goes on after epoch {len(history)}"))
        send(("epochs", 0, history))

    def keep(index: int, packed: bytes, metrics: Mapping[str, float]) -> None:
        save_state(run.resume / STATES, index, packed)
        job_files.upload(run.resume / STATES)
        send(("epochs", index, [metrics]))

    # A state is written, and uploaded to the store, while the next epoch runs.
    with ThreadPoolExecutor(max_workers=1) as background:
        kept: Future[None] | None = None
        for epoch in epochs:
            history.append(epoch.metrics)
            if kept:
                kept.result()
            packed = pack_state({**epoch.state, "history": history})
            kept = background.submit(keep, epoch.index, packed, epoch.metrics)
        if kept:
            kept.result()
    task.model.eval()
    task.finish(task.model)
    save(run.out, task.model, task.card(task.model))
    write_json(run.out / HISTORY, history)
    job_files.upload(run.out)


def _resume_state(
    states: Path, first: bool, passed_over: Callable[[Path], None]
) -> dict[str, Any] | None:
    """Return the newest undamaged state, or None.

    Only the first worker writes states, so only it needs the folder itself; the others may run
    beside it and read a copy.
    """
    if first or not jobs.job():
        job_files.download_folder(states)
        return latest_state(states, passed_over)
    with tempfile.TemporaryDirectory() as folder:
        job_files.download_folder(states, Path(folder))
        return latest_state(Path(folder), passed_over)
