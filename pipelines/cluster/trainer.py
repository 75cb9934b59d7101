"""Training done by Ray: by one worker or many, on this machine or the nodes of a cluster.

In a job that is on nodes which share no disk (`place`). It is bit-equal at an equal number of
workers.
"""

import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from components.data.image_set import ImageSet
from components.data.shards import DataError, write_json
from components.models.checkpoints import ModelCard, latest_state, pack_state, save, save_state
from components.training.contract import Objective
from components.training.loop import Diverged, Training, Validate, fit
from pipelines.cluster import capacity, session
from pipelines.cluster.worker_pool import MAX_FAILURES, OUT_OF_MEMORY, WorkerPool
from pipelines.config.resources import TrainingWorkers
from pipelines.storage import job_files, jobs

# Below a training's folder: the states to go on from, and notes for the stage that waits.
STATES, NOTES = "states", "notes"
HISTORY = "history.jsonl"
FAILURE = "failure.json"
# A mistake of the user is not tried again.
MISTAKES: dict[str, type[Exception]] = {
    "ValueError": ValueError,
    "DataError": DataError,
    "Diverged": Diverged,
    "MemoryError": MemoryError,
}


@dataclass(frozen=True)
class TrainingTask:
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
    setup: Callable[..., TrainingTask],
    arguments: Mapping[str, Any],
    out: Path,
    resume: Path,
    share: TrainingWorkers,
    seen: EpochSeen,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Train what `setup(**arguments, device=...)` describes into the folder `out`.

    By workers of Ray Train; for none in this process, or in a job as one task on a node that may
    work. `setup` runs in each and must be importable by name. Training goes on from the newest
    whole state under `resume`, which must be named by everything the result depends on; `seen` is
    called with every epoch as it ends, `say` with what else a person should know. Returns the
    metrics of the last epoch. Raises ConnectionError when a cluster has too little left for long.
    """
    notes = resume.absolute() / NOTES
    job_files.remove(notes)
    notes.mkdir(parents=True)
    config = {
        "setup": setup,
        "arguments": dict(arguments),
        "out": str(out.absolute()),
        "resume": str(resume.absolute()),
        "threads": share.cpus,
        "device": share.device,
    }
    inside = session.held()
    with (
        session.hold(share), _tail(notes / HISTORY, seen, say), session.quiet(),
        capacity.watch_capacity(share, share.least, say) as watch,
    ):  # fmt: skip
        if share.most > 0:
            _train(config, share, watch.raise_if_given_up)
        elif jobs.job() and not inside:
            # The node that leads a cluster is for leading.
            alone = [{"config": config, "first": True}]
            session.run_in_thread(
                lambda: WorkerPool(share).map(_loop, alone, _unheard), watch.raise_if_given_up
            )
        else:
            _loop(config, True)
    if job_files.download(notes / FAILURE):
        failure = json.loads((notes / FAILURE).read_text())
        raise MISTAKES[failure["kind"]](failure["message"])
    job_files.download_folder(out)
    last: dict[str, float] = json.loads((out / "history.json").read_text())[-1]
    return last


def _unheard(done: int, total: int) -> None:
    """Hear nothing of pieces where there is one."""


def _train(config: dict[str, Any], share: TrainingWorkers, meanwhile: Callable[[], None]) -> None:
    """Let Ray Train call `_worker` in as many processes."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resume = Path(config["resume"])
    storage = f"{os.environ[jobs.STORAGE]}/ray" if jobs.job() else str(resume / "ray")
    scaling = ScalingConfig(
        num_workers=share.most if share.least == share.most else (share.least, share.most),
        use_gpu=share.gpus > 0,
        resources_per_worker={"CPU": share.cpus, **({"GPU": share.gpus} if share.gpus else {})},
    )
    trainer = TorchTrainer(
        _worker,
        train_loop_config=config,
        scaling_config=scaling,
        run_config=RunConfig(
            name=resume.name,
            storage_path=storage,
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
        ),
    )
    try:
        session.run_in_thread(trainer.fit, meanwhile)
    except Exception as error:
        if torch.OutOfMemoryError.__name__ in str(error):
            raise MemoryError(OUT_OF_MEMORY) from None
        raise


