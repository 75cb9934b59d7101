"""What knows Ray, with `tune` and `remote`: train a network, and map a function over shards.

By default a stage with workers starts an embedded Ray of its own (`ray.init(address="local")`),
which no other Ray on the machine is part of, without dashboard; in a job it works on the cluster
that runs the job, whose nodes share no disk (`place`). Nothing that is computed depends on the
number of workers a map uses; training is bit-equal at an equal number of workers.
"""

import json
import logging
import math
import os
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from components.checkpoints import ModelCard, latest_state, pack_state, save, save_state
from components.data import ImageSet
from components.objectives import Objective
from components.shards import DataError, write_json
from components.training import Diverged, Training, Validate, fit
from pipelines import place
from pipelines.params import ConfigError, Share, TrainShare

# Below a training's folder: the states to go on from, and notes for the stage that waits.
STATES, NOTES = "states", "notes"
HISTORY = "history.jsonl"
FAILURE = "failure.json"
# How long a cluster may lack the resources a task needs, as when a node has gone.
WAIT, WAIT_S = "LIMPID_WAIT_S", 300.0
LOOK_S = 5.0
# A worker that dies is replaced this often; a mistake of the user is not tried again.
MAX_FAILURES = 3
MISTAKES: dict[str, type[Exception]] = {
    "ValueError": ValueError,
    "DataError": DataError,
    "Diverged": Diverged,
    "MemoryError": MemoryError,
}
OUT_OF_MEMORY = "a worker ran out of memory; lower batch_size of the training, or batch"
# Set where a cluster grows as it is asked: what it has says nothing then of what it can hold.
AUTOSCALES = "LIMPID_AUTOSCALES"
# What a session sets, and sets back.
SET = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_OVERRIDE_JOB_RUNTIME_ENV")
# What the workers of a job must know of their surroundings; keys and tokens are the nodes' own.
CARRIED = (
    place.JOB, place.STORAGE, place.SCRATCH, "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION",
    "OMP_WAIT_POLICY", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", AUTOSCALES, WAIT,
)  # fmt: skip


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
    share: TrainShare,
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
    place.forget(notes)
    notes.mkdir(parents=True)
    config = {
        "setup": setup,
        "arguments": dict(arguments),
        "out": str(out.absolute()),
        "resume": str(resume.absolute()),
        "threads": share.cpus,
        "device": share.device,
    }
    inside = _started()
    with (
        session(share), _tail(notes / HISTORY, seen, say), quiet(),
        _patience(share, share.least, say) as patience,
    ):  # fmt: skip
        if share.most > 0:
            _train(config, share, patience.check)
        elif place.job() and not inside:
            # The node that leads a cluster is for leading.
            apart(lambda: _alone(share, config), patience.check)
        else:
            _loop(config, True, _unheard)
    if place.see(notes / FAILURE):
        failure = json.loads((notes / FAILURE).read_text())
        raise MISTAKES[failure["kind"]](failure["message"])
    place.see_folder(out)
    last: dict[str, float] = json.loads((out / "history.json").read_text())[-1]
    return last


def _unheard(metrics: Mapping[str, float]) -> None:
    """Report to nobody."""


def _train(config: dict[str, Any], share: TrainShare, meanwhile: Callable[[], None]) -> None:
    """Let Ray Train call `_worker` in as many processes."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resume = Path(config["resume"])
    storage = f"{os.environ[place.STORAGE]}/ray" if place.job() else str(resume / "ray")
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
        apart(trainer.fit, meanwhile)
    except Exception as error:
        if torch.OutOfMemoryError.__name__ in str(error):
            raise MemoryError(OUT_OF_MEMORY) from None
        raise


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
    share: Share,
    done: Callable[[int, int], None],
    waiting: Callable[[str], None],
) -> list[Any]:
    """Call `function(**task, device=...)` for every task on Ray; return the results in order.

    Without workers here, one after another. `function` must be importable by name; a task is
    retried when its worker or node dies. `waiting` is told when the cluster has too little left to
    go on; ConnectionError when that lasts.
    """
    if not tasks:
        return []
    if not share.workers and not place.job():
        return _in_turn(function, tasks, share, done)
    with session(share), _patience(share, 1, waiting) as patience:
        # Waiting for Ray in the main thread would swallow an interruption.
        results: list[Any] = apart(lambda: _map(function, tasks, share, done), patience.check)
    return results


def _in_turn(
    function: Callable[..., Any],
    tasks: Sequence[Mapping[str, Any]],
    share: Share,
    done: Callable[[int, int], None],
) -> list[Any]:
    results = []
    for task in tasks:
        results.append(_call(function, {**task, "device": share.device}))
        done(len(results), len(tasks))
    return results


def _map(
    function: Callable[..., Any],
    tasks: Sequence[Mapping[str, Any]],
    share: Share,
    done: Callable[[int, int], None],
) -> list[Any]:
    import ray

    waits = list(range(len(tasks)))[::-1]
    begun: dict[Any, int] = {}
    doubted: set[Any] = set()
    results: dict[int, Any] = {}
    nodes = set(_nodes())
    while len(results) < len(tasks):
        while waits and len(begun) - len(doubted) < max(share.workers, 1):
            index = waits.pop()
            if index not in results:
                begun[_task(share, function, {**tasks[index], "device": share.device})] = index
        ready, _ = ray.wait(list(begun), num_returns=1, timeout=LOOK_S)
        for reference in ready:
            doubted.discard(reference)
            results[begun.pop(reference)] = _result(reference)
            done(len(results), len(tasks))
        if not ready and nodes - (nodes := set(_nodes())):
            # Of a task on a node that was cut off, Ray hears nothing for many minutes. What may
            # have been there begins again elsewhere, and whoever is first is heard.
            waits += [index for reference, index in begun.items() if reference not in doubted]
            doubted = set(begun)
    return [results[index] for index in range(len(tasks))]


def _alone(share: Share, config: dict[str, Any]) -> None:
    """Train on some node, by an actor: Ray gives it up as soon as its node is cut off.

    A task it would wait for, and begun twice there would be two who write.
    """
    import ray

    class Trainer:
        def train(self) -> None:
            _there(_loop, {"config": config, "first": True, "report": _unheard})

    trainer = ray.remote(
        num_cpus=share.cpus,
        num_gpus=share.gpus,
        max_restarts=MAX_FAILURES,
        max_task_retries=MAX_FAILURES,
        scheduling_strategy="SPREAD",
    )(Trainer).remote()
    _result(trainer.train.remote())


def _task(share: Share, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Start a call on some node, and return what `ray.get` waits for."""
    import ray

    remote = ray.remote(
        name=function.__name__,
        num_cpus=share.cpus,
        num_gpus=share.gpus,
        max_retries=MAX_FAILURES,
        scheduling_strategy="SPREAD" if place.job() else "DEFAULT",
    )(_there)
    return remote.remote(function, arguments)


