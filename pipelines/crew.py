"""Workers that stay: a function is mapped over pieces by processes that do one after another.

Ray would run a piece as a task, and one with a GPU in a process of its own, which imports torch and
wakes the GPU anew; so the workers are actors. A piece whose worker or node is gone is done again.
Nothing that is computed depends on the number of workers. In a job they are on nodes which share no
disk (`place`).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipelines import place, session
from pipelines.resources import Share

# A worker that dies is replaced this often for one piece; an error of the piece is not tried again.
MAX_FAILURES = 3
OUT_OF_MEMORY = "a worker ran out of memory; lower batch_size of the training, or batch"

Done = Callable[[int, int], None]


def map_shards(
    function: Callable[..., Any],
    tasks: Sequence[Mapping[str, Any]],
    share: Share,
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
    if not share.workers and not place.job():
        return _in_turn(function, calls, done)
    with session.hold(share), session.patience(share, 1, waiting) as patience:
        crew = of(share)
        # Waiting for Ray in the main thread would swallow an interruption.
        results: list[Any] = session.apart(lambda: crew.map(function, calls, done), patience.check)
    return results


def _in_turn(
    function: Callable[..., Any], calls: Sequence[Mapping[str, Any]], done: Done
) -> list[Any]:
    results = []
    for arguments in calls:
        results.append(_call(function, arguments))
        done(len(results), len(calls))
    return results


def of(share: Share) -> "Crew":
    """Return the workers of a share, the same for as long as this Ray is held."""
    crew: Crew = session.kept.setdefault(share, Crew(share))
    return crew


class Hand:
    """One worker, an actor of Ray's."""

    def ready(self) -> None:
        """Say that it is there, and has imported what takes long."""
        import torch  # noqa: F401

    def do(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        """Make a call, with the inputs of the job beside it."""
        place.localise()
        return _call(function, arguments)


def _call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    import torch

    try:
        return function(**arguments)
    except torch.OutOfMemoryError:
        raise MemoryError(OUT_OF_MEMORY) from None


def _last(error: Exception) -> Exception:
    """Return what to raise where the loss of a worker is not borne any more."""
    import ray

    memory = isinstance(error, ray.exceptions.OutOfMemoryError)
    return MemoryError(OUT_OF_MEMORY) if memory else error


class Crew:
    """The workers of a share, at least one; they come as they are needed, and stay."""

    def __init__(self, share: Share) -> None:
        import ray

        self.size = max(share.most, 1)
        self.hand = ray.remote(
            num_cpus=share.cpus,
            num_gpus=share.gpus,
            scheduling_strategy="SPREAD" if place.job() else "DEFAULT",
        )(Hand)
        self.idle: list[Any] = []
        # Those that are not there yet, each by what is there with it: no call waits for them.
        self.coming: dict[Any, Any] = {}

    def map(
        self, function: Callable[..., Any], calls: Sequence[Mapping[str, Any]], done: Done
    ) -> list[Any]:
        """Make all calls; return the results in order, or raise what one of them raised."""
        import ray

        waits = list(range(len(calls)))[::-1]
        busy: dict[Any, tuple[Any, int]] = {}
        results: dict[int, Any] = {}
        lost: Counter[int | None] = Counter()
        while len(results) < len(calls):
            while waits and self.idle:
                hand, index = self.idle.pop(), waits.pop()
                named = hand.do.options(name=function.__name__)
                busy[named.remote(function, calls[index])] = hand, index
            self.hire(min(len(waits), self.size - len(busy)))
            [reference], _ = ray.wait([*busy, *self.coming], num_returns=1)
            hand, piece = busy.pop(reference, (self.coming.pop(reference, None), None))
            try:
                result = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError as error:
                # It may only be out of reach. Those who wait may be gone with it, and are asked.
                ray.kill(hand)
                self.coming |= {waiting.ready.remote(): waiting for waiting in self.idle}
                self.idle.clear()
                lost[piece] += 1
                # A node that goes takes all with it that were coming there.
                if lost[piece] > MAX_FAILURES * (self.size if piece is None else 1):
                    raise _last(error) from None
                waits += [] if piece is None else [piece]
                continue
            self.idle.append(hand)
            if piece is not None:
                results[piece] = result
                done(len(results), len(calls))
        return [results[index] for index in range(len(calls))]

    def hire(self, wanted: int) -> None:
        """Have so many workers on their way."""
        for _ in range(wanted - len(self.coming)):
            hand = self.hand.remote()
            self.coming[hand.ready.remote()] = hand
