"""The contract that every pool of workers keeps, and the serial pool.

A task is a small picklable object with a ``label`` and ``run(state)``. ``state`` is its worker's own dict, in which
tasks keep what is worth reusing (a loaded model, a memory-mapped bank). A task that writes files names them, or their
directory, in ``makes``; every other path in its fields is something that it reads (see workers.storage.staging).
"""

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from bitgenome.common.errors import UserError
from bitgenome.common.host_memory import close_all, peak_host_memory
from workers.errors import TaskError


class Task(Protocol):
    """A task is one piece of work for a worker.

    A task that differs in size from the others of its map says in an attribute ``work`` how many units it holds; the
    default is 1.
    """

    @property
    def label(self) -> str:
        """Short name for progress, dashboards and errors."""

    def run(self, state: dict[Any, Any]) -> Any:
        """Do the work and return its result, which must not depend on what other tasks left in ``state``.

        What they left may only make it faster.
        """


def work_of(task: Task) -> float:
    """Return the units of work of ``task``, by which the times of a map's tasks are compared."""
    return float(getattr(task, "work", 1))


@dataclass
class PoolStatistics:
    """Says what a pool is doing; only the pool writes these numbers, others read them."""

    workers: int = 0  # alive now
    starting: int = 0
    running: int = 0  # tasks on workers now
    queued: int = 0  # tasks of the present map that no worker has yet
    completed: int = 0  # tasks, failed ones among them
    retries: int = 0  # tasks of lost workers that ran again
    speculations: int = 0  # stragglers that were sent out twice
    busy_seconds: float = 0.0  # of workers, over completed tasks
    peak_memory_bytes: int = 0  # the largest of any worker: of its device, or of its process where it has none


def no_limit() -> int | None:
    """Return None: a pool may hold as many workers as it likes."""
    return None


class Pool(ABC):
    """A pool runs tasks on workers; it is a context manager that closes itself.

    ``limit`` returns how many workers the pool may hold at present, None for as many as it likes. Pools that can grow
    and shrink ask it every second or so while they work.
    """

    size: int  # workers that work is worth dividing among
    statistics: PoolStatistics
    one_machine = True  # whether all workers run on this machine
    limit: Callable[[], int | None] = staticmethod(no_limit)

    @abstractmethod
    def map(self, tasks: Sequence[Task]) -> Iterator[Any]:
        """Yield the results in the order of the tasks, each as soon as it and its predecessors are done.

        Raises TaskError or UserError for the first task in order that failed by itself, and WorkersLostError for one
        whose workers were lost too often.
        """

    @abstractmethod
    def close(self) -> None:
        """Give the workers back."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def run_task(task: Task, state: dict[Any, Any]) -> Any:
    """Run one task and return its result.

    Its own exceptions become TaskError; user errors and interrupts pass through.
    """
    try:
        return task.run(state)
    except UserError:
        raise
    except Exception as error:
        raise TaskError(task.label, f"{type(error).__name__}: {error}") from error


def set_threads(threads: int) -> int:
    """Let PyTorch use ``threads`` threads in this process, and return how many it used before."""
    import torch  # noqa: PLC0415 - 200 MB that workers without tensors do not need

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    return before


def peak_memory_bytes() -> int:
    """Return the most bytes that this worker has held: of its device, or of its process if it has none."""
    if "torch" not in sys.modules:
        return peak_host_memory()
    from bitgenome.common.devices import peak_memory  # noqa: PLC0415

    return peak_memory()


class SerialPool(Pool):
    """Runs every task in this process, with as many threads as one worker of a larger pool would have."""

    size = 1

    def __init__(self, cpus_per_worker: int = 1):
        self._threads = cpus_per_worker
        self._state: dict[Any, Any] = {}
        self.statistics = PoolStatistics(workers=1)

    def map(self, tasks: Sequence[Task]) -> Iterator[Any]:
        try:
            for index, task in enumerate(tasks):
                self.statistics.queued = len(tasks) - index - 1
                yield self._run(task)
        finally:
            self.statistics.queued = 0

    def _run(self, task: Task) -> Any:
        statistics, before, started = self.statistics, set_threads(self._threads), time.perf_counter()
        statistics.running = 1
        try:
            return run_task(task, self._state)
        finally:
            set_threads(before)
            statistics.running = 0
            statistics.completed += 1
            statistics.busy_seconds += time.perf_counter() - started
            statistics.peak_memory_bytes = max(statistics.peak_memory_bytes, peak_memory_bytes())

    def close(self) -> None:
        close_all(self._state)
        if "torch" in sys.modules:
            from bitgenome.common.devices import release_memory  # noqa: PLC0415 - see set_threads

            release_memory()