def _result(reference: Any) -> Any:
    """Return what a call returned, or raise what it raised, not how Ray brought it here."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.OutOfMemoryError:
        raise MemoryError(OUT_OF_MEMORY) from None


def _there(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Make the call in a worker, with the inputs of the job beside it."""
    place.localise()
    return _call(function, arguments)


def _call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    try:
        return function(**arguments)
    except torch.OutOfMemoryError:
        raise MemoryError(OUT_OF_MEMORY) from None


class _Patience:
    """Looks, while something waits for nodes of a cluster, whether they can come to hold it."""

    def __init__(self, share: Share, workers: int, say: Callable[[str], None]) -> None:
        self.share, self.workers, self.say = share, max(workers, 1), say
        self.lacking_since: float | None = None
        self.given_up = ""
        try:
            self.seconds = float(os.environ.get(WAIT) or WAIT_S)
        except ValueError:
            given = os.environ[WAIT]
            raise ConfigError(f"{WAIT} is {given!r}, and should be a number of seconds") from None

    def check(self) -> None:
        """Raise ConnectionError where nodes have lacked it for long."""
        if self.given_up:
            raise ConnectionError(self.given_up)

    def look(self) -> None:
        """Say what living nodes lack now, if anything."""
        lacking = _lacking(self.share, self.workers, list(_nodes().values()))
        if not lacking:
            self.lacking_since = None
            return
        now = time.monotonic()
        self.lacking_since = self.lacking_since or now
        waited = now - self.lacking_since
        if waited > self.seconds and AUTOSCALES not in os.environ:
            self.given_up = f"gave up after {waited:.0f} s: {lacking}"
        else:
            self.say(f"waiting for a node: {lacking} ({waited:.0f} s)")


@contextmanager
def _patience(share: Share, workers: int, say: Callable[[str], None]) -> Iterator[_Patience]:
    """Look now and then, in a job, whose nodes may go; beside what waits: a look may take long."""
    patience, stop = _Patience(share, workers, say), threading.Event()

    def watch() -> None:
        while not patience.given_up and not stop.wait(LOOK_S):
            # Where the head is away this job ends with it.
            with suppress(Exception):
                patience.look()

    if place.job():
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield patience
    finally:
        stop.set()