@contextmanager
def _tail(path: Path, seen: EpochSeen, say: Callable[[str], None]) -> Iterator[None]:
    """Follow the file in which the first worker notes what it does, and pass that on."""
    stop = threading.Event()

    def follow() -> None:
        # Who goes on notes again what was known, on another node in a file of its own.
        known: set[str] = set()
        while True:
            ending = stop.is_set()
            lines = path.read_text().splitlines(keepends=True) if job_files.download(path) else []
            for line in lines:
                if line.endswith("\n") and line not in known:
                    known.add(line)
                    entry = json.loads(line)
                    if "said" in entry:
                        say(entry["said"])
                    else:
                        seen(entry.pop("epoch"), entry)
            if ending:
                return
            stop.wait(1.0 if jobs.job() else 0.2)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _worker(config: dict[str, Any]) -> None:
    """Train in one worker of Ray Train, which is told nothing in between: a report waits for it."""
    import ray.train

    job_files.download_inputs()
    _loop(config, ray.train.get_context().get_world_rank() == 0)


def _loop(config: dict[str, Any], first: bool) -> None:
    """Train in one process; the first one keeps the state, the history and the result."""
    resume, out = Path(config["resume"]), Path(config["out"])
    states, notes = resume / STATES, resume / NOTES
    torch.set_num_threads(config["threads"])
    try:
        job: TrainingTask = config["setup"](**config["arguments"], device=config["device"])
        damaged: list[Path] = []
        state = _resumable(states, first, damaged.append)
        history: list[dict[str, float]] = list(state["history"]) if state else []
        epochs = fit(
            job.model, job.objective, job.data, job.attacked, job.training, job.seed,
            job.validate, state,
        )  # fmt: skip
        # A state is written, and brought to the store of a cluster, while the next epoch runs.
        with ThreadPoolExecutor(max_workers=1) as beside:
            known = [*_resumed(damaged, len(history)), *_epochs(history, 0)]
            kept = beside.submit(_note, notes, known) if first else None
            for epoch in epochs:
                history.append(epoch.metrics)
                if kept is not None:
                    kept.result()
                    packed = pack_state({**epoch.state, "history": history})
                    kept = beside.submit(_keep, resume, epoch.index, packed, epoch.metrics)
            if kept is not None:
                kept.result()
        if first:
            job.model.eval()
            job.finish(job.model)
            save(out, job.model, job.card(job.model))
            write_json(out / "history.json", history)
            job_files.upload(out)
    except tuple(MISTAKES.values()) as error:
        kind = next((n for n, m in MISTAKES.items() if type(error) is m), "ValueError")
        _fail(notes, kind, str(error))
    except torch.OutOfMemoryError:
        if dist.is_initialized():
            # The others of the group wait for this one, and must not for ever.
            raise
        _fail(notes, "MemoryError", OUT_OF_MEMORY)


def _resumable(
    states: Path, first: bool, passed_over: Callable[[Path], None]
) -> dict[str, Any] | None:
    """Return the newest whole state; the first worker, which writes them, has them all here."""
    if first or not jobs.job():
        job_files.download_folder(states)
        return latest_state(states, passed_over)
    with tempfile.TemporaryDirectory() as folder:
        job_files.download_folder(states, Path(folder))
        return latest_state(Path(folder), passed_over)


def _resumed(damaged: Sequence[Path], done: int) -> Iterator[dict[str, str]]:
    """Yield what a person should know of how a training goes on."""
    for path in damaged:
        yield {"said": f"{path} is damaged and was passed over"}
    if done:
        yield {"said": f"goes on after epoch {done}"}


def _keep(resume: Path, index: int, packed: bytes, metrics: Mapping[str, float]) -> None:
    save_state(resume / STATES, index, packed)
    job_files.upload(resume / STATES)
    _note(resume / NOTES, _epochs([metrics], index))


def _epochs(history: Sequence[Mapping[str, float]], start: int) -> list[dict[str, Any]]:
    return [{"epoch": index, **metrics} for index, metrics in enumerate(history, start)]


def _note(notes: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    notes.mkdir(parents=True, exist_ok=True)
    with (notes / HISTORY).open("a") as file:
        for entry in entries:
            file.write(json.dumps(entry) + "\n")
    job_files.upload(notes)


def _fail(notes: Path, kind: str, message: str) -> None:
    write_json(notes / FAILURE, {"kind": kind, "message": message})
    job_files.upload(notes)
