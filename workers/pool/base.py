"""Where tasks run: the contract that every pool keeps, and the serial pool.

A task is a small picklable object with a ``label`` and ``run(state)``; ``state`` is its worker's own dict, in which
tasks keep what is worth keeping warm (a loaded model, a mapped bank). One that writes files names them, or their
folder, in ``makes``; every other path in its fields is of what it reads (see workers.storage.staging).
"""

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from bitgenome.common.errors import UserError
from bitgenome.common.host_memory import peak_host_memory
from workers.errors import TaskError


class Task(Protocol):
    """One that differs from the others of its map says how many units of ``work`` it holds; the others hold 1."""

    @property
    def label(self) -> str:
        """Short name for progress, dashboards and errors."""

    def run(self, state: dict[Any, Any]) -> Any:
        """The work; must not depend on what other tasks left in ``state``, except for speed."""


def work_of(task: Task) -> float:
    """By which the times of a map's tasks are compared."""
    return float(getattr(task, "work", 1))


@dataclass
class PoolStatistics:
    """What a pool is doing; it writes these numbers, others only read them."""

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
    return None


class Pool(ABC):
    """Runs tasks; a context manager that closes itself.

    ``limit`` says how many workers the pool may hold now, None for as many as it likes; pools that can grow and shrink
    ask it every second or so while they work.
    """

    size: int  # workers that work is worth dividing among
    statistics: PoolStatistics
    limit: Callable[[], int | None] = staticmethod(no_limit)

    @abstractmethod
    def map(self, tasks: Sequence[Task]) -> Iterator[Any]:
        """Results in the order of the tasks, each as soon as it and its predecessors are done.

        Raises TaskError or UserError for the first task in order that failed by itself, WorkersLostError for machines
        that were lost too often.
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
    """Run one task; its own exceptions become TaskError, users' errors and interrupts pass."""
    try:
        return task.run(state)
    except UserError:
        raise
    except Exception as error:
        raise TaskError(task.label, f"{type(error).__name__}: {error}") from error


def set_threads(threads: int) -> int:
    """Let this process compute with so many threads; how many it had before."""
    import torch  # noqa: PLC0415 - 200 MB that workers without tensors do without

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    return before


def peak_memory_bytes() -> int:
    """What this worker has held at most: of its device, or of its process where it has none."""
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
        self._state.clear()
