"""Workers that stay: a function is mapped over pieces by processes that do one after another.

Ray would run a piece as a task, and one with a GPU in a process of its own, which imports torch and
wakes the GPU anew; so the workers are actors. A piece whose worker or node is gone is done again.
Nothing that is computed depends on the number of workers. In a job they are on nodes which share no
disk (`place`).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipelines.cluster import capacity, session
from pipelines.config.resources import Workers
from pipelines.storage import job_files, jobs

# A worker that dies is replaced this often for one piece; an error of the piece is not tried again.
MAX_FAILURES = 3
OUT_OF_MEMORY = "a worker ran out of memory; lower batch_size of the training, or batch"

Done = Callable[[int, int], None]


def map_shards(
    function: Callable[..., Any],
    tasks: Sequence[Mapping[str, Any]],
    share: Workers,
    done: Done,
    waiting: Callable[[str], None],
) -> list[Any]:
    """Call `function(**task, device=...)` for every task on Ray; return the results in order.

    Without workers here, one after another. `function` must be importable by name; a task is
    retried when its worker or node dies. `waiting` is told when the cluster has too little left to
    go on; ConnectionError when that lasts.
    """
    calls = [{**task, "device": share.device} for task in tasks]
    if not calls:
        return []
    if not share.workers and not jobs.job():
        return _in_turn(function, calls, done)
    with session.hold(share), capacity.watch_capacity(share, 1, waiting) as patience:
        crew = of(share)
        # Waiting for Ray in the main thread would swallow an interruption.
        results: list[Any] = session.run_in_thread(
            lambda: crew.map(function, calls, done), patience.check
        )
    return results


def _in_turn(
    function: Callable[..., Any], calls: Sequence[Mapping[str, Any]], done: Done
) -> list[Any]:
    results = []
    for arguments in calls:
        results.append(_call(function, arguments))
        done(len(results), len(calls))
    return results


def of(share: Workers) -> "Crew":
    """Return the workers of a share, the same for as long as this Ray is held."""
    if share not in session.kept:
        session.kept[share] = Crew(share)
    crew: Crew = session.kept[share]
    return crew


class Hand:
    """One worker, an actor of Ray's."""

    def ready(self) -> None:
        """Say that it is there, and has imported what takes long."""
        import torch  # noqa: F401

    def do(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        """Make a call, with the inputs of the job beside it."""
        import torch

        job_files.localise()
        try:
            return _call(function, arguments)
        finally:
            # Others share the GPU while this one waits.
            torch.cuda.empty_cache()


def _call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    import torch

    try:
        return function(**arguments)
    except torch.OutOfMemoryError:
        raise MemoryError(OUT_OF_MEMORY) from None


def _losses() -> tuple[type[Exception], ...]:
    """Return the errors by which Ray says that a worker is lost, whatever it was doing."""
    from ray import exceptions

    return (
        exceptions.RayActorError, exceptions.WorkerCrashedError, exceptions.NodeDiedError,
        exceptions.OutOfMemoryError, exceptions.ObjectLostError,
    )  # fmt: skip


def _bear(error: Exception, times: int, most: int) -> None:
    """Raise what lost a worker where that has been too often."""
    from ray import exceptions

    if times > most:
        memory = isinstance(error, exceptions.OutOfMemoryError)
        raise (MemoryError(OUT_OF_MEMORY) if memory else error) from None


class Crew:
    """The workers of a share, at least one; they come as they are needed, and stay."""

    def __init__(self, share: Workers) -> None:
        import ray

        self.size = max(share.most, 1)
        self.hand = ray.remote(
            num_cpus=share.cpus,
            num_gpus=share.gpus,
            scheduling_strategy="SPREAD" if jobs.job() else "DEFAULT",
        )(Hand)
        self.idle: list[Any] = []
        # Those that have not said that they are there, each by its answer: no call waits for them.
        self.coming: dict[Any, Any] = {}
        self.missed = 0

    def map(
        self, function: Callable[..., Any], calls: Sequence[Mapping[str, Any]], done: Done
    ) -> list[Any]:
        """Make all calls; return the results in order, or raise what one of them raised."""
        import ray

        waits = list(range(len(calls)))[::-1]
        busy: dict[Any, tuple[Any, int]] = {}
        results: dict[int, Any] = {}
        lost: Counter[int] = Counter()
        while len(results) < len(calls):
            while waits and self.idle:
                hand, piece = self.idle.pop(), waits.pop()
                named = hand.do.options(name=function.__name__)
                busy[named.remote(function, calls[piece])] = hand, piece
            self.hire(min(len(waits), self.size - len(busy)))
            [reference], _ = ray.wait([*busy, *self.coming], num_returns=1)
            if reference in self.coming:
                self._welcome(reference)
                continue
            hand, piece = busy.pop(reference)
            try:
                results[piece] = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except _losses() as error:
                self._lose(hand)
                lost[piece] += 1
                _bear(error, lost[piece], MAX_FAILURES)
                waits.append(piece)
            else:
                self.idle.append(hand)
                done(len(results), len(calls))
        return [results[piece] for piece in range(len(calls))]

    def hire(self, wanted: int) -> None:
        """Have at least so many on their way."""
        for _ in range(wanted - len(self.coming)):
            hand = self.hand.remote()
            self.coming[hand.ready.remote()] = hand

    def _welcome(self, reference: Any) -> None:
        """Take in one who has come, or bear that it has not."""
        import ray

        hand = self.coming.pop(reference)
        try:
            ray.get(reference)
        except _losses() as error:
            self._lose(hand)
            self.missed += 1
            # A node that goes takes all with it that were coming there.
            _bear(error, self.missed, MAX_FAILURES * self.size)
        else:
            self.missed = 0
            self.idle.append(hand)

    def _lose(self, hand: Any) -> None:
        """Do without one, and ask all who have nothing to do whether they are there."""
        import ray

        # It may only be out of reach.
        ray.kill(hand)
        asked = [*self.idle, *self.coming.values()]
        self.idle.clear()
        self.coming = {one.ready.remote(): one for one in asked}