def _nodes() -> dict[str, dict[str, float]]:
    """Return what every living node has, by its id."""
    import ray

    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def _lacking(share: Share, workers: int, nodes: Sequence[Mapping[str, float]]) -> str:
    """Say what nodes lack that could ever hold so many workers at once; nothing where they can."""
    room = sum(
        min(
            int(node.get("CPU", 0) // share.cpus),
            int(node.get("GPU", 0) / share.gpus) if share.gpus else workers,
        )
        for node in nodes
    )
    if room >= workers:
        return ""
    each = f"{share.cpus} CPU" + (f" and {share.gpus:g} GPU" if share.gpus else "")
    has = ", ".join(f"{node.get('CPU', 0):g} CPU {node.get('GPU', 0):g} GPU" for node in nodes)
    return f"{workers} x {each} needed, and there are {len(nodes)} nodes ({has or 'nothing'})"


def require_room(shares: Sequence[Share], nodes: Sequence[Mapping[str, float]]) -> None:
    """Raise ConfigError where nodes of these resources can never hold what is asked for."""
    for share in shares:
        lacking = _lacking(share, max(share.least, 1), nodes)
        if lacking:
            raise ConfigError(f"resources in params.yaml ask for too much: {lacking}")


@contextmanager
def session(*shares: Share) -> Iterator[None]:
    """Hold a Ray with room for some shares: that of the job, or an embedded one started for it.

    None is started for no worker, nor inside a Ray worker, as in a trial of a search: there the Ray
    that is there serves. ConfigError where this machine or cluster can never hold a share.
    """
    if _started() or not (place.job() or any(share.most for share in shares)):
        yield
        return
    import ray

    # Ray puts a handler of its own on SIGTERM, which would end the stage without a word.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    variables = {name: os.environ.get(name) for name in SET}
    try:
        try:
            with quiet():
                if place.job():
                    _join(shares)
                else:
                    _embed(shares)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        yield
    finally:
        ray.shutdown()
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _started() -> bool:
    """Whether this process has a Ray. Who never imported it has none, and is spared the import."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def _join(shares: Sequence[Share]) -> None:
    import ray

    variables = {name: os.environ[name] for name in CARRIED if name in os.environ}
    # Else Ray takes it for a conflict that the job has some of them already.
    os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"
    ray.init(log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": variables})
    if AUTOSCALES not in os.environ:
        require_room(shares, list(_nodes().values()))


def _embed(shares: Sequence[Share]) -> None:
    import ray

    # A token of its own, known to this process and its children alone: left to itself, Ray takes
    # that of a cluster, or writes one that others may read into the home of its user.
    os.environ.pop("RAY_AUTH_MODE", None)
    os.environ["RAY_AUTH_TOKEN"] = _token()
    found = torch.cuda.device_count()
    waits = any(isinstance(share, TrainShare) for share in shares)
    for share in shares:
        if max(share.least, 1) * share.gpus > found:
            raise ConfigError(
                f"resources in params.yaml ask for {max(share.least, 1)} workers with "
                f"{share.gpus:g} GPU each, and this machine has {found}; gpus: 0 works on the CPU"
            )
    ray.init(
        address="local",
        # Workers beyond the CPUs there are take turns; Ray Train and Tune have one that only waits.
        num_cpus=sum(share.most * share.cpus for share in shares) + waits,
        num_gpus=min(math.ceil(sum(share.most * share.gpus for share in shares)), found),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


@cache
def _token() -> str:
    """Return the token of this process's Ray, one for all its sessions: Ray keeps the first."""
    return secrets.token_hex(32)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what Ray logs of itself; what goes wrong still reaches the caller as an exception."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def _tail(path: Path, seen: EpochSeen, say: Callable[[str], None]) -> Iterator[None]:
    """Follow the file in which the first worker notes what it does, and pass that on."""
    stop = threading.Event()

    def follow() -> None:
        # Who goes on notes again what was known, on another node in a file of its own.
        known: set[str] = set()
        while True:
            ending = stop.is_set()
            lines = path.read_text().splitlines(keepends=True) if place.see(path) else []
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
            stop.wait(1.0 if place.job() else 0.2)

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

    place.localise()
    _loop(config, ray.train.get_context().get_world_rank() == 0, ray.train.report)


def _loop(config: dict[str, Any], first: bool, report: Callable[[dict[str, float]], None]) -> None:
    """Train in one process; the first one keeps the state, the history and the result."""
    resume, out = Path(config["resume"]), Path(config["out"])
    states, notes = resume / STATES, resume / NOTES
    torch.set_num_threads(config["threads"])
    try:
        job: Job = config["setup"](**config["arguments"], device=config["device"])
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
                report(epoch.metrics)
            if kept is not None:
                kept.result()
        if first:
            job.model.eval()
            job.finish(job.model)
            save(out, job.model, job.card(job.model))
            write_json(out / "history.json", history)
            place.share(out)
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
    if first or not place.job():
        place.see_folder(states)
        return latest_state(states, passed_over)
    with tempfile.TemporaryDirectory() as folder:
        place.see_folder(states, Path(folder))
        return latest_state(Path(folder), passed_over)


def _resumed(damaged: Sequence[Path], done: int) -> Iterator[dict[str, str]]:
    """Yield what a person should know of how a training goes on."""
    for path in damaged:
        yield {"said": f"{path} is damaged and was passed over"}
    if done:
        yield {"said": f"goes on after epoch {done}"}


def _keep(resume: Path, index: int, packed: bytes, metrics: Mapping[str, float]) -> None:
    save_state(resume / STATES, index, packed)
    place.share(resume / STATES)
    _note(resume / NOTES, _epochs([metrics], index))


def _epochs(history: Sequence[Mapping[str, float]], start: int) -> list[dict[str, Any]]:
    return [{"epoch": index, **metrics} for index, metrics in enumerate(history, start)]


def _note(notes: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    notes.mkdir(parents=True, exist_ok=True)
    with (notes / HISTORY).open("a") as file:
        for entry in entries:
            file.write(json.dumps(entry) + "\n")
    place.share(notes)


def _fail(notes: Path, kind: str, message: str) -> None:
    write_json(notes / FAILURE, {"kind": kind, "message": message})
    place.share(notes)
