"""Maps a function over tasks with long-lived workers.

A worker is a Ray actor that makes one call after another. Plain Ray tasks would need a new process
for every call with a GPU, which imports torch and initialises the GPU again. A task whose worker or
node is lost is given to another worker; no result depends on the number of workers. Ray's own
retries (`max_restarts`, `max_task_retries`) do not serve here: they are used up before Ray notices
that a node is gone, or they wait for the lost worker until there is room to restart it, while the
others are idle.
"""

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pipelines.cluster import capacity, session
from pipelines.config.resources import Workers
from pipelines.errors import Failed
from pipelines.storage import job_files, jobs

# How often a task is retried when its worker is lost. An error that it raises is not retried.
MAX_FAILURES = 3
OUT_OF_MEMORY = "a worker ran out of memory; lower batch_size of the training, or batch"
DIED = (
    "the same work ended its worker process again and again: compiled code crashed, or the process "
    "was killed, for example for want of memory; with `workers: 0` in resources the stage does the "
    "work itself, and says where it dies"
)
# How Ray begins to say that a process is gone, whatever ended it.
ENDED = "died unexpectedly"

Done = Callable[[int, int], None]


def map_shards(
    function: Callable[..., Any],
    tasks: Sequence[Mapping[str, Any]],
    workers: Workers,
    done: Done,
    say: Callable[[str], None],
    threads: int = 1,
) -> list[Any]:
    """Call `function(**task, device=...)` for every task; return the results in order.

    Uses Ray workers, which must be able to import `function` by name; without workers, and outside
    of a job, this process makes the calls, with so many threads of torch. `done` receives how many
    of how many tasks are done, `say` a line whenever the cluster has too few nodes. Raises what a
    call raises, and ConnectionError where the cluster has had too few nodes for too long.
    """
    calls = [{**task, "device": workers.device} for task in tasks]
    if not calls:
        return []
    if not workers.workers and not jobs.job():
        session.require_gpus(workers)
        results = []
        for arguments in calls:
            # The copy lies elsewhere than between large blocks that the call has freed, which the
            # next call could then not use again.
            results.append(copy.deepcopy(call(function, arguments, threads)))
            done(len(results), len(calls))
        return results
    with session.hold(workers), capacity.watch_capacity(workers, 1, say) as watch:
        if workers not in session.kept:
            session.kept[workers] = WorkerPool(workers)
        pool: WorkerPool = session.kept[workers]
        return list(
            session.run_in_thread(lambda: pool.map(function, calls, done), watch.raise_if_given_up)
        )


class Worker:
    """A process that makes calls; an actor of Ray."""

    def run(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        """Make a call, with the inputs of the job on this node."""
        job_files.download_inputs()
        try:
            return call(function, arguments)
        finally:
            # Other workers may share the GPU while this one is idle.
            torch.cuda.empty_cache()


def call(function: Callable[..., Any], arguments: Mapping[str, Any], threads: int = 1) -> Any:
    """Call a function with so many threads of torch: workers side by side would share the cores.

    Raises MemoryError where its GPU has too little memory.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return function(**arguments)
    except torch.OutOfMemoryError:
        raise MemoryError(OUT_OF_MEMORY) from None
    finally:
        torch.set_num_threads(before)


def _losses() -> tuple[type[Exception], ...]:
    """Return the errors that Ray raises when a worker is lost."""
    from ray import exceptions

    return (
        exceptions.RayActorError, exceptions.WorkerCrashedError, exceptions.NodeDiedError,
        exceptions.OutOfMemoryError, exceptions.ObjectLostError,
    )  # fmt: skip


def given_up(error: Exception) -> Exception:
    """Return the error to raise where the same work has lost too many workers."""
    text = f"{type(error).__name__}: {error}"
    # Ray's error has the name of torch's.
    if torch.OutOfMemoryError.__name__ in text:
        return MemoryError(OUT_OF_MEMORY)
    return Failed(4, DIED) if ENDED in text else error


class WorkerPool:
    """At least one worker; they are started when they are needed, and stay for later maps."""

    def __init__(self, workers: Workers) -> None:
        import ray

        self.size = max(workers.most, 1)
        self.actor = ray.remote(
            num_cpus=workers.cpus,
            num_gpus=workers.gpus_each,
            scheduling_strategy="SPREAD" if jobs.job() else "DEFAULT",
        )(Worker)
        self.idle: list[Any] = []
        # Workers not known to be alive, by the reference that is ready when they are. They get no
        # task yet: there may be no node for them.
        self.starting: dict[Any, Any] = {}

    def map(
        self, function: Callable[..., Any], calls: Sequence[Mapping[str, Any]], done: Done
    ) -> list[Any]:
        """Make all calls; return the results in order, or raise what one of them raised.

        The workers that are busy when a call raises are not used again; Ray ends them.
        """
        import ray

        waiting = list(range(len(calls)))[::-1]
        busy: dict[Any, tuple[Any, int | None]] = {}
        results: dict[int, Any] = {}
        losses: Counter[int | None] = Counter()
        while len(results) < len(calls):
            while waiting and self.idle:
                worker, index = self.idle.pop(), waiting.pop()
                run = worker.run.options(name=function.__name__)
                busy[run.remote(function, calls[index])] = worker, index
            self.scale_up(min(len(waiting), self.size - len(busy)))
            [reference], _ = ray.wait([*busy, *self.starting], num_returns=1)
            if reference in busy:
                worker, task = busy.pop(reference)
            else:
                worker, task = self.starting.pop(reference), None
            try:
                result = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except _losses() as error:
                self._replace(worker)
                losses[task] += 1
                # A lost node takes all workers with it that were starting there.
                if losses[task] > MAX_FAILURES * (self.size if task is None else 1):
                    raise given_up(error) from None
                waiting += [] if task is None else [task]
                continue
            self.idle.append(worker)
            if task is None:
                losses[None] = 0
            else:
                results[task] = result
                done(len(results), len(calls))
        return [results[task] for task in range(len(calls))]

    def scale_up(self, count: int) -> None:
        """Start workers until so many are starting."""
        for _ in range(count - len(self.starting)):
            worker = self.actor.remote()
            self.starting[worker.__ray_ready__.remote()] = worker

    def _replace(self, lost: Any) -> None:
        """Give up a worker; give the idle ones no task before it is known that they are alive."""
        import ray

        # It may be alive and only unreachable.
        ray.kill(lost)
        unsure = [*self.idle, *self.starting.values()]
        self.idle.clear()
        self.starting = {worker.__ray_ready__.remote(): worker for worker in unsure}
